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
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_kernels_cases import AttentionBench, Case, HeadShape, first_line, product_cases, read_cases, sampling_cases
from bench_kernels_table import Row, format_table

from engine.kernels.compiler import compiling_ahead, triton
from engine.kernels.skinny_linear import SkinnyDevice

PARTS = ("read", "decode", "prefill", "mixed", "sampling", "skinny")
READ_ELEMENTS = 1 << 30  # int32: 4.3 GB
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (128256, 4096)}
PRODUCT_ROWS = (1, 8, 16)
SAMPLED_ROWS, VOCAB_SIZE = 128, 131072


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
        "skinny": partial(product_cases, bench.pages[0], PRODUCTS, SkinnyDevice.of(device), PRODUCT_ROWS),
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
                cases.append(Case(Row(part, 0.0, "", failure=first_line(error)), []))
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
