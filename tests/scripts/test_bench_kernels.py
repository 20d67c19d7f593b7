"""The kernel benchmark and the step profile, as far as they go without a GPU: tables from made-up times, and the references."""

from __future__ import annotations

import json

import bench_kernels
import pytest
import torch
from bench_kernels import DECODES, PREFILLS, AttentionBench, Case, Goal, HeadShape, Row, format_table

from engine.kernels.compiler import HAS_TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = HeadShape(num_heads=4, num_kv_heads=2, head_dim=16, num_blocks=40, max_blocks=8, max_num_seqs=8)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def decode_case(name: str) -> bench_kernels.DecodeCase:
    return next(case for case in DECODES if case.name == name)


def test_a_decode_row_has_the_published_bandwidth_and_its_goals() -> None:
    case = decode_case("decode 64 × 1,536")
    work = bench_kernels.kv_bytes(case.lengths, 8, 128)
    row = bench_kernels.decode_row(case, work, read_tbps=3.0, on_h100=True)
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
    row = bench_kernels.decode_row(case, bench_kernels.kv_bytes(case.lengths, 8, 128), None, on_h100=True)
    row.us = row.peer_us
    assert row.rate == pytest.approx(2.91)


def test_prefill_flops_agree_with_the_published_time() -> None:
    work = bench_kernels.causal_flops((8192,), (0,), 32, 128)
    row = bench_kernels.prefill_row(PREFILLS[0], work, on_h100=True)
    row.us, row.error = row.peer_us, 0.0
    assert row.rate == pytest.approx(632.0) and row.reached is True
    assert bench_kernels.causal_flops((2,), (3,), 1, 1) == 4 * (4 + 5)


def test_other_cards_have_no_goals_from_the_h100() -> None:
    assert bench_kernels.decode_row(decode_case("decode 1 × 1,024"), 1.0, 4.2, on_h100=False).reached is None
    row = bench_kernels.decode_row(decode_case("decode 1 × 32,768"), 1.0, 4.2, on_h100=False)
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
    case.measure()
    assert case.row.failure == "RuntimeError: no such kernel" and not case.row.right


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
    cases = list(bench_kernels.sampling_cases(3, 2050, torch.float32, DEVICE))
    assert [case.check() for case in cases if case.check is not None] == [0.0] * 3


def test_products_agree_with_their_reference() -> None:
    torch.manual_seed(0)
    memory = torch.randn(4, 48, 32, device=DEVICE)
    (case,) = bench_kernels.product_cases(memory, {"o": (48, 32)}, None, rows=(2,))
    assert len(case.calls) == 4 and case.row.case == "o 48 × 32, 2 rows: by cuBLAS"
    assert case.check is not None and case.check() < 1e-5


@needs_triton
def test_reading_sums_everything() -> None:
    x = torch.randint(-(2**20), 2**20, (5 * 64,), dtype=torch.int32, device=DEVICE)
    sums = torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
    assert bench_kernels._sum_error(lambda: bench_kernels.sum_by_reading(x, sums, 64, 4), x, sums) == 0.0
    x[3] += 1
    assert bench_kernels._sum_error(lambda: None, x, sums) == 1.0
