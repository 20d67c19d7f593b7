"""What bench_kernels.py measures: how a case is timed and checked, and the cases: reading, attention, sampling, products."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bench_kernels_table import (
    ATTENTION_TOLERANCE,
    DECODES,
    FA3,
    PREFILLS,
    Goal,
    Row,
    causal_flops,
    decode_row,
    kv_bytes,
    number,
    prefill_row,
)
from torch.nn import functional as F

from engine.attention.base import DeviceRows, LayerSpec, RaggedBatch, group_layers
from engine.attention.triton import TritonBackend
from engine.kernels.compiler import tl, triton
from engine.kernels.decode_attention import decode_attention_reference
from engine.kernels.prefill_attention import prefill_attention_reference
from engine.kernels.sampling import SamplingColumns, SamplingWorkspace, sample_tokens, sample_tokens_reference
from engine.kernels.skinny_linear import SkinnyDevice, skinny_linear_reference
from engine.linear import Linear
from engine.philox import WORD_MASK, token_noise

BLOCK_SIZE = 16
COLD_BYTES = 200e6  # what the calls of a graph read before any of it is read again: several times an L2
PRODUCT_TOLERANCE = 6e-3
SAMPLING_TOLERANCE = 0.02
READ_TBPS_H100 = 3.03
MIXED_DECODES, MIXED_CHUNKS, MIXED_CONTEXTS = (1024,) * 200, (512,) * 4, (2048,) * 4
MIXED_FA3_US = 413.0


# -- timing -----------------------------------------------------------------------------------------------------------


def times_to_call(num_bytes: float, most: int = 40) -> int:
    """Calls on different memory that read COLD_BYTES together."""
    return max(1, min(most, math.ceil(COLD_BYTES / num_bytes)))


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Microseconds a call, from a graph of them all: the median replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _median_us(graph.replay, replays) / len(calls)


def queued_us(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Microseconds a call of calls that no graph holds, queued while the device sleeps, so that it waits for no host."""

    def run() -> None:
        for call in calls:
            call()

    run()
    return _median_us(run, repeats, head_start_cycles=20_000_000) / len(calls)


