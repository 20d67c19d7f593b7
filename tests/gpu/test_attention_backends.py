"""Backends over other people's kernels, where their packages are installed, against the oracle on a GPU in bfloat16: eager, and
captured once and replayed for other rows. `scripts/gpu_check` runs this."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from engine.attention import choose
from engine.attention.base import AttentionNeeds, DeviceRows, LayerSpec, RaggedBatch, group_layers
from engine.attention.sdpa import SdpaBackend
from engine.errors import ConfigError
from tests.engine.test_attention_backends import make_batch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run scripts/gpu_check on one", allow_module_level=True)

DEVICE = torch.device("cuda")
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
NUM_BLOCKS = 40
TOLERANCE = 0.01  # of bfloat16 outputs and weights against float32
WINDOWS = (None, 6)


def moved(batch: RaggedBatch) -> RaggedBatch:
    """The batch with its rows on the GPU."""
    rows = batch.device
    assert rows is not None
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    on_device = {
        name: tuple(x.to(DEVICE) for x in value) if isinstance(value, tuple) else value.to(DEVICE)
        for name, value in tensors.items()
        if not isinstance(value, int)
    }
    return replace(batch, device=replace(rows, **on_device))


def overwrite(rows: DeviceRows, new: DeviceRows) -> None:
    """What the device of a replayed step finds in its buffers."""
    for f in fields(rows):
        old_value, new_value = getattr(rows, f.name), getattr(new, f.name)
        if isinstance(old_value, torch.Tensor):
            old_value.copy_(new_value)
    for old_table, new_table in zip(rows.block_tables, new.block_tables, strict=True):
        old_table.copy_(new_table)


class Pair:
    """A backend and the oracle with the same pages; one layer without and one with a window, of blocks of block_size tokens."""

    def __init__(self, name: str, block_size: int) -> None:
        self.layers = [LayerSpec(i, HEADS, KV_HEADS, HEAD_DIM, 0.1, window, None, False) for i, window in enumerate(WINDOWS)]
        groups = group_layers(self.layers, block_size, 2)
        try:
            needs = AttentionNeeds(self.layers, groups, block_size, torch.bfloat16, DEVICE, torch.bfloat16)
            cls, _ = choose.choose_backend(name, needs)
        except ConfigError as error:
            pytest.skip(error.message)
        self.backend: Any = cls(self.layers, groups, block_size, torch.bfloat16, DEVICE)
        self.backend.allocate([NUM_BLOCKS] * len(groups))
        self.oracle = SdpaBackend(self.layers, groups, block_size, torch.float32, DEVICE)
        self.oracle.allocate([NUM_BLOCKS] * len(groups))
        for index, pages in self.backend._pages.items():
            for which, page in enumerate(pages):
                page.normal_()
                self.oracle._pages[index][which].copy_(page.transpose(0, 1))

    def activations(self, num_tokens: int) -> list[torch.Tensor]:
        """Merged q, k, v of each layer, [T, H + 2K, D]."""
        shape = (num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        return [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in self.layers]

    def run(self, merged: list[torch.Tensor], step: Any) -> list[torch.Tensor]:
        parts = (x.split([HEADS, KV_HEADS, KV_HEADS], dim=1) for x in merged)
        return [self.backend.forward(index, *qkv, step) for index, qkv in enumerate(parts)]

    def check(self, merged: list[torch.Tensor], outs: list[torch.Tensor], batch: RaggedBatch) -> None:
        """Real rows as the oracle has them; rows of padding finite, for what follows reads them."""
        num_real = sum(batch.query_lens)
        step = self.oracle.prepare(batch)
        for index, (x, out) in enumerate(zip(merged, outs, strict=True)):
            q, k, v = x[:num_real].float().split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            expected = self.oracle.forward(index, q, k, v, step)
            assert (out[:num_real].float() - expected).norm() <= TOLERANCE * expected.norm(), f"layer {index}"
            assert bool(out.isfinite().all())


BACKENDS = ("flash_attention", "cudnn", "flashinfer", "torch_varlen")
STEPS = {
    "decodes": ([1] * 5, [9, 40, 0, 15, 16], 0),
    "decodes and padding": ([1] * 3, [9, 40, 0], 2),
    "chunks": ([7, 19, 1, 4], [0, 30, 12, 16], 0),
    "mixed": ([1, 1, 1, 9, 2], [9, 40, 0, 3, 31], 0),
}


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_steps_equal_the_oracle(name: str, step: str, block_size: int) -> None:
    pair = Pair(name, block_size)
    queries, contexts, padding = STEPS[step]
    batch = moved(make_batch(queries, contexts, num_groups=2, padding=padding, block_size=block_size))
    merged = pair.activations(sum(queries) + padding)
    pair.check(merged, pair.run(merged, pair.backend.prepare(batch)), batch)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_serves_other_rows(name: str) -> None:
    pair = Pair(name, 16)
    if not pair.backend.graphs:
        pytest.skip(f"{name} does not offer to be captured")
    batch = moved(make_batch([1] * 4, [2, 3, 1, 0], num_groups=2, block_size=16))
    merged = pair.activations(4)
    pair.run(merged, pair.backend.prepare(batch))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = pair.run(merged, pair.backend.prepare(batch))
    for seed, contexts in enumerate(([2, 3, 1, 0], [30, 5, 60, 200], [9, 9, 9, 9])):
        later = moved(make_batch([1] * 4, contexts, num_groups=2, seed=seed, block_size=16))
        assert batch.device is not None and later.device is not None
        overwrite(batch.device, later.device)
        for old, new in zip(merged, pair.activations(4), strict=True):
            old.copy_(new)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        pair.check(merged, outs, later)
