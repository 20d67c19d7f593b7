"""The comparison with peers: command lines, ratios and tables, and a whole run against servers that only pretend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_peers
import bench_peers_report
import pytest
from bench_gpu_workloads import Workload
from bench_peers_report import compare, format_figures, format_ratios, format_report, pick, speed_ratio
from bench_peers_servers import SERVERS, Command, NotInstalled, Setup, command_of, precision_of
from bench_process import ROOT, free_port, running
from bench_serving import Sample

FAKE_SERVER = """
import asyncio, signal, sys
from tests.scripts.fake_sse_server import FakeServer

class Ready(FakeServer):
    async def answer(self, path, body, writer):
        if path == "/health":
            return self.send(writer, 200, {})
        return await super().answer(path, body, writer)

async def main():
    server = Ready()
    port = int(sys.argv[1])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: sys.exit(0))
    async with await asyncio.start_server(server.serve, "127.0.0.1", port) as listening:
        await listening.serve_forever()

asyncio.run(main())
"""


def setup_of(folder: Path, **paths: Any) -> Setup:
    return Setup(model=str(folder), model_folder=folder, cpus=(0, 1), **paths)


def entry(tpot: float = 10.0, output: float = 100.0, num_errors: int = 0) -> dict[str, Any]:
    figures = {"tpot_p50": tpot, "output_tps": output, "total_tps": 2 * output}
    return {"figures": figures, "num_errors": num_errors}


def record_of(**servers: Any) -> dict[str, Any]:
    workloads = dict.fromkeys(("c1", "c8"), "said")
    named = {name.replace("_", "-", 1): {"workloads": found} for name, found in servers.items()}
    return {"machine": {"machine": "m"}, "num_rounds": 2, "workloads": workloads, "servers": named}


def test_every_server_has_a_precision_that_can_be_compared() -> None:
    assert {precision_of(name) for name in SERVERS} == {"bf16", "int8", "float32"}
    assert precision_of("llama-q8_0") == precision_of("octavo-int8")


def test_ours_is_started_from_this_checkout(tmp_path: Path) -> None:
    command = command_of("octavo-int8", setup_of(tmp_path, extra_args={"octavo": ("--num-threads", "2")}), 8123)
    assert command.argv[:5] == (sys.executable, "-m", "server.cli", "serve", str(tmp_path))
    assert command.argv[-2:] == ("--num-threads", "2") and "8123" in command.argv and "127.0.0.1" in command.argv
    assert "--quantization int8" in " ".join(command.argv)
    assert command.environ["PYTHONPATH"].startswith(str(ROOT))


def test_llama_takes_the_model_of_its_precision(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    for name in ("llama-server", "m-bf16.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).touch()
    setup = setup_of(tmp_path, llama_server=server, llama_models=tmp_path)
    line = " ".join(command_of("llama-q8_0", setup, 8123).argv)
    assert line.startswith(f"{server} -m {tmp_path / 'm-Q8_0.gguf'} --host 127.0.0.1 --port 8123")
    assert "-t 2" in line and "-np 16" in line
    with pytest.raises(NotInstalled, match=r"-f16\.gguf"):
        command_of("llama-f16", setup, 8123)


def test_vllm_and_transformers(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    setup = setup_of(tmp_path, vllm_python=python, transformers_python=python)
    command = command_of("vllm-bf16", setup, 8123)
    assert "--dtype bfloat16" in " ".join(command.argv) and command.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    with pytest.raises(NotInstalled, match="--vllm-int8-model"):
        command_of("vllm-int8", setup, 8123)
    command = command_of("transformers-float32", setup, 8123)
    assert command.model == str(tmp_path) and not command.has_ignore_eos and "generation_config" in command.extra_body


@pytest.mark.parametrize("name", ["llama-bf16", "vllm-bf16", "transformers-bf16"])
def test_a_peer_that_is_not_installed_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match=r"name .* with --"):
        command_of(name, setup_of(tmp_path), 8123)


def test_a_ratio_above_one_is_faster() -> None:
    assert speed_ratio(5.0, 10.0, "tpot_p50") == 2.0
    assert speed_ratio(200.0, 100.0, "output_tps") == 2.0
    assert (pick([3.0, 1.0, 2.0], "tpot_p50", "best"), pick([3.0, 1.0, 2.0], "output_tps", "best")) == (1.0, 3.0)
    assert pick([3.0, 1.0, 2.0], "tpot_p50", "median") == 2.0


def test_ours_is_compared_with_the_best_and_with_its_precision() -> None:
    record = record_of(
        octavo_bf16={"c1": [entry(tpot=10.0)], "c8": [entry(output=290.0), entry(output=310.0)]},
        octavo_int8={"c1": [entry(tpot=6.0)]},
        llama_bf16={"c1": [entry(tpot=11.0)], "c8": [entry(output=100.0)]},
        llama_q8_0={"c1": [entry(tpot=5.0)], "c8": [entry(output=120.0)]},
        vllm_bf16={"c1": [entry(tpot=30.0)], "c8": [entry(output=150.0)]},
    )
    rows = {(row["workload"], row["server"]): row for row in compare(record)}
    assert set(rows) == {("c1", "octavo-bf16"), ("c1", "octavo-int8"), ("c8", "octavo-bf16")}
    assert rows["c1", "octavo-bf16"]["best"] == {"peer": "llama-q8_0", "value": 5.0, "ratio": 0.5}
    assert rows["c1", "octavo-bf16"]["same_precision"] == {"peer": "llama-bf16", "value": 11.0, "ratio": 1.1}
    assert rows["c1", "octavo-int8"]["same_precision"]["ratio"] == round(5 / 6, 3)
    assert rows["c8", "octavo-bf16"]["best"] == {"peer": "vllm-bf16", "value": 150.0, "ratio": 2.0}
    lines = format_ratios(compare(record)).splitlines()
    assert lines[2] == (
        "| c1 | TPOT p50, ms | octavo-bf16 | 10.0 | llama-q8_0 5.0 | 0.50 | llama-bf16 11.0 | 1.10 "
        "| ≥ 1 × same precision | yes |"
    )
    assert lines[3].endswith("| no |") and lines[4].endswith("| ≥ 1.5 × best | yes |")
    assert "| 300.0 (290.0–310.0) |" in format_figures(record)


def test_rounds_with_errors_and_absent_peers_do_not_count() -> None:
    record = record_of(
        octavo_bf16={"c8": [entry(output=300.0), entry(output=1.0, num_errors=3)]}, llama_bf16={"c8": [entry(num_errors=1)]}
    )
    record["servers"]["vllm-bf16"] = {"not_installed": "no Python"}
    (row,) = compare(record)
    assert row["ours"] == 300.0 and "best" not in row
    report = format_report(record, "median")
    assert "| – | – | – | – | ≥ 1.5 × best | – |" in report and "- vllm-bf16: no Python" in report


def test_cores() -> None:
    mine = bench_peers.all_cores()
    assert bench_peers.cores_of(str(mine[0])) == mine[:1]
    for text, said in (("a", "cores look like"), ("99999", "may not use core")):
        with pytest.raises(SystemExit, match=said):
            bench_peers.cores_of(text)


def test_answers_of_another_length_are_counted() -> None:
    samples = [Sample(0.0, output_tokens=8), Sample(0.0, output_tokens=7), Sample(0.0, error="x")]
    assert bench_peers.count_short(samples, 8) == 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every server but vLLM is a small one that answers at once; vLLM's is one that ends at its start."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_SERVER)

    def command(name: str, setup: Setup, port: int) -> Command:
        if name.startswith("transformers"):
            raise NotInstalled("no Python")
        program = "import sys; sys.exit('no such instruction')" if name.startswith("vllm") else script.read_text()
        return Command((sys.executable, "-c", program, str(port)), {"PYTHONPATH": str(ROOT)})

    monkeypatch.setattr(bench_peers, "command_of", command)
    monkeypatch.setattr(bench_peers, "model_folder", lambda model: tmp_path)
    small = {"c8": Workload("c8", num_requests=4, concurrency=2, input_len=8, output_len=4)}
    for module in (bench_peers, bench_peers_report):
        monkeypatch.setattr(module, "WORKLOADS", small)
    return tmp_path


def test_a_run_of_all_with_one_that_fails(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pretended / "out" / "peers.json"
    arguments = ["--servers", "octavo-bf16,llama-bf16,vllm-bf16,transformers-bf16", "--rounds", "2"]
    assert bench_peers.main([*arguments, "--workloads", "c8", "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    for name in ("octavo-bf16", "llama-bf16"):
        found = record["servers"][name]
        assert len(found["ready_s"]) == 2 and found["memory_peak_bytes"] > 1_000_000
        rounds = found["workloads"]["c8"]
        assert [(r["output_tokens"], r["num_errors"], r["short_answers"]) for r in rounds] == [(16, 0, 0)] * 2
        assert (out.parent / f"{name}.2.log").is_file()
    assert "no such instruction" in record["servers"]["vllm-bf16"]["error"]
    printed = capsys.readouterr().out
    assert "| octavo-bf16 | " in printed and "- transformers-bf16: no Python" in printed and "≥ 1.5 × best" in printed


def test_unknown_names_are_refused(pretended: Path) -> None:
    with pytest.raises(SystemExit, match="no server 'llama'"):
        bench_peers.main(["--servers", "llama"])


def test_a_server_ends_with_its_children(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); print('up', flush=True); {sleep}"
    core = bench_peers.all_cores()[:1]
    with running([sys.executable, "-c", program], {}, free_port(), tmp_path / "log", core) as server:
        while not server.lines:
            time.sleep(0.01)
        if hasattr(os, "sched_getaffinity"):
            assert os.sched_getaffinity(server.process.pid) == set(core)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
    assert len(children) == 1 and server.process.returncode == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(int(children[0]), 0)
            time.sleep(0.05)
