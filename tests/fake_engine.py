"""An engine process without a model: the real socket, loop, core and scheduler over the fake runner.

Started by tests through the supervisor as `python -m tests.fake_engine`. The model "broken" fails to load; every other is a
folder, whose config.json may say: load_s, how long loading takes; step_s, what a step takes at least; pipeline_depth;
fails_again, that every engine but the first fails to load.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.kv_cache_manager import KVCacheManager
from engine.messages import EngineReady
from engine.process import Report, run
from engine.scheduler import Scheduler
from engine.step import SchedulerOutput
from tests.fake_runner import VOCAB_SIZE, FakeRunner, group

logger = logging.getLogger("tests.fake_engine")

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, MAX_BATCHED, CONTEXT = 4, 400, 16, 64, 400


class PacedRunner(FakeRunner):
    """Takes `step_s` for every step, and says at debug that it does one."""

    step_s = 0.0

    def launch(self, step: SchedulerOutput) -> None:
        logger.debug("a step")
        time.sleep(self.step_s)
        super().launch(step)


def build_engine(config: EngineConfig, report: Report) -> tuple[EngineCore, EngineReady]:
    report("load", config.model.model, 0.5)
    if config.model.model == "broken":
        raise ModelLoadError("this model is broken on purpose")
    options: dict[str, Any] = json.loads((Path(config.model.model) / "config.json").read_text())
    if config.earlier is not None and options.get("fails_again"):
        raise ModelLoadError("this model loads only once")
    time.sleep(options.get("load_s", 0.0))
    groups = [group()]
    num_blocks = config.earlier.num_blocks if config.earlier else [NUM_BLOCKS]
    kv = KVCacheManager(groups, num_blocks, block_size=BLOCK_SIZE, max_step_tokens=MAX_BATCHED)
    scheduler = Scheduler(kv, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_BATCHED, max_model_len=CONTEXT)
    runner = PacedRunner(groups, BLOCK_SIZE)
    runner.step_s = options.get("step_s", 0.0)
    core = EngineCore(
        scheduler,
        runner,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({2}),
        pipeline_depth=options.get("pipeline_depth", 0),
    )
    ready = EngineReady(
        model_dir=config.model.model,
        architecture="Fake",
        device="cpu",
        dtype="float32",
        attention_backend="fake",
        vocab_size=VOCAB_SIZE,
        hidden_size=2,
        max_model_len=CONTEXT,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        kv_cache_bytes=0,
        kv_cache_tokens=NUM_BLOCKS * BLOCK_SIZE,
        eos_token_ids=[2],
        generation_defaults={},
        load_seconds={},
        notes=[],
    )
    return core, ready


if __name__ == "__main__":
    sys.exit(run(build_engine))
