#!/usr/bin/env python3
"""The GPU kernels by themselves: each checked against its reference, then timed, beside FlashAttention-3, cuBLAS and the goals.

    scripts/bench_kernels.py                                      # all of it, under a minute; needs a CUDA GPU
    scripts/bench_kernels.py --only decode,mixed --out kernels.json

Attention runs as it is served, through the Triton backend with one layer of an 8B model's heads: 32 query and 8 key/value heads
of 128, 16-token pages in random order, keys and values that change from call to call so that none wait in the L2. A time is the
median over replays of a captured graph of calls; the mixed batch, which is not served from a graph, is timed as the backend
launches it, on its two streams. An error is ||result - reference|| / ||reference||; for sampling, the share of tokens that
differ. FlashAttention-3's figures are those of vLLM 0.25.1 on an H100. Ends with 1 where a result is wrong or a case fails, and
with 2 without a GPU; a goal that is missed changes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.attention.base import DeviceRows, LayerSpec, RaggedBatch, group_layers
from engine.attention.triton import TritonBackend
from engine.kernels.compiler import compiling_ahead, tl, triton
from engine.kernels.decode_attention import decode_attention_reference
from engine.kernels.prefill_attention import prefill_attention_reference
from engine.kernels.sampling import SamplingColumns, SamplingWorkspace, sample_tokens, sample_tokens_reference
from engine.kernels.skinny_linear import SkinnyDevice, skinny_linear_reference
from engine.linear import Linear
from engine.philox import WORD_MASK, token_noise

PARTS = ("read", "decode", "prefill", "mixed", "sampling", "skinny")
BLOCK_SIZE = 16
COLD_BYTES = 200e6  # what the calls of a graph read before any of it is read again: several times an L2
ATTENTION_TOLERANCE = 6e-3  # the outputs' own rounding to bfloat16 is 2e-3
PRODUCT_TOLERANCE = 6e-3
SAMPLING_TOLERANCE = 0.02
FA3 = "FA3"


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """Rows of one token each. fa3_us on an H100, or where the lengths were others, the bandwidth it reached there.
    read_share: of the measured read bandwidth, the least to reach."""

    name: str
    lengths: tuple[int, ...]
    fa3_us: float | None = None
    fa3_tbps: float | None = None
    read_share: float | None = None


@dataclass(frozen=True, slots=True)
class PrefillCase:
    """Chunks on top of cached contexts. In TFLOP/s: fa3_tflops on an H100, and the least to reach there."""

    name: str
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    fa3_tflops: float
    least_tflops: float | None = None


_RAGGED = tuple(random.Random(0).sample([64 + (4096 - 64) * i // 255 for i in range(256)], 256))
DECODES = (
    DecodeCase("decode 1 × 1,024", (1024,), 17.7),
    DecodeCase("decode 1 × 8,192", (8192,), 29.8),
    DecodeCase("decode 1 × 32,768", (32768,), 70.1, read_share=0.70),
    DecodeCase("decode 8 × 1,024", (1024,) * 8, 28.0),
    DecodeCase("decode 64 × 640", (640,) * 64, 82.9),
    DecodeCase("decode 64 × 1,536", (1536,) * 64, 158.5, read_share=0.85),
    DecodeCase("decode 256 × 640", (640,) * 256, 255.0),
    DecodeCase("decode 256 × 1,536", (1536,) * 256, 559.0, read_share=0.85),
    DecodeCase("decode 256 × 4,096", (4096,) * 256, 1423.0),
    DecodeCase("decode 256 × 64 … 4,096", _RAGGED, fa3_tbps=2.91),
)
PREFILLS = (
    PrefillCase("prefill 8,192", (8192,), (0,), 632.0, least_tflops=500.0),
    PrefillCase("prefill 16 × 512", (512,) * 16, (0,) * 16, 273.0),
    PrefillCase("prefill 2,048 on 14,336", (2048,), (14336,), 602.0),
)
MIXED_DECODES, MIXED_CHUNKS, MIXED_CONTEXTS = (1024,) * 200, (512,) * 4, (2048,) * 4
MIXED_FA3_US = 413.0
SLOWER_THAN_FA3 = 1.03  # what no decode case may exceed
READ_TBPS_H100 = 3.03
READ_ELEMENTS = 1 << 30  # int32: 4.3 GB
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (128256, 4096)}
PRODUCT_ROWS = (1, 8, 16)
SAMPLED_ROWS, VOCAB_SIZE = 128, 131072


# -- figures and tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """At most so many microseconds, or at least so much of the row's unit."""

    value: float
    at_least: bool = False

    def text(self, unit: str) -> str:
        return f"≥ {number(self.value)} {unit}" if self.at_least else f"≤ {number(self.value)} µs"

    def reached(self, us: float, rate: float) -> bool:
        return rate >= self.value if self.at_least else us <= self.value


