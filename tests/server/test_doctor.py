"""`octavo doctor`: what its facts mean, and the command itself on a machine where things are missing, broken or hang."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from server import doctor, doctor_checks, doctor_facts, doctor_model
from server.cli import run
from server.doctor import Look, examine, run_doctor
from server.doctor_checks import Finding
from server.doctor_facts import (
    Cores,
    Disk,
    Gpu,
    Gpus,
    Memory,
    Package,
    Port,
    ProcessLimits,
    SharedMemory,
    System,
    ask_engine,
    cpu_quota,
    read_disk,
    read_gpus,
    read_port,
)
from server.doctor_model import ModelFacts, judge_model

ROOT = Path(__file__).resolve().parents[2]
H100 = Gpu("0", "NVIDIA H100", "580.65.06", 80 * 2**30, 79 * 2**30, 9.0, "Enabled")
CUDA_TORCH = {"version": "2.13.0+cu130", "cuda": "13.0", "usable": True}
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "usable": False}
MODEL = {"folder": "/models/m", "architecture": "LlamaForCausalLM", "config": {}}


def gpus(torch: dict[str, Any] = CUDA_TORCH, card: Gpu = H100, **changes: Any) -> Gpus:
    return replace(Gpus("auto", True, cards=(card,), torch=torch), **changes)


JUDGED = [
    (doctor_checks.judge_system(System("Linux 6.1", "6.1", "x86_64", (3, 12, 1))), "ok", "Python 3.12.1"),
    (doctor_checks.judge_system(System("Linux 6.1", "6.1", "x86_64", (3, 9, 0))), "problem", "3.11 to 3.14"),
    (doctor_checks.judge_system(System("Windows 11", "11", "AMD64", (3, 12, 1))), "problem", "WSL"),
    (doctor_checks.judge_system(System("Linux 6.1", "6.1", "aarch64", (3, 12, 1))), "warning", "x86-64"),
    (doctor_checks.judge_cores(Cores(8, 8)), "ok", "8 of 8 usable"),
    (doctor_checks.judge_cores(Cores(64, 64, quota=4.0)), "warning", "--num-threads 4"),
    (doctor_checks.judge_cores(Cores(64, 64, quota=4.0, num_threads=4)), "ok", "time for 4"),
    (doctor_checks.judge_cores(Cores(1, 1)), "warning", "two or more"),
    (doctor_checks.judge_memory(Memory(2**35, 2**34)), "ok", "17.2 GB free of 34.4 GB"),
    (doctor_checks.judge_memory(Memory(2**35, 2**30, limit=2**30)), "warning", "control group"),
    (
        doctor_checks.judge_disks([Disk("models", "/m", 10**11, True, "x"), Disk("kernels", "/k", 10**11, True, "x")]),
        "ok",
        "100.0 GB free for models (/m), kernels (/k)",
    ),
    (doctor_checks.judge_disks([Disk("models", "/m", 10**9, True, "use --download-dir")]), "warning", "use --download-dir"),
    (doctor_checks.judge_disks([Disk("models", "/m", 10**11, False, "use --download-dir")]), "problem", "cannot be written"),
    (doctor_checks.judge_limits(ProcessLimits(None, None, None, 4352)), "ok", "any number of open files"),
    (doctor_checks.judge_limits(ProcessLimits(1024, None, None, 4352)), "warning", "4,352"),
    (doctor_checks.judge_limits(ProcessLimits(None, 600, None, 4352)), "problem", "ulimit -t unlimited"),
    (doctor_checks.judge_limits(ProcessLimits(None, None, 2**30, 4352)), "warning", "ulimit -v unlimited"),
    (doctor_checks.judge_shared_memory(SharedMemory(True, True, 2**26, 2**26)), "ok", "/dev/shm"),
    (doctor_checks.judge_shared_memory(SharedMemory(False)), "warning", "is not there"),
    (doctor_checks.judge_gpus(gpus()), "ok", "driver 580.65.06, for CUDA 13.0"),
    (doctor_checks.judge_gpus(gpus(CPU_TORCH)), "problem", "build for CPUs"),
    (doctor_checks.judge_gpus(gpus({"error": "ImportError: libtorch"})), "problem", "ImportError: libtorch"),
    (doctor_checks.judge_gpus(gpus(card=replace(H100, driver="535.1"))), "problem", "too old for CUDA 13.0"),
    (doctor_checks.judge_gpus(gpus({**CUDA_TORCH, "usable": False})), "problem", "finds no usable GPU"),
    (doctor_checks.judge_gpus(gpus(card=replace(H100, capability=7.5))), "warning", "8.0 (Ampere)"),
    (doctor_checks.judge_gpus(gpus(card=replace(H100, free=2**30))), "warning", "--gpu-memory-utilization"),
    (doctor_checks.judge_gpus(gpus(card=replace(H100, persistence="Disabled"))), "warning", "nvidia-smi -pm 1"),
    (doctor_checks.judge_gpus(gpus(users=(("7", "python", 2**30),))), "ok", "python (process 7) 1.1 GB"),
    (doctor_checks.judge_gpus(gpus(error="nvidia-smi says: no", cards=())), "problem", "nvidia-smi says: no"),
    (doctor_checks.judge_gpus(Gpus("auto", False, torch=CPU_TORCH)), "ok", "the CPU serves"),
    (doctor_checks.judge_gpus(Gpus("cuda", False, torch=CPU_TORCH)), "problem", "--gpus all"),
    (doctor_checks.judge_gpus(Gpus("cuda", False, "-1", torch=CPU_TORCH)), "problem", "unset CUDA_VISIBLE_DEVICES"),
    (doctor_checks.judge_gpus(gpus(wanted="cpu")), "ok", "not looked at"),
    (doctor_checks.judge_compilers(True, {"said": "Compiled"}), "ok", "Compiled"),
    (doctor_checks.judge_compilers(True, {"error": "needs Python.h"}), "problem", "needs Python.h"),
    (doctor_checks.judge_compilers(False, {"compiled": True, "compiler": "g++"}), "ok", "g++"),
    (doctor_checks.judge_compilers(False, {"compiled": False, "reason": "are not compiled yet"}), "ok", "first start"),
    (doctor_checks.judge_compilers(False, {"compiled": False, "reason": "no C++ compiler"}), "warning", "no C++ compiler"),
    (doctor_checks.judge_compilers(False, {"error": "no answer"}), "warning", "no answer"),
    (doctor_checks.judge_packages([Package("torch", "2.13.0", "2.13.0+cpu")]), "ok", "as pinned"),
    (doctor_checks.judge_packages([Package("torch", "2.13.0", "2.1.0")]), "warning", "torch 2.1.0 (pinned 2.13.0)"),
    (doctor_checks.judge_packages([Package("torch", "2.13.0", None)]), "problem", "missing: torch"),
    (doctor_checks.judge_packages(None), "warning", "not installed"),
    (doctor_checks.judge_port(Port("--port", "127.0.0.1", 8000)), "ok", "is free"),
    (doctor_checks.judge_port(Port("--port", "::1", 8000, errno.EADDRINUSE, "", "x (process 7)")), "problem", "--port 8001"),
    (doctor_checks.judge_port(Port("--port", "::1", 80, errno.EACCES)), "problem", "above 1023"),
    (doctor_checks.judge_port(Port("--port", "x.invalid", 80, -1, "not known")), "problem", "--host"),
    (doctor_checks.judge_environment({"HF_TOKEN": "hf_secret"}, []), "ok", "HF_TOKEN is set"),
    (doctor_checks.judge_environment({}, [("OCTAVO_PROT", " (did you mean OCTAVO_PORT?)")]), "problem", "mean OCTAVO_PORT"),
    (doctor_checks.judge_exposure("0.0.0.0", False, False), "warning", "--api-key-file"),
    (doctor_checks.judge_exposure("0.0.0.0", True, False), "warning", "--tls-cert"),
    (doctor_checks.judge_exposure("0.0.0.0", True, True), "ok", "TLS"),
    (judge_model(ModelFacts("m", answer={"error": "it is gated: set HF_TOKEN"})), "problem", "set HF_TOKEN"),
    (judge_model(ModelFacts("m", answer=MODEL, fit="8,192 tokens: 4 requests")), "ok", "it fits: 8,192 tokens"),
    (judge_model(ModelFacts("m", answer=MODEL, problem="the weights alone take 9 GB")), "problem", "octavo plan"),
    (judge_model(ModelFacts("m", "the first start fetches it", 9, 10, MODEL)), "ok", "the first start fetches it"),
    (judge_model(ModelFacts("m", "the first start fetches it", 10, 9, MODEL)), "problem", "--download-dir"),
]


@pytest.mark.parametrize(("findings", "level", "part"), JUDGED)
def test_what_facts_mean(findings: list[Finding], level: str, part: str) -> None:
    worst = max(findings, key=lambda each: doctor_checks.LEVELS.index(each.level))
    assert worst.level == level
    assert any(part in f"{each.what}: {each.remedy}" for each in findings if each.level == level), findings
    assert all(each.remedy for each in findings if each.level != "ok"), "what is wrong comes with what to do"
    assert "hf_secret" not in str(findings)


def test_the_quota_of_control_groups(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    own = tmp_path / "self"
    own.write_text("0::/a/b\n")
    assert cpu_quota(tmp_path, own) is None
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, own) == 1.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("4:cpu,cpuacct:/\n")
    assert cpu_quota(tmp_path, own) == 0.5
    assert cpu_quota(tmp_path, tmp_path / "none") is None


def test_a_port_and_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = read_port("--port", "127.0.0.1", number)
    assert found.error == errno.EADDRINUSE and str(os.getpid()) in found.holder
    assert read_port("--port", "127.0.0.1", number).error == 0
    assert read_port("--port", "host.invalid", 1).error == -1


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    assert read_disk("models", tmp_path / "not" / "there", "x").is_writable
    assert not read_disk("models", Path("/proc/octavo"), "x").is_writable


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("text", "error"),
    [("echo 'NVIDIA-SMI has failed' >&2; exit 9", "NVIDIA-SMI has failed"), ("exec sleep 60", "does not answer")],
)
def test_a_driver_that_fails_or_hangs(text: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "nvidia-smi", text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor_facts, "NVIDIA_SMI_LIMIT_S", 0.5)
    monkeypatch.setattr(doctor_facts, "ask_engine", lambda _: CUDA_TORCH)
    assert error in read_gpus("auto", {}).error


def test_the_words_of_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = "0, NVIDIA H100, 580.65, 81559, 81000, 9.0, [N/A]"
    script(tmp_path, "nvidia-smi", f'case "$1" in *compute-apps*) echo "7, python, 1024";; *) echo "{card}";; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor_facts, "ask_engine", lambda _: CUDA_TORCH)
    found = read_gpus("auto", {})
    assert found.cards == (Gpu("0", "NVIDIA H100", "580.65", 81559 << 20, 81000 << 20, 9.0, "[N/A]"),)
    assert found.users == (("7", "python", 1 << 30),)


@pytest.mark.parametrize("content", ["raise ImportError('broken wheel')", "import os; os.abort()"])
def test_a_broken_torch_is_an_error_and_no_end(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = ask_engine("torch")
    assert "broken wheel" in answer["error"] or "ended with code" in answer["error"]


def test_a_look_that_hangs_or_fails_costs_its_own_line() -> None:
    release = threading.Event()

    def fail() -> None:
        raise OSError(5, "Input/output error")

    looks = [
        Look("disk", release.wait, lambda _: [], limit_s=0.2),
        Look("memory", fail, lambda _: []),
        Look("cores", lambda: 3, lambda cores: [Finding("cores", "ok", str(cores))]),
    ]
    try:
        found = list(examine(looks))
    finally:
        release.set()
    assert [(each.subject, each.level) for each in found] == [("disk", "warning"), ("memory", "warning"), ("cores", "ok")]
    assert "no answer within 0.2 s" in found[0].what and "Input/output error" in found[1].what


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of the engine's side, which takes seconds to ask."""
    answers = {"torch": CPU_TORCH, "cpu_kernels": {"compiled": True, "compiler": "g++"}}
    monkeypatch.setattr(doctor_facts, "ask_engine", lambda part, *_, **__: answers[part])
    monkeypatch.setattr(doctor_model, "ask_engine", lambda *_, **__: {"error": "no such model: give another"})


NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}


@pytest.mark.usefixtures("fast")
def test_the_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environ = {**NO_GPU, "OCTAVO_PROT": "1", "OCTAVO_API_KEY": "secret"}
        assert run_doctor(["some/model", "--port", port, "--json"], environ) == 1
    text = capsys.readouterr().out
    report = json.loads(text)
    problems = {each["subject"]: each for each in report["findings"] if each["level"] == "problem"}
    assert set(problems) == {"port", "environment", "model"} and report["problems"] == 3
    assert "did you mean OCTAVO_PORT?" in problems["environment"]["what"]
    assert problems["model"] == {"subject": "model", "level": "problem", "what": "no such model", "remedy": "give another"}
    assert "secret" not in text


@pytest.mark.usefixtures("fast")
def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(["some/model", "--port", "0"], {**NO_GPU, "OCTAVO_BLOCK_SIZE": "17"}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "warning ", "problem ")) for line in lines[:-1])
    assert any(line.startswith("problem  settings: OCTAVO_BLOCK_SIZE") and "power of two" in line for line in lines)
    assert lines[-1].startswith("2 problems, ")


def test_wrong_flags_are_a_wrong_command_line() -> None:
    with pytest.raises(ConfigError, match=r"did you mean --port\?"):
        run_doctor(["--prot", "1"], NO_GPU)
    with pytest.raises(ConfigError, match="power of two"):
        run_doctor(["--block-size", "17"], NO_GPU)
    assert run(["doctor", "--jsno"]) == 2


