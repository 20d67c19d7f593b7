"""An engine on the device path, put together by hand: on a GPU, and on a CPU with the kernels in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.attention.base import AttentionBackend, group_layers
from engine.attention.triton import TritonBackend
from engine.config import ModelConfig
from engine.core import EngineCore
from engine.fusion import fuse
from engine.grammar_compiler import GrammarCompiler, GrammarSetup
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AddRequest, RequestOutput
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.step import NewRow, SchedulerOutput


@dataclass
class Engine:
    """A core and its parts; `forced_logits` uses the runner alone."""

    loaded: LoadedModel
    backend: AttentionBackend
    runner: ModelRunner
    core: EngineCore
    block_size: int

    def generate(
        self, prompts: list[list[int]], sampling: SamplingParams, aborted: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Output tokens of all prompts, queued together; those of `aborted` are ended after their third token."""
        messages = [
            AddRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts)
        ]
        outputs = self.run(messages, frozenset(f"r{i}" for i in aborted))
        return [[token_id for output in outputs[f"r{i}"] for token_id in output.token_ids] for i in range(len(prompts))]

    def run(self, messages: list[AddRequest], aborted: frozenset[str] = frozenset()) -> dict[str, list[RequestOutput]]:
        """All outputs by request, queued together (those with a grammar once that is compiled)."""
        outputs: dict[str, list[RequestOutput]] = {message.request_id: [] for message in messages}
        for message in messages:
            self.core.add(message)
        while self.core.has_work or self.core.is_compiling:
            for request_id, error in self.core.take_compiled():
                assert error is None, (request_id, error)
            for output in self.core.step():
                outputs[output.request_id].append(output)
                if output.request_id in aborted and output.first_token_index == 2:
                    self.core.abort(output.request_id)
            self.core.check_integrity()
        return outputs

    def forced_logits(self, sequences: list[list[int]], chunk: int) -> list[torch.Tensor]:
        """float32 logits [positions, V] by sequence, from position chunk - 1 on: the first `chunk` tokens in two steps, so that
        the second has a context; then one token a step, all sequences together, each with the tokens given here."""
        rows, next_block = [], 1
        for slot, sequence in enumerate(sequences):
            num_blocks = -(-len(sequence) // self.block_size)
            ids = list(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            groups = tuple(list(ids) for _ in self.core._scheduler.kv_cache.groups)
            tokens = np.array(sequence, dtype=np.int32)
            rows.append(NewRow(slot, tokens, len(sequence), 0, SamplingParams(temperature=0.0), 0, groups))
        half = chunk // 2
        collected: list[list[torch.Tensor]] = [[] for _ in sequences]
        everyone = list(range(len(sequences)))
        spans = [(half, 0, False), (chunk - half, half, True)]
        spans += [(1, position, True) for position in range(chunk, max(map(len, sequences)))]
        for count, start, wanted in spans:
            slots = [slot for slot in everyone if start + count <= len(sequences[slot])]
            step = SchedulerOutput(
                0,
                new_rows=rows if start == 0 else [],
                slots=slots,
                start_positions=[start] * len(slots),
                num_tokens=[count] * len(slots),
                sampled_rows=list(range(len(slots))) if wanted else [],
            )
            self.runner.launch(step)
            if wanted:
                assert self.runner._launched is not None
                logits = self.runner._launched.logits
                assert logits is not None
                for row, slot in enumerate(slots):
                    collected[slot].append(logits[row].float().cpu().clone())
            self.runner.sample(None).wait()
        self.runner.launch(SchedulerOutput(0, freed_slots=everyone))
        self.runner.sample(None).wait()
        return [torch.stack(parts) for parts in collected]


@torch.inference_mode()
def build(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    use_graphs: bool = False,
    fused: bool = True,
    budget: int = 256,
    blocks: int = 400,
    max_num_seqs: int = 32,
    block_size: int = 16,
    max_model_len: int = 256,
    kv_dtype: torch.dtype | None = None,
) -> Engine:
    """Raises AssertionError where a fused form was asked for and the model has none."""
    loaded = load_model(folder, ModelConfig(model=str(folder)), device, dtype, served_context=max_model_len)
    groups = group_layers(loaded.layers, block_size, (kv_dtype or dtype).itemsize)
    decoder = fuse(loaded.model, loaded.layers, max_model_len) if fused else None
    assert decoder is not None or not fused
    backend = TritonBackend(loaded.layers, groups, block_size, dtype, device, kv_dtype=kv_dtype, max_num_seqs=max_num_seqs)
    backend.allocate([blocks] * len(groups))
    runner = ModelRunner(
        loaded.model,
        backend,
        vocab_size=loaded.vocab_size,
        num_groups=len(groups),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        device=device,
        fused=decoder,
        on_device=True,
        use_graphs=use_graphs,
    )
    if device.type == "cuda":
        runner.warm_up()
    kv_cache = KVCacheManager(groups, [blocks] * len(groups), block_size=block_size, max_step_tokens=2 * budget)
    scheduler = Scheduler(kv_cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=max_model_len)
    core = EngineCore(
        scheduler,
        runner,
        vocab_size=loaded.vocab_size,
        eos_token_ids=frozenset(),
        pipeline_depth=1,
        grammars=GrammarCompiler(GrammarSetup(str(folder), loaded.vocab_size, [])),
    )
    return Engine(loaded, backend, runner, core, block_size)
