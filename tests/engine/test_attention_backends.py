"""Which attention backend is taken and why, and that each gives the kernels it borrows what they ask for.

The packages are not here: stand-ins with the real signatures take their place in sys.modules and attend in plain torch,
so that a wrong table, length, stride or mask shows as a difference from the oracle.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from engine.attention import choose
from engine.attention.base import AttentionNeeds, DeviceRows, LayerSpec, RaggedBatch, group_layers
from engine.attention.cudnn import CudnnBackend
from engine.attention.flash_attention import FlashAttentionBackend
from engine.attention.flashinfer import FlashInferBackend
from engine.attention.native import NativeBackend
from engine.attention.pages import PagedBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.torch_varlen import TorchVarlenBackend
from engine.errors import ConfigError

CPU = torch.device("cpu")
NUM_BLOCKS = 40


def attend(
    q_THD: torch.Tensor,
    starts: Sequence[int],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    tables: Sequence[Sequence[int]],
    lens: Sequence[int],
    *,
    scaling: float,
    window_left: int = -1,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stand-ins compute: causal attention of rows over pages [blocks, K, block_size, D] -> [T, H, D], [H, T]."""
    block_size, num_heads = k_pages.shape[2], q_THD.shape[1]
    out, lse = torch.zeros(q_THD.shape, dtype=torch.float32), torch.full(q_THD.shape[1::-1], float("-inf"))
    for row, length in enumerate(lens):
        first, last = starts[row], starts[row + 1]
        if length == 0 or first == last:
            continue
        position = torch.arange(length)
        pages = torch.tensor(list(tables[row]))[position // block_size]
        assert int(pages.max()) < k_pages.shape[0]
        repeat = num_heads // k_pages.shape[1]
        keys, values = (x[pages, :, position % block_size].float().repeat_interleave(repeat, dim=1) for x in (k_pages, v_pages))
        scores = torch.einsum("qhd,khd->hqk", q_THD[first:last].float(), keys) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query = torch.arange(length - (last - first), length)[:, None]
        hidden = position > query
        if window_left >= 0:
            hidden |= position < query - window_left
        scores = scores.masked_fill(hidden, float("-inf"))
        values = values.masked_fill(hidden.all(0)[:, None, None], 0.0)  # pages that no query sees may hold anything
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse[:, first:last] = scores.logsumexp(-1)
    return out.to(q_THD.dtype), lse


class FakeTensor:
    """A tensor of a cuDNN graph: what was declared of it."""

    def __init__(self, uid: int | None, dim: Sequence[int], stride: Sequence[int], data_type: str) -> None:
        self.uid, self.dim, self.stride, self.data_type, self.offsets = uid, tuple(dim), tuple(stride), data_type, None

    def set_ragged_offset(self, offsets: FakeTensor) -> FakeTensor:
        self.offsets = offsets
        return self

    def set_uid(self, uid: int) -> FakeTensor:
        self.uid = uid
        return self

    def set_dim(self, dim: Sequence[int]) -> FakeTensor:
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride: Sequence[int]) -> FakeTensor:
        self.stride = tuple(stride)
        return self

    def set_data_type(self, data_type: str) -> FakeTensor:
        self.data_type = data_type
        return self

    def set_output(self, _is_output: bool) -> FakeTensor:
        return self

    def rows(self, bound: dict[int, torch.Tensor], lens: Sequence[int]) -> list[torch.Tensor]:
        """[heads, tokens, D] of each row, by the declared strides and offsets and nothing else."""
        assert self.uid is not None
        data = bound[self.uid]
        starts = [row * self.stride[0] for row in range(self.dim[0])]
        if self.offsets is not None:
            assert self.offsets.uid is not None and self.offsets.dim == (self.dim[0] + 1, 1, 1, 1)
            starts = bound[self.offsets.uid].flatten().tolist()[:-1]
        return [
            data.as_strided((self.dim[1], n, self.dim[3]), self.stride[1:], data.storage_offset() + start)
            for start, n in zip(starts, lens, strict=True)
        ]


