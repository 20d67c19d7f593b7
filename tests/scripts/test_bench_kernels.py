"""The kernel benchmark and the step profile, as far as they go without a GPU: tables from made-up times, and the references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import bench_kernels
import bench_kernels_cases
import profile_steps
import pytest
import torch
from bench_kernels_cases import AttentionBench, Case, HeadShape
from bench_kernels_table import (
    DECODES,
    PREFILLS,
    DecodeCase,
    Goal,
    Row,
    causal_flops,
    decode_row,
    format_table,
    kv_bytes,
    prefill_row,
)

from engine.kernels.compiler import HAS_TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = HeadShape(num_heads=4, num_kv_heads=2, head_dim=16, num_blocks=40, max_blocks=8, max_num_seqs=8)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def decode_case(name: str) -> DecodeCase:
    return next(case for case in DECODES if case.name == name)


def test_a_decode_row_has_the_published_bandwidth_and_its_goals() -> None:
    case = decode_case("decode 64 × 1,536")
    work = kv_bytes(case.lengths, 8, 128)
    row = decode_row(case, work, read_tbps=3.0, on_h100=True)
    row.us, row.error = 158.5, 2e-3
    assert row.rate == pytest.approx(2.54, abs=0.01)
    assert row.goals == (Goal(158.5 * 1.03), Goal(0.85 * 3.0, at_least=True))
    assert row.ratio == 1.0 and row.reached is False  # 2.54 is short of 2.55
    row.us = 150.0
    assert row.reached is True
    row.error = 0.5
    assert row.reached is False


def test_the_ragged_case_is_measured_by_bandwidth() -> None:
    case = decode_case("decode 256 × 64 … 4,096")
    assert len(case.lengths) == 256 and (min(case.lengths), max(case.lengths)) == (64, 4096)
    row = decode_row(case, kv_bytes(case.lengths, 8, 128), None, on_h100=True)
    row.us = row.peer_us
    assert row.rate == pytest.approx(2.91)


def test_prefill_flops_agree_with_the_published_time() -> None:
    work = causal_flops((8192,), (0,), 32, 128)
    row = prefill_row(PREFILLS[0], work, on_h100=True)
    row.us, row.error = row.peer_us, 0.0
    assert row.rate == pytest.approx(632.0) and row.reached is True
    assert causal_flops((2,), (3,), 1, 1) == 4 * (4 + 5)


def test_other_cards_have_no_goals_from_the_h100() -> None:
    assert decode_row(decode_case("decode 1 × 1,024"), 1.0, 4.2, on_h100=False).reached is None
    row = decode_row(decode_case("decode 1 × 32,768"), 1.0, 4.2, on_h100=False)
    assert row.goals == (Goal(0.7 * 4.2, at_least=True),)


def test_the_table() -> None:
    rows = [
        Row("good", 3e8, "TB/s", us=100.0, error=2e-3, tolerance=6e-3, peer="FA3", peer_us=125.0, goals=(Goal(128.75),)),
        Row("slow", 3e8, "TB/s", us=200.0, error=2e-3, tolerance=6e-3, goals=(Goal(2.5, at_least=True),)),
        Row("wrong", 5e11, "TFLOP/s", us=1000.0, error=0.25, tolerance=6e-3),
        Row("nan", 5e11, "TFLOP/s", us=1000.0, error=float("nan"), tolerance=6e-3),
        Row("broken", 1.0, "TB/s", failure="RuntimeError: no", goals=(Goal(1.0),)),
        Row("plan", 0.0, "", us=3.5),
    ]
    assert format_table(rows).splitlines()[2:] == [
        "| good | 100 | 3.00 TB/s | 2.0e-03 | FA3 125 | 0.80 | ≤ 129 µs | yes |",
        "| slow | 200 | 1.50 TB/s | 2.0e-03 | – | – | ≥ 2.5 TB/s | no |",
        "| wrong | 1,000 | 500 TFLOP/s | **2.5e-01: wrong** | – | – | – | – |",
        "| nan | 1,000 | 500 TFLOP/s | **nan: wrong** | – | – | – | – |",
        "| broken | RuntimeError: no | – | – | – | – | ≤ 1 µs | no |",
        "| plan | 3.5 | – | – | – | – | – | – |",
    ]
    assert [row.right for row in rows] == [True, True, False, False, False, True]
    assert json.loads(json.dumps([row.record() for row in rows[:3]]))[0]["goals"] == ["≤ 129 µs"]


def test_a_case_that_fails_is_a_row() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nat all")

    case = Case(Row("x", 1.0, "TB/s"), [broken], start=broken)

    def makes_one_and_breaks() -> Iterator[Case]:
        yield case
        raise ValueError("no memory")

    cases = bench_kernels.compiled({"part": makes_one_and_breaks})
    for made in cases:
        made.measure()
    assert [made.row.failure for made in cases] == ["RuntimeError: no such kernel", "ValueError: no memory"]
    assert not any(made.row.right for made in cases)


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no part 'norms'"):
        bench_kernels.main(["--only", "decode,norms"])
    if not torch.cuda.is_available():
        assert bench_kernels.main(["--only", "decode"]) == 2
        assert "no CUDA GPU" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize(
    ("decodes", "chunks", "contexts"),
    [((40, 1, 17), (), ()), ((), (9, 3), (0, 0)), ((33, 5), (9,), (17,))],
    ids=["decode", "prefill", "mixed"],
)
def test_attention_agrees_with_its_reference(
    decodes: tuple[int, ...], chunks: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    bench = AttentionBench(SMALL, torch.float16, DEVICE)
    case = bench.case(Row("x", 1.0, ""), [bench.batch(decodes, chunks, contexts) for _ in range(2)], 3)
    case.start()
    assert case.check is not None and 0 < case.check() < 2e-3
    assert len(case.calls) == 3 and case.calls[0] is case.calls[2]


@needs_triton
def test_sampling_agrees_with_its_reference() -> None:
    torch.manual_seed(0)
    cases = list(bench_kernels_cases.sampling_cases(3, 2050, torch.float32, DEVICE))
    assert [case.check() for case in cases if case.check is not None] == [0.0] * 3


def test_products_agree_with_their_reference() -> None:
    torch.manual_seed(0)
    memory = torch.randn(4, 48, 32, device=DEVICE)
    (case,) = bench_kernels_cases.product_cases(memory, {"o": (48, 32)}, None, rows=(2,))
    assert len(case.calls) == 4 and case.row.case == "o 48 × 32, 2 rows: by cuBLAS"
    assert case.check is not None and case.check() < 1e-5


@needs_triton
def test_reading_sums_everything() -> None:
    x = torch.randint(-(2**20), 2**20, (5 * 64,), dtype=torch.int32, device=DEVICE)
    sums = torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
    assert bench_kernels_cases._sum_error(lambda: bench_kernels_cases.sum_by_reading(x, sums, 64, 4), x, sums) == 0.0
    x[3] += 1
    assert bench_kernels_cases._sum_error(lambda: None, x, sums) == 1.0


# -- profile_steps ----------------------------------------------------------------------------------------------------


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_idle_time_counts_what_no_stream_covers() -> None:
    trace = {
        "traceEvents": [
            event("b", 10.0, 20.0),
            event("a", 0.0, 8.0),
            event("side", 5.0, 40.0),  # covers the gap of 2 and outlasts b
            event("copy", 47.0, 3.0, "gpu_memcpy"),
            event("a", 60.0, 40.0),
            event("cudaGraphLaunch", 0.0, 500.0, "cuda_runtime"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    works = profile_steps.device_work(trace)
    assert [work.name for work in works] == ["a", "side", "b", "copy", "a"]
    found = profile_steps.occupancy(works)
    assert (found.span, found.idle, found.idle_in_gaps, found.longest_gap, found.num_gaps) == (100.0, 12.0, 10.0, 10.0, 1)
    line = profile_steps.idle_line(found, 256)
    assert "idle 12.00% of 0.1 ms; in 1 gaps of 5 µs or more 10.00%, the longest 10 µs" in line and "missed" in line
    assert "goal" not in profile_steps.idle_line(found, 8)


def test_kernels_are_listed_by_time() -> None:
    works = [
        profile_steps.Work(name, 0.0, us) for name, us in (("a", 10.0), ("b", 50.0), ("a", 20.0), ("c" * 99, 5.0), ("d", 5.0))
    ]
    kernels = profile_steps.by_kernel(works, num_steps=2, span=100.0)
    assert profile_steps.kernel_table(kernels, 2).splitlines()[2:] == [
        "| b | 0.5 | 50.0 | 25 | 50.0% |",
        "| a | 1.0 | 15.0 | 15 | 30.0% |",
        "| 2 others | 1.0 | 5.0 | 5 | 10.0% |",
    ]
    assert f"| {'c' * 71}… |" in profile_steps.kernel_table(kernels, 9)


def test_host_parts_are_medians() -> None:
    steps = [{"launch": 1e-4, "total": 5e-4, "wait": 2e-4}, {"launch": 3e-4, "total": 9e-4}, {"launch": 2e-4, "total": 6e-4}]
    parts = profile_steps.host_parts(steps)
    assert parts["launch"] == pytest.approx(200) and parts["busy"] == pytest.approx(600) and parts["update"] == 0


@pytest.mark.parametrize("mixed", [[], ["--mixed", "2"]], ids=["decodes", "mixed"])
def test_the_host_part_of_a_profile(mixed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "llama-tiny",
        "--device",
        "cpu",
        "--num-seqs",
        "6",
        "--input-len",
        "8",
        "--steps",
        "4",
        "--max-model-len",
        "64",
    ]
    assert profile_steps.main([*arguments, *mixed, "--out", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["ms_per_step"] > 0 and record["host_us_per_step"]["launch"] > 0
    expected = [[3, 10], [3, 3], [4, 11], [4, 4]] if mixed else [[6, 6]] * 4
    assert record["rows_and_tokens"] == expected
    assert "ms a step: 4 steps of" in capsys.readouterr().out


def test_a_profile_needs_a_gpu_or_to_be_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert profile_steps.main(["llama-tiny"]) == 2
        assert "--device cpu" in capsys.readouterr().err