def _median_us(run: Callable[[], object], repeats: int, head_start_cycles: int = 0) -> float:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if head_start_cycles:
            torch.cuda._sleep(head_start_cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return float(statistics.median(times))


@dataclass(slots=True)
class Case:
    """What fills a row. start: to be called before the others, since cases share workspaces; calls: the same work on different
    memory; check: the error of one call; peer: calls that do the same by other means; in_graph: whether a graph holds them."""

    row: Row
    calls: Sequence[Callable[[], object]]
    start: Callable[[], object] = lambda: None
    check: Callable[[], float] | None = None
    peer: Sequence[Callable[[], object]] = ()
    peer_is_goal: bool = False
    in_graph: bool = True
    peer_in_graph: bool = True

    def measure(self) -> None:
        row = self.row
        if row.failure:
            return
        try:
            self.start()
            if self.check is not None:
                row.error = self.check()
            row.us = (graph_us if self.in_graph else queued_us)(self.calls)
            if self.peer:
                row.peer_us = (graph_us if self.peer_in_graph else queued_us)(self.peer)
                if self.peer_is_goal:
                    row.goals = (Goal(row.peer_us),)
        except Exception as error:
            row.failure = first_line(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


# -- read bandwidth ---------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum_kernel(x_ptr, sums_ptr, num_tiles, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32, modulo 2 ** 32. Programs take tiles in turn, so that all read close to each other."""
    total = tl.zeros([TILE], tl.int32)
    lanes = tl.arange(0, TILE)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        total += tl.load(x_ptr + tile * TILE + lanes)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


def sum_by_reading(x: torch.Tensor, sums: torch.Tensor, tile: int, num_warps: int) -> None:
    """Sums of int32 x, of fewer than 2 ** 31 elements in whole tiles, one a program, into int32 `sums`."""
    _sum_kernel[(sums.numel(),)](x, sums, x.numel() // tile, TILE=tile, num_warps=num_warps)


def read_cases(num_elements: int, num_sms: int, device: torch.device) -> Iterator[Case]:
    """A kernel that does nothing but read; which of its forms is the fastest differs from card to card."""
    x = torch.empty(num_elements, dtype=torch.int32, device=device).random_()
    for tile, num_warps, programs in ((4096, 4, 4), (8192, 8, 4), (4096, 8, 8), (16384, 8, 2)):
        sums = torch.zeros(num_sms * programs, dtype=torch.int32, device=x.device)
        row = Row(f"read {number(x.numel() * 4 / 1e9)} GB, {programs} × {tile}", x.numel() * 4.0, "TB/s", tolerance=0.0)
        row.peer, row.peer_us = "H100", row.work / READ_TBPS_H100 / 1e6
        call = partial(sum_by_reading, x, sums, tile, num_warps)
        yield Case(row, [call], check=partial(_sum_error, call, x, sums))


def _sum_error(call: Callable[[], None], x: torch.Tensor, sums: torch.Tensor) -> float:
    call()
    wanted = sum(int(part.sum(dtype=torch.int64)) for part in x.split(1 << 28))
    return float((int(sums.sum(dtype=torch.int64)) - wanted) % 2**32 != 0)


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of one layer: the 8B model's unless given."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_blocks: int = 65536
    max_blocks: int = 2048  # entries of a block table
    max_num_seqs: int = 256


class AttentionBench:
    """A backend with one layer, and pages full of noise."""

    def __init__(self, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> None:
        layer = LayerSpec(0, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim**-0.5, None, None, False)
        groups = group_layers([layer], BLOCK_SIZE, dtype.itemsize)
        self.shape = shape
        self.dtype, self.device = dtype, device
        self.scaling = layer.scaling
        self.backend = TritonBackend([layer], groups, BLOCK_SIZE, dtype, device, max_num_seqs=shape.max_num_seqs)
        self.backend.allocate([shape.num_blocks])
        self.pages = self.backend._pages[0]
        for pages in self.pages:
            pages.normal_()

    def batch(self, decodes: Sequence[int], chunks: Sequence[int] = (), contexts: Sequence[int] = ()) -> RaggedBatch:
        """Decodes of so many tokens, the current one included, then chunks on contexts; pages in random order, none twice."""
        query_lens = [1] * len(decodes) + list(chunks)
        context_lens = [length - 1 for length in decodes] + list(contexts)
        seq_lens = [n + c for n, c in zip(query_lens, context_lens, strict=True)]
        num_pages = torch.tensor([-(-length // BLOCK_SIZE) for length in seq_lens], device=self.device)
        table = torch.zeros(len(seq_lens), self.shape.max_blocks, dtype=torch.int32, device=self.device)
        used = torch.arange(self.shape.max_blocks, device=self.device)[None] < num_pages[:, None]
        table[used] = (torch.randperm(self.shape.num_blocks, device=self.device)[: int(num_pages.sum())] + 1).int()
        positions = [torch.arange(c, c + n) for n, c in zip(query_lens, context_lens, strict=True)]
        slots = torch.arange(len(seq_lens), dtype=torch.int32, device=self.device)
        rows = DeviceRows(
            block_tables=(table,),
            row_slots=slots,
            seq_lens=self._ints(seq_lens),
            context_lens=self._ints(context_lens),
            query_starts=self._ints([0, *itertools.accumulate(query_lens)]),
            positions=torch.cat(positions).int().to(self.device),
            token_slots=torch.repeat_interleave(slots, torch.tensor(query_lens, device=self.device)),
            num_decodes=len(decodes),
        )
        return RaggedBatch(query_lens, context_lens, (), rows)

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def case(self, row: Row, batches: Sequence[RaggedBatch], num_calls: int, *, in_graph: bool = True) -> Case:
        """batches: of the same lengths, each with pages of its own; they share a plan, made by `start`."""
        heads, kv_heads, head_dim = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        num_tokens = sum(batches[0].query_lens)
        merged = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim, device=self.device).to(self.dtype)
        q, k, v = merged.split([heads, kv_heads, kv_heads], dim=1)
        out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
        steps = [self.backend.prepare(batch) for batch in batches]
        calls = [partial(self.backend.attend, 0, q, k, v, step, out_THD=out) for step in steps]

        def check() -> float:
            out.fill_(float("nan"))
            calls[0]()
            return relative_error(out, self.reference(q, k, v, batches[0]))

        return Case(
            row,
            [calls[i % len(calls)] for i in range(num_calls)],
            start=partial(self.backend.prepare, batches[0]),
            check=check,
            in_graph=in_graph,
        )

    def reference(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        """float32 [T, H, D]."""
        rows = batch.device
        assert rows is not None
        num, table = rows.num_decodes, rows.block_tables[0]
        out = torch.full(q.shape, float("nan"), device=q.device)
        if num:
            lengths = rows.seq_lens[:num]
            out[:num] = decode_attention_reference(
                q[:num], *self.pages, table, rows.row_slots[:num], lengths, scaling=self.scaling
            )
        if len(batch.query_lens) > num:
            prefill_attention_reference(
                q,
                k,
                v,
                *self.pages,
                table,
                rows.row_slots[num:],
                rows.query_starts[num:],
                rows.context_lens[num:],
                out,
                scaling=self.scaling,
            )
        return out

    def decode_cases(self, read_tbps: float | None, on_h100: bool) -> Iterator[Case]:
        for case in DECODES:
            work = kv_bytes(case.lengths, self.shape.num_kv_heads, self.shape.head_dim)
            count = times_to_call(work)
            batches = [self.batch(case.lengths) for _ in range(count)]
            yield self.case(decode_row(case, work, read_tbps, on_h100), batches, max(count, 4))
        batch = self.batch((BLOCK_SIZE,) * self.shape.max_num_seqs)  # a plan takes as long whatever the lengths
        yield Case(Row("plan of 256 decodes, once a step", 0.0, ""), [partial(self.backend.prepare, batch)] * 20)

    def prefill_cases(self, on_h100: bool) -> Iterator[Case]:
        for case in PREFILLS:
            work = causal_flops(case.chunks, case.contexts, self.shape.num_heads, self.shape.head_dim)
            yield self.case(prefill_row(case, work, on_h100), [self.batch((), case.chunks, case.contexts)], 8)

    def mixed_cases(self, on_h100: bool) -> Iterator[Case]:
        shape = self.shape
        mixed = Row("mixed: 200 decodes at 1,024, 4 chunks of 512 at 2,048", 0.0, "", tolerance=ATTENTION_TOLERANCE)
        mixed.peer, mixed.peer_us = FA3, MIXED_FA3_US
        mixed.goals = (Goal(MIXED_FA3_US),) if on_h100 else ()
        yield self.case(mixed, [self.batch(MIXED_DECODES, MIXED_CHUNKS, MIXED_CONTEXTS)], 10, in_graph=False)
        work = kv_bytes(MIXED_DECODES, shape.num_kv_heads, shape.head_dim)
        alone = Row("its decodes alone", work, "TB/s", tolerance=ATTENTION_TOLERANCE)
        yield self.case(alone, [self.batch(MIXED_DECODES)], 10, in_graph=False)
        work = causal_flops(MIXED_CHUNKS, MIXED_CONTEXTS, shape.num_heads, shape.head_dim)
        alone = Row("its chunks alone", work, "TFLOP/s", tolerance=ATTENTION_TOLERANCE)
        yield self.case(alone, [self.batch((), MIXED_CHUNKS, MIXED_CONTEXTS)], 10, in_graph=False)


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling_cases(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Beside them, what torch has for a part of the work: argmax, and for top_p the sort that it would begin with."""
    work = float(num_rows * vocab_size * dtype.itemsize)
    logits = [torch.randn(num_rows, vocab_size, device=device).to(dtype) for _ in range(times_to_call(work))]
    slots = torch.randperm(num_rows, device=device).int()
    out, last = (torch.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(2))
    workspace = SamplingWorkspace.create(num_rows, vocab_size, device)
    name = f"sampling {num_rows} × {vocab_size:,}"
    for mode, title, temperature, top_p in (
        ("greedy", "greedy", 0.0, 1.0),
        ("random", "temperature", 0.8, 1.0),
        ("filtered", "top_p 0.95", 0.8, 0.95),
    ):
        columns = SamplingColumns.create(num_rows, device)
        columns.temperature.fill_(temperature)
        columns.top_p.fill_(top_p)
        columns.seed.random_()
        calls = [partial(sample_tokens, part, slots, columns, out, last, workspace=workspace, mode=mode) for part in logits]
        row = Row(f"{name}, {title}", work, "TB/s", tolerance=SAMPLING_TOLERANCE)
        check = partial(_share_of_other_tokens, calls[0], logits[0], slots, columns, out)
        case = Case(row, calls, check=check)
        if mode == "greedy":
            row.peer, case.peer = "argmax", [partial(torch.argmax, part, dim=-1) for part in logits]
        elif mode == "filtered":
            row.peer, case.peer_in_graph = "sort alone", False
            case.peer = [partial(torch.sort, part, dim=-1, descending=True) for part in logits]
        yield case


def _share_of_other_tokens(
    call: Callable[[], object], logits: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, out: torch.Tensor
) -> float:
    """Of the tokens drawn, those that the reference with the same noise does not draw."""
    rows = slots.long()
    groups = torch.arange(-(-logits.shape[1] // 4), device=logits.device)
    seed = columns.seed[rows][:, None]
    index = columns.output_index[rows][:, None].long()
    noise = token_noise(groups, index, (seed & WORD_MASK, seed >> 32 & WORD_MASK)).flatten(1)[:, : logits.shape[1]]
    params = (columns.temperature[rows], columns.top_k[rows], columns.top_p[rows], columns.min_p[rows])
    wanted = sample_tokens_reference(logits, noise, *params)
    out.fill_(-1)
    call()
    return float((out != wanted).double().mean())


# -- products ---------------------------------------------------------------------------------------------------------


def product_cases(
    memory: torch.Tensor, shapes: dict[str, tuple[int, int]], skinny: SkinnyDevice | None, rows: Sequence[int]
) -> Iterator[Case]:
    """Linears of N outputs and E inputs by name, as served; the weights are in `memory`, one after another."""
    for (name, (num_outputs, num_inputs)), num_rows in itertools.product(shapes.items(), rows):
        size = num_outputs * num_inputs
        count = min(times_to_call(2.0 * size), memory.numel() // size)
        weights = memory.view(-1)[: count * size].view(count, num_outputs, num_inputs)
        linears = [Linear(weight, None, (name,)) for weight in weights]
        for linear in linears:
            linear.use_skinny(skinny)
        x = torch.randn(num_rows, num_inputs, device=memory.device).to(memory.dtype)
        out = torch.full((num_rows, num_outputs), float("nan"), dtype=memory.dtype, device=memory.device)
        beaten = linears[0].fuses(num_rows)
        title = f"{name} {num_outputs:,} × {num_inputs:,}, {num_rows} row{'s' if num_rows > 1 else ''}"
        row = Row(title if beaten else f"{title}: by cuBLAS", 2.0 * size, "TB/s", tolerance=PRODUCT_TOLERANCE, peer="cuBLAS")
        yield Case(
            row,
            [partial(linear, x, out=out) for linear in linears],
            check=partial(_product_error, linears[0], x, out),
            peer=[partial(F.linear, x, weight) for weight in weights],
            peer_is_goal=beaten,
        )


def _product_error(linear: Linear, x: torch.Tensor, out: torch.Tensor) -> float:
    out.fill_(float("nan"))
    linear(x, out=out)
    return relative_error(out, skinny_linear_reference(x.float(), linear.weight))
