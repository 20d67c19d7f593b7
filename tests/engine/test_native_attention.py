"""The compiled CPU kernels' paged attention against the reference of all kernels in float64, which knows no pages."""

from __future__ import annotations

import pytest
import torch

from engine.attention.base import AttentionNeeds, LayerSpec, RaggedBatch, group_layers
from engine.attention.native import NativeBackend
from engine.kernels.cpu_library import unavailable_reason
from engine.kernels.tiled_attention import tiled_attention

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

CPU = torch.device("cpu")
NUM_BLOCKS = 160
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def spec(heads: int = 4, kv_heads: int = 2, dim: int = 16, **kind: object) -> LayerSpec:
    values = {"window": None, "softcap": None, "has_sinks": False, **kind}
    return LayerSpec(0, heads, kv_heads, dim, 0.3, **values)  # type: ignore[arg-type]


SPECS = {
    "full": spec(),
    "window": spec(window=6),
    "window of one token": spec(window=1),
    "window past a block of keys": spec(window=70),
    "softcap": spec(softcap=2.0),
    "sinks": spec(has_sinks=True),
    "window, softcap, sinks": spec(window=6, softcap=2.0, has_sinks=True),
    "one head a key": spec(heads=3, kv_heads=3),
    "many heads a key": spec(heads=16, kv_heads=1),
    "heads of 80": spec(dim=80),
    "heads of 128": spec(dim=128),
}
# per sequence, where its chunks end: prefill alone, awkward chunks, chunk and decodes, decodes alone, past a block of keys
CHUNK_ENDS = [[37], [5, 11, 12, 30], [16, 17, 18, 19], [1, 2, 3, 4, 5], [90, 91, 131]]


def run(layer: LayerSpec, dtype: torch.dtype, block_size: int, chunk_ends: list[list[int]]) -> None:
    """All sequences mixed in one step after another, over scattered pages that held NaN."""
    generator = torch.Generator().manual_seed(0)
    lengths = [ends[-1] for ends in chunk_ends]
    q, k, v = (
        [torch.randn(n, heads, layer.head_dim, generator=generator).to(dtype) for n in lengths]
        for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    )
    sinks = torch.randn(layer.num_heads, generator=generator) if layer.has_sinks else None
    kind = {"scaling": layer.scaling, "window": layer.window, "softcap": layer.softcap, "sinks_H": sinks}
    expected = [tiled_attention(*(x.double() for x in parts), **kind).float() for parts in zip(q, k, v, strict=True)]
    groups = group_layers([layer], block_size, dtype.itemsize)
    backend = NativeBackend([layer], groups, block_size, dtype, CPU)
    backend.allocate([NUM_BLOCKS])
    for pages in backend._pages[0]:
        pages.fill_(float("nan"))  # what a page held before must not matter
    supply = iter((torch.randperm(NUM_BLOCKS, generator=generator) + 1).tolist())
    tables = [[next(supply) for _ in range(-(-length // block_size))] for length in lengths]
    for step in range(max(map(len, chunk_ends))):
        rows = [s for s, ends in enumerate(chunk_ends) if step < len(ends)]
        spans = [slice(0 if step == 0 else chunk_ends[s][step - 1], chunk_ends[s][step]) for s in rows]
        batch = RaggedBatch([c.stop - c.start for c in spans], [c.start for c in spans], ([tables[s] for s in rows],))
        parts = (torch.cat([x[s][c] for s, c in zip(rows, spans, strict=True)]) for x in (q, k, v))
        out = backend.forward(0, *parts, backend.prepare(batch), sinks)
        assert out.dtype == dtype
        wanted = torch.cat([expected[s][c] for s, c in zip(rows, spans, strict=True)])
        torch.testing.assert_close(out.float(), wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_ragged_steps_equal_the_reference(name: str, dtype: torch.dtype):
    run(SPECS[name], dtype, 16, CHUNK_ENDS)


@pytest.mark.parametrize("block_size", [32, 64])
def test_larger_pages(block_size: int):
    run(SPECS["window, softcap, sinks"], torch.float32, block_size, CHUNK_ENDS)
    run(SPECS["full"], torch.bfloat16, block_size, CHUNK_ENDS)


@pytest.mark.parametrize("name", ["full", "sinks", "window past a block of keys", "many heads a key"])
def test_a_long_row_is_worked_on_in_parts(name: str):
    run(SPECS[name], torch.float32, 16, [[1300, 1301, 1302], [512, 513, 514], [40]])


def test_a_row_does_not_depend_on_the_batch():
    layer, generator = SPECS["full"], torch.Generator().manual_seed(0)
    groups = group_layers([layer], 16, 4)
    q, k, v = (torch.randn(40, heads, 16, generator=generator) for heads in (4, 2, 2))

    def last_row(others: int) -> torch.Tensor:
        backend = NativeBackend([layer], groups, 16, torch.float32, CPU)
        backend.allocate([40])
        tables = [[1 + 3 * row, 2 + 3 * row, 3 + 3 * row] for row in range(others + 1)]
        start, end = [39] * (others + 1), [1] * (others + 1)
        ragged = RaggedBatch([39] * (others + 1), [0] * (others + 1), (tables,))
        backend.forward(0, *(x[:39].repeat(others + 1, 1, 1) for x in (q, k, v)), backend.prepare(ragged))
        decode = backend.prepare(RaggedBatch(end, start, (tables,)))
        return backend.forward(0, *(x[39:].repeat(others + 1, 1, 1) for x in (q, k, v)), decode)[-1]

    assert torch.equal(last_row(0), last_row(9))


def test_copied_pages_attend_alike():
    layer, generator = SPECS["full"], torch.Generator().manual_seed(0)
    backend = NativeBackend([layer], group_layers([layer], 16, 4), 16, torch.float32, CPU)
    backend.allocate([4])
    q, k, v = (torch.randn(17, heads, 16, generator=generator) for heads in (4, 2, 2))
    backend.forward(0, q, k, v, backend.prepare(RaggedBatch([17], [0], ([[1, 2]],))))
    backend.copy_blocks([(0, 2, 4)])
    step = RaggedBatch([1, 1], [17, 17], ([[1, 2], [1, 4]],))
    out = backend.forward(0, *(x[:1].repeat(2, 1, 1) for x in (q, k, v)), backend.prepare(step))
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_size": 8}, "its pages hold 16, 32, 64 tokens, not 8"),
        ({"dtype": torch.float16, "kv_cache_dtype": torch.float16}, "float32 or bfloat16"),
        ({"layers": [spec(dim=24)]}, "head sizes that are multiples of 16, not 24"),
        ({"layers": [spec(heads=64, kv_heads=1)]}, "up to 48 query heads"),
        ({"device": torch.device("cuda")}, "it runs on a CPU"),
    ],
)
def test_says_what_it_cannot_serve(change: dict[str, object], why: str):
    layer = spec()
    needs = {
        "layers": [layer],
        "groups": group_layers([layer], 16, 4),
        "block_size": 16,
        "dtype": torch.float32,
        "device": CPU,
        "kv_cache_dtype": torch.float32,
    }
    assert NativeBackend.unusable(AttentionNeeds(**needs)) is None  # type: ignore[arg-type]
    assert why in str(NativeBackend.unusable(AttentionNeeds(**{**needs, **change})))  # type: ignore[arg-type]