@dataclass(slots=True)
class Row:
    """One line of the table. work: bytes read or operations done in `us`; unit: of the rate, "" where there is none that means
    something. error: None where nothing is to be checked. peer: whose time stands beside ours. failure: what went wrong."""

    case: str
    work: float
    unit: str
    us: float | None = None
    error: float | None = None
    tolerance: float = 0.0
    peer: str = ""
    peer_us: float | None = None
    goals: tuple[Goal, ...] = ()
    failure: str = ""

    @property
    def rate(self) -> float | None:
        """In tera-units a second."""
        return None if self.us is None or not self.unit else self.work / self.us / 1e6

    @property
    def ratio(self) -> float | None:
        """Of our time to the peer's: below 1 we are the faster."""
        return None if self.us is None or self.peer_us is None else self.us / self.peer_us

    @property
    def right(self) -> bool:
        return not self.failure and (self.error is None or self.error <= self.tolerance)

    @property
    def reached(self) -> bool | None:
        """None without a goal. A wrong result reaches none."""
        if not self.goals:
            return None
        return self.right and self.us is not None and all(goal.reached(self.us, self.rate or 0.0) for goal in self.goals)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        derived = {"rate": self.rate, "ratio": self.ratio, "right": self.right, "reached": self.reached}
        return {**asdict(self), "goals": [goal.text(self.unit) for goal in self.goals], **derived}


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def format_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    columns = ("case", "µs", "rate", "error", "beside, µs", "ratio", "goal", "reached")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        error = "–" if row.error is None else f"{row.error:.1e}" if row.error else "0"
        cells = [
            row.case,
            row.failure or (number(row.us) if row.us is None or row.us >= 100 else f"{row.us:.1f}"),
            "–" if row.rate is None else f"{row.rate:.2f} {row.unit}" if row.rate < 100 else f"{row.rate:.0f} {row.unit}",
            error if row.right else f"**{error}: wrong**" if row.error is not None else error,
            "–" if row.peer_us is None else f"{row.peer} {number(row.peer_us)}",
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            ", ".join(goal.text(row.unit) for goal in row.goals) or "–",
            {True: "yes", False: "no", None: "–"}[row.reached],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kv_bytes(lengths: Sequence[int], num_kv_heads: int, head_dim: int) -> float:
    """What a decode must read: keys and values in 16 bits."""
    return float(sum(lengths) * num_kv_heads * head_dim * 2 * 2)


def causal_flops(chunks: Sequence[int], contexts: Sequence[int], num_heads: int, head_dim: int) -> float:
    """Multiplications and additions of both products over the pairs of query and key that a causal mask leaves."""
    pairs = sum(n * c + n * (n + 1) // 2 for n, c in zip(chunks, contexts, strict=True))
    return 4.0 * num_heads * head_dim * pairs


def decode_row(case: DecodeCase, work: float, read_tbps: float | None, on_h100: bool) -> Row:
    """The case's goals: FlashAttention-3's time where it was measured, and a share of the bandwidth measured here."""
    fa3_us = case.fa3_us if case.fa3_us is not None else work / case.fa3_tbps / 1e6 if case.fa3_tbps is not None else None
    goals = []
    if fa3_us is not None and on_h100:
        goals.append(Goal(fa3_us * SLOWER_THAN_FA3))
    if case.read_share is not None and read_tbps is not None:
        goals.append(Goal(case.read_share * read_tbps, at_least=True))
    return Row(case.name, work, "TB/s", tolerance=ATTENTION_TOLERANCE, peer=FA3, peer_us=fa3_us, goals=tuple(goals))


def prefill_row(case: PrefillCase, work: float, on_h100: bool) -> Row:
    goals = (Goal(case.least_tflops, at_least=True),) if case.least_tflops is not None and on_h100 else ()
    peer_us = work / case.fa3_tflops / 1e6
    return Row(case.name, work, "TFLOP/s", tolerance=ATTENTION_TOLERANCE, peer=FA3, peer_us=peer_us, goals=goals)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


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
            row.failure = _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


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
    memory: torch.Tensor, shapes: dict[str, tuple[int, int]], skinny: SkinnyDevice | None, rows: Sequence[int] = PRODUCT_ROWS
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


# -- all of it --------------------------------------------------------------------------------------------------------


def measure(parts: Sequence[str], device: torch.device) -> tuple[list[Row], float | None]:
    """The table's rows, and the read bandwidth in TB/s where it was measured."""
    properties: Any = torch.cuda.get_device_properties(device)
    on_h100 = "H100" in properties.name
    bench = AttentionBench(HeadShape(), torch.bfloat16, device)
    rows: list[Row] = []
    read_tbps = None
    if "read" in parts:
        readers = compiled({"read": partial(read_cases, READ_ELEMENTS, properties.multi_processor_count, device)})
        for case in readers:
            case.measure()
        best = max((case.row for case in readers), key=lambda row: row.rate or 0.0)
        read_tbps = best.rate
        rows.append(best)
        del readers, case
    makers: dict[str, Callable[[], Iterator[Case]]] = {
        "decode": partial(bench.decode_cases, read_tbps, on_h100),
        "prefill": partial(bench.prefill_cases, on_h100),
        "mixed": partial(bench.mixed_cases, on_h100),
        "sampling": partial(sampling_cases, SAMPLED_ROWS, VOCAB_SIZE, torch.bfloat16, device),
        "skinny": partial(product_cases, bench.pages[0], PRODUCTS, SkinnyDevice.of(device)),
    }
    for case in compiled({part: make for part, make in makers.items() if part in parts}):
        case.measure()
        rows.append(case.row)
    return rows, read_tbps


def compiled(makers: dict[str, Callable[[], Iterator[Case]]]) -> list[Case]:
    """The parts' cases, with their kernels compiled side by side. A part that cannot be set up is a failed case."""
    cases: list[Case] = []
    with compiling_ahead():
        for part, make in makers.items():
            try:
                for case in make():
                    cases.append(case)
                    with suppress(Exception):  # what does not compile fails again when it is measured
                        case.calls[0]()
            except Exception as error:
                cases.append(Case(Row(part, 0.0, "", failure=_first_line(error)), []))
    return cases


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    parts = [part.strip() for part in args.only.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("bench_kernels: torch finds no CUDA GPU here, and there is nothing to measure without one", file=sys.stderr)
        return 2
    started = time.monotonic()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows, read_tbps = measure(parts, torch.device("cuda", torch.cuda.current_device()))
    seconds = round(time.monotonic() - started, 1)
    software = f"torch {torch.__version__}, triton {triton.__version__}"
    card = torch.cuda.get_device_name()
    print(f"Kernels on {card}, {software}, {seconds} s\n\n{format_table(rows)}", flush=True)
    if args.out is not None:
        record = {"gpu": card, "software": software, "seconds": seconds, "read_tbps": read_tbps}
        text = json.dumps({**record, "rows": [row.record() for row in rows]}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