class FakeGraph:
    """cudnn.pygraph, of which only one paged attention can be asked."""

    built: list[FakeGraph] = []

    def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: object) -> None:
        assert (intermediate_data_type, compute_data_type) == ("float", "float")
        self.call: dict[str, Any] = {}
        self.out = FakeTensor(None, (), (), io_data_type)

    def tensor(self, *, name: str, uid: int, dim: Sequence[int], stride: Sequence[int], data_type: str) -> FakeTensor:
        return FakeTensor(uid, dim, stride, data_type)

    def sdpa(self, *, name: str, **call: Any) -> tuple[FakeTensor, None]:
        self.call = call
        return self.out, None

    def build(self, _heuristics: list[str]) -> None:
        FakeGraph.built.append(self)

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, bound: dict[int, torch.Tensor], workspace: torch.Tensor, handle: object) -> None:
        call = self.call
        assert call["use_padding_mask"] and not call["generate_stats"]
        query_lens, key_lens = (bound[call[name].uid].flatten().tolist() for name in ("seq_len_q", "seq_len_kv"))
        table = bound[call["paged_attention_k_table"].uid]
        k, v = bound[call["k"].uid], bound[call["v"].uid]
        for declared, data in ((call["k"], k), (call["v"], v), (call["paged_attention_k_table"], table)):
            assert declared.dim == data.shape and declared.stride == data.stride()
        assert bound[call["paged_attention_v_table"].uid] is table and table.dtype == torch.int32
        assert call["paged_attention_max_seq_len_kv"] == table.shape[2] * k.shape[2]
        masked = call["diagonal_alignment"] == "bottom right"
        assert masked == (call["diagonal_band_right_bound"] == 0) and (masked or max(query_lens) <= 1)
        window = call["diagonal_band_left_bound"]
        q_rows, out_rows = call["q"].rows(bound, query_lens), self.out.rows(bound, query_lens)
        for row, (q, out) in enumerate(zip(q_rows, out_rows, strict=True)):
            assert query_lens[row] <= call["q"].dim[2]
            result, _ = attend(
                q.transpose(0, 1),
                [0, query_lens[row]],
                k,
                v,
                [table[row].flatten().tolist()],
                [key_lens[row]],
                scaling=call["attn_scale"],
                window_left=-1 if window is None else window - 1,
            )
            out.copy_(result.transpose(0, 1))


def fake_cudnn() -> ModuleType:
    return module(
        "cudnn",
        pygraph=FakeGraph,
        create_handle=object,
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
        data_type=SimpleNamespace(BFLOAT16="bfloat16", HALF="half", FLOAT="float", INT32="int32"),
        diagonal_alignment=SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: None = None,
    v: None = None,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_softmax_lse: bool = False,
) -> Any:
    """Of FlashAttention-3, as far as it is used."""
    assert cache_seqlens is not None and page_table is not None and cu_seqlens_q is not None and softmax_scale is not None
    assert causal and return_softmax_lse and window_size[1] == (-1 if window_size[0] < 0 else 0)
    for ints in (cache_seqlens, page_table, cu_seqlens_q):
        assert ints.dtype == torch.int32 and ints.is_contiguous()
    assert max_seqlen_q is not None and max_seqlen_q >= int(cu_seqlens_q.diff().max())
    out, lse = attend(
        q,
        cu_seqlens_q.tolist(),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        page_table.tolist(),
        cache_seqlens.tolist(),
        scaling=softmax_scale,
        window_left=window_size[0],
        softcap=softcap,
    )
    return out, lse, torch.empty(0), torch.empty(0)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Of FlashAttention-2."""
    assert block_table is not None and return_attn_probs and cu_seqlens_k.dtype == torch.int32
    lens = cu_seqlens_k.diff()
    assert len(cu_seqlens_k) == len(cu_seqlens_q) and max_seqlen_k >= int(lens.max())
    out, lse, *_ = flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lens,
        page_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        return_softmax_lse=True,
    )
    return out, lse, None


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Of torch 2.13."""
    assert enable_gqa and cu_seq_k is None and window_size[1] == 0 and seqused_k is not None and block_table is not None
    assert max_k >= int(seqused_k.max()) and max_k == block_table.shape[1] * key.shape[1]
    left = window_size if window_size[0] >= 0 else (-1, -1)
    out, *_ = flash_attn_with_kvcache(
        query,
        key,
        value,
        cache_seqlens=seqused_k,
        page_table=block_table,
        cu_seqlens_q=cu_seq_q,
        max_seqlen_q=max_q,
        softmax_scale=scale,
        causal=True,
        window_size=left,
        return_softmax_lse=True,
    )
    return out


