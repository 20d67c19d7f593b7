"""The GPU benchmark at its smallest size, on whatever device there is: that everything is sent, counted and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_gpu
import dummy_model
import pytest
from bench_gpu_serving import by_second, phases, short_figures, steady_after
from bench_gpu_workloads import BY_DEFAULT, LLAMA_8B, MODELS
from bench_serving import WORDS, Sample, summarize

from engine.tokenizer import Tokenizer

SMALL_SERVER = "--device cpu --num-threads 1 --max-model-len 1k --kv-cache-memory-bytes 16M"


def test_the_whole_of_it_with_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "llama-tiny", "--out", str(tmp_path), "--skip", "check,kernels", "--settle", "0"]
    arguments += ["--processes", "1", "--server-args", SMALL_SERVER]
    assert bench_gpu.main(arguments) == 0
    record = json.loads((tmp_path / "bench_gpu.json").read_text())
    measured = record["models"]["llama-tiny"]
    assert measured["startup"]["ready_s"] > 0 and "load" in measured["startup"]["phases"]
    assert sum(point["output_tps"] for point in measured["startup"]["by_second"]) == pytest.approx(16 * 16)
    workloads = {workload.name: workload for workload in MODELS["llama-tiny"].workloads}
    assert set(measured["workloads"]) == set(workloads)
    for name, workload in workloads.items():
        summary = measured["workloads"][name]["summary"]
        assert (summary["num_ok"], summary["num_errors"]) == (workload.num_requests, 0)
        assert summary["output_tokens"] == workload.num_requests * workload.output_len
        assert summary["prompt_tokens"] == workload.num_requests * (workload.input_len + workload.shared_prefix_len)
    assert measured["workloads"]["shared-prefix"]["summary"]["cached_tokens"] > 0
    assert measured["workloads"]["poisson"]["summary"]["cached_tokens"] == 0
    tables = (tmp_path / "bench_gpu.md").read_text()
    assert "| single: 1 at once × 2, 16 / 8 | Octavo |" in tables and "ready after" in tables
    assert tables in capsys.readouterr().out
    assert "load:" in (tmp_path / "llama-tiny.log").read_text()


def test_a_server_that_fails_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "llama-tiny", "--out", str(tmp_path), "--skip", "check,kernels", "--server-args", "--prot 1"]
    assert bench_gpu.main(arguments) == 1
    assert "did you mean --port" in json.loads((tmp_path / "bench_gpu.json").read_text())["models"]["llama-tiny"]["error"]
    assert "**Failed:**" in capsys.readouterr().out


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no model 'llama-9b'"):
        bench_gpu.main(["--models", "llama-9b", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no workload 'c2'"):
        bench_gpu.main(["--workloads", "c2", "--out", str(tmp_path)])


def test_parts_that_are_absent_or_fail_do_not_stop_the_rest(tmp_path: Path) -> None:
    assert bench_gpu.run_part(tmp_path / "gone", tmp_path / "log") == {"absent": True}
    script = tmp_path / "check"
    script.write_text("#!/bin/sh\necho all wrong\nexit 3\n")
    script.chmod(0o755)
    result = bench_gpu.run_part(script, tmp_path / "log")
    assert (result["exit_code"], result["output"]) == (3, "all wrong\n")


@pytest.mark.parametrize(
    ("gpu", "vllm", "goal"), [("NVIDIA H100 80GB HBM3", "9,061", "9,900"), ("NVIDIA H200", "9,643", "10,600")]
)
def test_the_tables_compare_with_the_same_card(gpu: str, vllm: str, goal: str) -> None:
    tables = bench_gpu.format_tables(record_of(gpu))
    assert f"| vLLM 0.25.1 | {vllm} |" in tables
    assert f"| c256, output tok/s | {vllm} | ≥ {goal} | 10,000 | {'yes' if 'H100' in gpu else 'no'} |" in tables
    assert "| c256, ITL p99 ms | " in tables and "| ≤ 60.0 | 50.0 | yes |" in tables


def test_another_card_has_nothing_to_compare_with() -> None:
    tables = bench_gpu.format_tables(record_of("NVIDIA A100"))
    assert "vLLM" not in tables and "| 10,000 |" in tables


def record_of(gpu: str) -> dict[str, Any]:
    found = {"output_tps": 10_000.0, "total_tps": 30_000.0, "itl_p99": 50.0}
    entry = {"load": "256 at once", "figures": found, "summary": {"num_errors": 0}}
    startup = {"ready_s": 15.0, "phases": {"load": 1.0}}
    return {"machine": {"gpu": gpu}, "models": {"llama-3.1-8b": {"startup": startup, "workloads": {"c256": entry}}}}


def test_quick_keeps_the_streams_full() -> None:
    quick = {workload.name: workload.quick() for workload in LLAMA_8B.workloads}
    assert (quick["single"].num_requests, quick["c256"].num_requests, quick["c32"].num_requests) == (1, 256, 32)
    assert quick["poisson20"].num_requests == 100


def test_seconds_and_steady_state() -> None:
    samples = [
        Sample(start=10.0, end=13.0, chunk_times=[10.5, 11.5, 11.75, 12.0], output_tokens=8),
        Sample(start=10.0, error="x"),
    ]
    curve = by_second(samples, 10.0)
    assert [point["output_tps"] for point in curve] == [2.0, 4.0, 2.0]
    assert [point["itl_p50_ms"] for point in curve] == [0.0, 625.0, 250.0]
    assert by_second([], 0.0) == []
    points = [{"output_tps": rate} for rate in (10.0, 50.0, 100.0, 95.0, 100.0, 100.0, 40.0)]
    assert steady_after(points, window=2) == 2
    assert steady_after(points[:1], window=2) is None


def test_phases_by_the_lines_that_begin_them() -> None:
    lines = [
        (1.0, "22:05:45 INFO    start the engine"),
        (3.0, "22:05:47 INFO    load: x as y"),
        (3.5, "a warning"),
        (9.0, "22:05:53 INFO  z"),
    ]
    assert phases(lines, 4.0) == {"until the first line": 1.0, "start the engine": 2.0, "load": 1.0}
    assert phases([], 4.0) == {}


def test_figures_that_were_not_seen_are_left_out() -> None:
    summary = summarize([Sample(start=0.0, end=1.0, chunk_times=[0.5], prompt_tokens=3, output_tokens=1)])
    assert short_figures(summary) == {"output_tps": 1.0, "total_tps": 4.0, "ttft_p50": 500.0, "ttft_p99": 500.0}


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_prompts_have_a_token_a_word(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dummy_model.SHAPES, name, dummy_model.SHAPES[name] | {"vocab_size": 2000})  # quick to write
    tokenizer = Tokenizer.load(dummy_model.write_model(name, tmp_path))
    assert len(tokenizer.encode(" ".join(WORDS))) == len(WORDS)
    assert tokenizer.vocab_size == 2000