def test_without_the_server_s_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("No module named 'pydantic'")

    monkeypatch.setattr(doctor, "_looks", fail)
    assert run_doctor([], NO_GPU) == 1
    text = capsys.readouterr().out
    assert "No module named 'pydantic'" in text and "scripts/install" in text and "system: " in text


def test_nothing_but_the_standard_library_is_needed_to_say_what_is_missing() -> None:
    code = "import sys, server.doctor; sys.exit(bool({'pydantic', 'yaml', 'msgspec', 'psutil', 'torch'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_real_command(tmp_path: Path) -> None:
    """A model that is not whole, on this machine as it is, named by a path from where the user is."""
    (tmp_path / "model").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "self_check.py").write_text("raise SystemExit(3)")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "server" / "cli.py"), "doctor", "./model", "--device", "cpu", "--port", "0", "--json"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OCTAVO_", "HF_", "HUGGINGFACE_"))}
    environ |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=250, check=False)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    subjects = {each["subject"] for each in report["findings"]}
    assert {"system", "cores", "memory", "disk", "limits", "packages", "torch", "GPU", "environment", "model"} <= subjects
    disks = " ".join(each["what"] for each in report["findings"] if each["subject"] == "disk")
    assert f"downloads of the Hub ({tmp_path}/xdg/huggingface/hub)" in disks  # where the server would put them
    (model,) = [each for each in report["findings"] if each["subject"] == "model"]
    assert model["level"] == "problem" and "no *.safetensors weights" in model["what"]
    assert done.returncode == 1