class FakeWrapper:
    """Of FlashInfer: plans on the host, then runs. `shape`: query heads, key heads, head size, page size."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8

    def _plan(
        self,
        starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        shape: tuple[int, int, int, int],
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
    ) -> None:
        assert all(ints.dtype == torch.int32 for ints in (starts, indptr, indices, last_page_len))
        assert int(indptr[-1]) == len(indices) and len(indptr) == len(last_page_len) + 1 == len(starts)
        assert bool((last_page_len >= 1).all()) and bool((last_page_len <= shape[3]).all())
        self.shape, self.starts = shape, starts.tolist()
        bounds = indptr.tolist()
        self.tables = [indices[a:b].tolist() for a, b in itertools.pairwise(bounds)]
        self.lens = [(len(t) - 1) * shape[3] + n for t, n in zip(self.tables, last_page_len.tolist(), strict=True)]
        self.options = {"scaling": sm_scale, "window_left": window_left, "softcap": logits_soft_cap or 0.0}

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> torch.Tensor:
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[1], k.shape[3], k.shape[2]) == self.shape and q.is_contiguous()
        out.copy_(attend(q, self.starts, k, v, self.tables, self.lens, **self.options)[0])  # type: ignore[arg-type]
        return out


class BatchDecodeWithPagedKVCacheWrapper(FakeWrapper):
    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD", use_tensor_cores: bool = False) -> None:
        super().__init__(workspace, kv_layout)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float = 1.0,
    ) -> None:
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(starts, indptr, indices, last_page_len, shape, sm_scale, window_left, logits_soft_cap)


class BatchPrefillWithPagedKVCacheWrapper(FakeWrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float = 1.0,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert causal
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        last = paged_kv_last_page_len
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, last, shape, sm_scale, window_left, logits_soft_cap)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return made


PACKAGES: dict[str, Callable[[], ModuleType]] = {
    "flash_attn_interface": lambda: module("flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache),
    "flash_attn": lambda: module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func),
    "flashinfer": lambda: module(
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    ),
    "cudnn": fake_cudnn,
}


BLOCK_SIZE = 4
TABLE_WIDTH = 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
BACKENDS: dict[str, tuple[type[PagedBackend], tuple[str, ...]]] = {
    "flash_attention 3": (FlashAttentionBackend, ("flash_attn_interface",)),
    "flash_attention 2": (FlashAttentionBackend, ("flash_attn",)),
    "cudnn": (CudnnBackend, ("cudnn",)),
    "flashinfer": (FlashInferBackend, ("flashinfer",)),
    "torch_varlen": (TorchVarlenBackend, ("flash_attn_interface",)),
}
# tokens and context of each row, decodes first
STEPS = {
    "decodes": ([1] * 5, [9, 40, 0, 15, 16]),
    "a decode": ([1], [50]),
    "chunks": ([7, 19, 1, 4], [0, 30, 12, 16]),
    "mixed": ([1, 1, 1, 9, 2], [9, 40, 0, 3, 31]),
}


def layer(index: int = 0, *, window: int | None = None, softcap: float | None = None, sinks: bool = False) -> LayerSpec:
    return LayerSpec(index, HEADS, KV_HEADS, HEAD_DIM, 0.3, window, softcap, sinks)


def make(name: str, layers: list[LayerSpec], monkeypatch: pytest.MonkeyPatch) -> tuple[PagedBackend, SdpaBackend]:
    """A backend over stand-ins, its pages full of numbers, and the oracle with the same pages."""
    cls, packages = BACKENDS[name]
    for package in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, module(package))
    for package in packages:
        monkeypatch.setitem(sys.modules, package, PACKAGES[package]())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", lambda name: None, raising=False)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    groups = group_layers(layers, BLOCK_SIZE, 4)
    backend = cls(layers, groups, BLOCK_SIZE, torch.float32, CPU)
    oracle = SdpaBackend(layers, groups, BLOCK_SIZE, torch.float32, CPU)
    backend.allocate([NUM_BLOCKS] * len(groups))
    oracle.allocate([NUM_BLOCKS] * len(groups))
    for index, pages in backend._pages.items():
        for which, page in enumerate(pages):
            assert page.shape == (NUM_BLOCKS + 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM) and not page.any()
            page.normal_()
            oracle._pages[index][which].copy_(page.transpose(0, 1))
    return backend, oracle


def make_batch(
    queries: list[int],
    contexts: list[int],
    *,
    num_groups: int,
    padding: int = 0,
    seed: int = 0,
    block_size: int = BLOCK_SIZE,
) -> RaggedBatch:
    """Rows in scattered slots, with pages in random order and tables of their own for each group."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_slots = len(queries) + padding, len(queries) + padding + 3
    slots = torch.randperm(num_slots - 1, generator=generator)[:num_rows] + 1
    slots[len(queries) :] = 0
    host_tables, device_tables = [], []
    for _ in range(num_groups):
        supply = iter((torch.randperm(NUM_BLOCKS, generator=generator) + 1).tolist())
        tables = [[next(supply) for _ in range(-(-(q + c) // block_size))] for q, c in zip(queries, contexts, strict=True)]
        on_device = torch.zeros(num_slots, TABLE_WIDTH, dtype=torch.int32)
        for slot, table in zip(slots.tolist(), tables, strict=False):
            on_device[slot, : len(table)] = torch.tensor(table)
        host_tables.append(tables)
        device_tables.append(on_device)
    tokens = [*queries, *[1] * padding]
    ends = [q + c for q, c in zip(queries, contexts, strict=True)]
    positions = [p for c, end in zip(contexts, ends, strict=True) for p in range(c, end)]
    num_decodes = num_rows if padding else next((row for row, q in enumerate(queries) if q > 1), num_rows)
    rows = DeviceRows(
        block_tables=tuple(device_tables),
        row_slots=slots.to(torch.int32),
        seq_lens=torch.tensor(ends + [0] * padding, dtype=torch.int32),
        context_lens=torch.tensor(contexts + [0] * padding, dtype=torch.int32),
        query_starts=torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32),
        positions=torch.tensor(positions + [-1] * padding, dtype=torch.int32),
        token_slots=slots.repeat_interleave(torch.tensor(tokens)).to(torch.int32),
        num_decodes=num_decodes,
    )
    return RaggedBatch(queries, contexts, tuple(host_tables), rows)


def activations(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as views of a merged projection."""
    merged = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
    q, k, v = merged.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    return q, k, v


def assert_step(backend: PagedBackend, oracle: SdpaBackend, batch: RaggedBatch, step: Any, sinks: bool = False) -> None:
    """One step of all layers, pages included, as the oracle does it; rows of padding give zeros and leave no trace."""
    assert batch.device is not None
    num_tokens, num_real = len(batch.device.positions), sum(batch.query_lens)
    expected_step = oracle.prepare(batch)
    for index in backend._layers:
        q, k, v = activations(num_tokens)
        sinks_H = torch.randn(HEADS) if sinks else None
        out = backend.forward(index, q, k, v, step, sinks_H)
        given = torch.full((num_tokens, HEADS * HEAD_DIM), float("nan"))
        assert backend.attend(index, q, k, v, step, sinks_H, out_THD=given.view(q.shape)).data_ptr() == given.data_ptr()
        assert torch.equal(given.view(q.shape), out)
        expected = oracle.forward(index, q[:num_real], k[:num_real], v[:num_real], expected_step, sinks_H)
        assert out.shape == q.shape and out.dtype == q.dtype
        torch.testing.assert_close(out[:num_real], expected, atol=2e-6, rtol=1e-5)
        assert not out[num_real:].any()
        for which, pages in enumerate(backend._pages[index]):
            assert torch.equal(pages.transpose(0, 1), oracle._pages[index][which])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_steps_equal_the_oracle(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and windowed layers in turn, each group with tables of its own."""
    layers = [layer(0), layer(1, window=6), layer(2), layer(3, window=1), layer(4, window=6)]
    backend, oracle = make(name, layers, monkeypatch)
    for seed in range(2):
        batch = make_batch(*STEPS[step], num_groups=3, seed=seed)
        assert_step(backend, oracle, batch, backend.prepare(batch))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name.startswith("flash")])
def test_soft_caps_equal_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, oracle = make(name, [layer(0, softcap=1.5), layer(1, window=6, softcap=1.5)], monkeypatch)
    batch = make_batch(*STEPS["mixed"], num_groups=2)
    assert_step(backend, oracle, batch, backend.prepare(batch))


@pytest.mark.parametrize("name", ["flash_attention 3", "flash_attention 2"])
def test_sinks_come_in_by_the_log_sum_exp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, oracle = make(name, [layer(0, sinks=True), layer(1, window=6, sinks=True)], monkeypatch)
    for step in ("mixed", "decodes"):
        batch = make_batch(*STEPS[step], num_groups=2)
        assert_step(backend, oracle, batch, backend.prepare(batch), sinks=True)


@pytest.mark.parametrize("name", [name for name, (cls, _) in BACKENDS.items() if cls.graphs])
def test_padding_rows_are_zeros_and_leave_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, oracle = make(name, [layer(0), layer(1, window=6)], monkeypatch)
    batch = make_batch([1] * 3, [9, 40, 0], num_groups=2, padding=2)
    assert_step(backend, oracle, batch, backend.prepare(batch))


@pytest.mark.parametrize("name", [name for name, (cls, _) in BACKENDS.items() if cls.graphs])
def test_a_captured_step_reads_everything_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays device work alone: the same metadata serves other slots, pages and far longer rows."""
    backend, oracle = make(name, [layer(0), layer(1, window=6), layer(2)], monkeypatch)
    captured = make_batch([1] * 4, [2, 3, 1, 0], num_groups=2)
    step = backend.prepare(captured)
    assert_step(backend, oracle, captured, step)
    later = make_batch([1] * 4, [30, 5, 40, 60], num_groups=2, seed=5)
    assert captured.device is not None and later.device is not None
    for field in ("row_slots", "seq_lens", "context_lens", "query_starts", "positions", "token_slots"):
        getattr(captured.device, field).copy_(getattr(later.device, field))
    for old, new in zip(captured.device.block_tables, later.device.block_tables, strict=True):
        old.copy_(new)
    assert_step(backend, oracle, later, step)


def test_a_fused_layer_gets_its_group_s_table_and_its_own_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = make("cudnn", [layer(0), layer(1, window=6)], monkeypatch)
    rows = make_batch(*STEPS["mixed"], num_groups=2).device
    assert rows is not None
    given: list[Any] = []
    backend.rotate_and_write(SimpleNamespace(index=1, rotate=lambda *args: given.extend(args)), torch.empty(0), rows)
    assert given[1] is rows.positions and given[2] is rows.token_slots and given[3] is rows.block_tables[1]
    assert given[4] is backend._pages[1] and given[5] == (None, None)


def test_copied_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = make("cudnn", [layer(0), layer(1, window=6)], monkeypatch)
    before = {index: [page.clone() for page in pages] for index, pages in backend._pages.items()}
    backend.copy_blocks([(0, 2, 3), (0, 3, 4)])
    for page, old in zip(backend._pages[0], before[0], strict=True):
        assert torch.equal(page[[3, 4]], old[[2, 3]]) and torch.equal(page[:3], old[:3]) and torch.equal(page[5:], old[5:])
    assert all(torch.equal(page, old) for page, old in zip(backend._pages[1], before[1], strict=True))


def test_cudnn_builds_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers share a graph, and so do row counts and chunk lengths that round up to the same."""
    backend, oracle = make("cudnn", [layer(index) for index in range(3)], monkeypatch)
    FakeGraph.built.clear()
    counts = []
    for queries in ([1] * 9, [1] * 10, [3, 5, 30], [64, 2, 2], [1, 1, 40, 2, 2]):
        batch = make_batch(queries, [0] * len(queries), num_groups=1)
        assert_step(backend, oracle, batch, backend.prepare(batch))
        counts.append(len(FakeGraph.built))
    assert counts == [1, 1, 2, 2, 3]


def test_flashinfer_reads_only_pages_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = make("flashinfer", [layer(0, window=6)], monkeypatch)
    step = backend.prepare(make_batch([1, 9], [40, 20], num_groups=1))
    assert [len(table) for table in step.decodes[0].tables] == [3]  # positions 35 .. 40
    assert [len(table) for table in step.chunks[0].tables] == [5]  # the first query sees 15 .. 20, the last one is 28


CUDA = torch.device("cuda")
SITUATION: dict[str, Any] = {
    "layers": [LayerSpec(0, 8, 2, 128, 0.1, None, None, False)],
    "block_size": 16,
    "dtype": torch.bfloat16,
    "device": CUDA,
    "kv_cache_dtype": torch.bfloat16,
}


def situation(**changes: Any) -> AttentionNeeds:
    result = {**SITUATION, **changes}
    if "head_dim" in changes:
        result["layers"] = [LayerSpec(0, 8, 2, result.pop("head_dim"), 0.1, None, None, False)]
    if "window" in changes:
        result["layers"] = [LayerSpec(0, 8, 2, 128, 0.1, result.pop("window"), None, False)]
    result["groups"] = group_layers(result["layers"], result["block_size"], 2)
    return AttentionNeeds(**result)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Hopper card and all packages, as far as anything asks."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("engine.attention.flashinfer._has_nvcc", lambda: True)
    monkeypatch.setattr("engine.attention.pages.HAS_TRITON", True)
    for name, build in PACKAGES.items():
        monkeypatch.setitem(sys.modules, name, build())


SOFTCAP = [LayerSpec(0, 8, 2, 128, 0.1, None, 30.0, False)]
SINKS = [LayerSpec(0, 8, 2, 128, 0.1, None, None, True)]
UNEQUAL = [LayerSpec(0, 8, 2, 128, 0.1, None, None, False), LayerSpec(1, 4, 2, 128, 0.1, None, None, False)]
FOREIGN = ["flash_attention", "cudnn", "flashinfer", "torch_varlen"]
REFUSALS = [
    *[(name, {"device": CPU}, "needs a CUDA device, and this one is cpu") for name in FOREIGN],
    *[(name, {"dtype": torch.float32}, "float16 and bfloat16, not in float32") for name in FOREIGN],
    *[(name, {"kv_cache_dtype": torch.float8_e4m3fn}, "model's dtype, not in float8_e4m3fn") for name in FOREIGN],
    *[(name, {"head_dim": 300}, "no kernel for head size 300") for name in FOREIGN],
    ("flashinfer", {"head_dim": 96}, "no kernel for head size 96"),
    ("flashinfer", {"layers": UNEQUAL}, "differ in heads, scaling or soft cap"),
    *[(name, {"layers": SOFTCAP}, "no soft cap") for name in ("cudnn", "torch_varlen")],
    *[(name, {"layers": SINKS}, "no attention sinks") for name in ("cudnn", "flashinfer", "torch_varlen")],
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("name", "changes", "reason"), REFUSALS, ids=[f"{n}: {r}" for n, _, r in REFUSALS])
def test_what_cannot_be_served_is_refused_with_the_reason(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        choose.choose_backend(name, situation(**changes))
    assert raised.value.param == "attention_backend"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"window": 128}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("name", FOREIGN)
def test_what_can_be_served_is_taken_when_asked_for(name: str, changes: dict[str, Any]) -> None:
    changes = {"kv_cache_dtype": changes.get("dtype", torch.bfloat16), **changes}
    backend, reason = choose.choose_backend(name, situation(**changes))
    assert backend.name == name and reason == "as asked"


MISSING = {
    "flash_attention": (
        "flash_attn_interface",
        "flash-attn-3 is not installed; of version 2, its pages hold a multiple of 256",
    ),
    "cudnn": ("cudnn", "nvidia-cudnn-frontend is not installed"),
    "flashinfer": ("flashinfer", "flashinfer-python is not installed"),
    "torch_varlen": ("flash_attn_interface", "flash-attn-3 is not installed"),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, reason = MISSING[name]
    monkeypatch.delitem(sys.modules, package)
    with pytest.raises(ConfigError, match=reason):
        choose.choose_backend(name, situation())


@pytest.mark.usefixtures("hopper")
def test_version_2_serves_pages_of_256(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    assert choose.choose_backend("flash_attention", situation(block_size=256))[0] is FlashAttentionBackend
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn"))
    with pytest.raises(ConfigError, match="of version 2, the installed module flash_attn has no flash_attn_varlen_func"):
        choose.choose_backend("flash_attention", situation(block_size=256))


@pytest.mark.usefixtures("hopper")
def test_builds_and_machines_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            choose.choose_backend(name, situation())

    sys.modules["cudnn"].backend_version = lambda: 91001  # type: ignore[attr-defined]
    refused("cudnn", "needs cuDNN 91002 or newer, and 91001 is loaded")
    monkeypatch.setattr("engine.attention.flashinfer._has_nvcc", lambda: False)
    refused("flashinfer", "neither nvcc nor flashinfer-jit-cache")
    without_tables = module("flash_attn_interface", flash_attn_with_kvcache=lambda q, k_cache: None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", without_tables)
    refused("flash_attention", "of version 3, this build has no page tables")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key: None)
    refused("torch_varlen", "no block table in varlen_attn; 2.12 and later have one")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 6))
    refused("torch_varlen", "needs compute capability 9.0 or newer, and this card has 8.6")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    refused("cudnn", "needs compute capability 8.0 or newer, and this card has 7.5")


def test_a_package_that_does_not_import_is_refused_with_its_error(
    hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flashinfer.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer")
    with pytest.raises(ConfigError, match=r"flashinfer-python does not import here \(OSError: undefined symbol: _ZN3c10\)"):
        choose.choose_backend("flashinfer", situation())


class OwnKernels:
    """Stands for the Triton backend."""

    name, graphs = "triton", True
    why: str | None = None

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        return cls.why


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch, hopper: None) -> type[OwnKernels]:
    monkeypatch.setitem(choose.BACKENDS, "triton", f"{__name__}:OwnKernels")
    monkeypatch.setattr(OwnKernels, "why", None)
    return OwnKernels


def test_auto_takes_our_own_kernels_on_a_gpu(own_kernels: type[OwnKernels]) -> None:
    backend, reason = choose.choose_backend("auto", situation())
    assert backend is own_kernels and "our own kernels" in reason and "not" not in reason


def test_auto_goes_on_when_they_cannot_serve(own_kernels: type[OwnKernels], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_kernels, "why", "Triton is not installed")
    backend, reason = choose.choose_backend("auto", situation())
    assert backend is FlashAttentionBackend and reason.endswith("; not triton: Triton is not installed")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    backend, reason = choose.choose_backend("auto", situation())
    assert backend is CudnnBackend and "not flash_attention: of version 3, flash-attn-3 is not installed" in reason


def test_auto_on_a_cpu_is_the_compiled_kernels_or_else_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = situation(device=CPU, dtype=torch.float32, kv_cache_dtype=torch.float32)
    monkeypatch.setattr("engine.attention.native.unavailable_reason", lambda: None)
    backend, reason = choose.choose_backend("auto", needs)
    assert backend is NativeBackend and "our own kernels" in reason
    monkeypatch.setattr("engine.attention.native.unavailable_reason", lambda: "no C++ compiler")
    backend, reason = choose.choose_backend("auto", needs)
    assert backend is SdpaBackend and "exact" in reason and reason.endswith("; not native: no C++ compiler")


def test_names_are_checked(own_kernels: type[OwnKernels], monkeypatch: pytest.MonkeyPatch) -> None:
    known = "auto or one of sdpa, native, triton, flash_attention, cudnn, flashinfer, torch_varlen, got 'flash'"
    with pytest.raises(ConfigError, match=known) as raised:
        choose.choose_backend("flash", situation())
    assert raised.value.param == "attention_backend"
    monkeypatch.setattr(own_kernels, "why", "it is off")
    usable = r"attention_backend triton cannot be used: it is off. Usable here: auto, sdpa, flash_attention, cudnn, flashinfer"
    with pytest.raises(ConfigError, match=usable):
        choose.choose_backend("triton", situation())


def test_nothing_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose.BACKENDS, "sdpa", f"{__name__}:OwnKernels")
    monkeypatch.setattr(OwnKernels, "why", "it keeps no FP8")
    monkeypatch.setattr("engine.attention.native.unavailable_reason", lambda: "no compiler")
    with pytest.raises(ConfigError, match="can serve this model on cpu: native: no compiler; sdpa: it keeps no FP8"):
        choose.choose_backend("auto", situation(device=CPU))
