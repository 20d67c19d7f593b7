"""An engine process without a model: the real socket, loop, core and scheduler over the fake runner.

Started by tests through the supervisor as `python -m tests.fake_engine`. The model "demo" loads; "broken" fails to.
"""

from __future__ import annotations

import sys

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.kv_cache_manager import KVCacheManager
from engine.messages import EngineReady
from engine.process import Report, run
from engine.scheduler import Scheduler
from tests.fake_runner import VOCAB_SIZE, FakeRunner, group

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, MAX_BATCHED, CONTEXT = 4, 400, 16, 64, 400


def build_engine(config: EngineConfig, report: Report) -> tuple[EngineCore, EngineReady]:
    report("load", config.model.model, 0.5)
    if config.model.model == "broken":
        raise ModelLoadError("this model is broken on purpose")
    groups = [group()]
    kv = KVCacheManager(groups, [NUM_BLOCKS], block_size=BLOCK_SIZE, max_step_tokens=MAX_BATCHED)
    scheduler = Scheduler(kv, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_BATCHED, max_model_len=CONTEXT)
    runner = FakeRunner(groups, BLOCK_SIZE)
    core = EngineCore(scheduler, runner, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({2}), pipeline_depth=0)
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
        num_blocks=[NUM_BLOCKS],
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
