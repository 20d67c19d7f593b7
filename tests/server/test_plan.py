"""`octavo plan`: what fits, what does not and which flag changes that, from a config.json alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dummy_model import SHAPES

from engine.errors import ConfigError
from server import plan as plan_module
from server.cli import run
from server.plan import find_device

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_DEVICE", "OCTAVO_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folders with a config.json and nothing else."""
    for name, config in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    code = run(["plan", *map(str, argv)])
    return code, capsys.readouterr().out


def test_a_model_that_fits(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = planned(capsys, models / "llama-3.1-8b", "--memory", "80G")
    assert code == 0
    assert re.search(r"weights +16\.06 GB +by the configuration's sizes, an estimate", text)
    assert "a step of 8,192 tokens" in text and "up to 256 (--max-num-seqs)" in text
    assert "131,072 bytes a token in bfloat16" in text
    assert re.search(r"\d{3},\d{3} tokens: 3 requests of 131,072,", text)
    assert text.endswith("It fits, with a context of 131,072 tokens.\n")


def test_fp8_changes_the_arithmetic(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--memory", "80G", "--quantization", "fp8", "--kv-cache-dtype", "fp8", "--no-cuda-graphs"]
    _, text = planned(capsys, models / "llama-3.1-8b", *flags)
    assert re.search(r"weights +9\.09 GB", text) and "65,536 bytes a token in FP8" in text and "CUDA graphs" not in text
    _, text = planned(capsys, models / "qwen3-30b-a3b", *flags)
    assert re.search(r"weights +60\.16 GB", text)  # experts are no linears


def test_int8_changes_the_arithmetic_of_a_cpu(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--memory", "16G", "--device", "cpu", "--dtype", "bfloat16"]
    _, text = planned(capsys, models / "llama-3.2-1b", *flags)
    assert re.search(r"weights +3\.00 GB", text)  # 1.24 billion parameters, and the tied head once more
    _, text = planned(capsys, models / "llama-3.2-1b", *flags, "--quantization", "int8")
    assert re.search(r"weights +1\.76 GB", text) and "in bfloat16 with int8 weights" in text


def test_a_quantization_of_other_devices_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, sentence in (
        (["--memory", "80G", "--quantization", "int8"], "int8 is for a CPU: on a GPU use fp8 or none"),
        (["--device", "cpu", "--quantization", "fp8"], "fp8 needs a GPU: on a CPU use int8 or none"),
    ):
        assert run(["plan", str(models / "llama-3.2-1b"), *flags]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("llama-3.1-8b", ["--memory", "18G"], r"take 19\.\d+ GB of 16\.39 GB there are; --quantization fp8 makes it fit"),
        ("llama-3.1-8b", ["--memory", "20G"], r"; --gpu-memory-utilization 0\.95 makes it fit"),
        ("llama-3.1-8b", ["--memory", "8G"], r"the weights alone take 16\.06 GB .*no single flag makes it fit"),
        ("llama-3.1-8b", ["--memory", "24G", "--max-model-len", "128K"], r"at most (\d+) tokens do; --max-model-len \1 fits"),
        (
            "llama-3.2-1b",
            ["--memory", "8G", "--kv-cache-memory-bytes", "6G"],
            "leaving out --kv-cache-memory-bytes makes it fit",
        ),
        ("llama-3.2-1b", ["--memory", "8G", "--num-kv-blocks", "4", "--max-model-len", "1k"], "leaving out --num-kv-blocks"),
        ("llama-3.2-1b", ["--memory", "4500M", "--device", "cpu", "--dtype", "float32"], "--dtype bfloat16 makes it fit"),
    ],
)
def test_a_model_that_does_not_fit_names_the_flag(
    name: str, flags: list[str], sentence: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = planned(capsys, models / name, *flags)
    assert code == 1
    last = text.splitlines()[-1]
    assert last.startswith("It does not fit: ") and re.search(sentence, last), last


@pytest.mark.parametrize(
    ("memory", "sentence"), [("16G", "--cpu-memory-share 0.8 serves them all"), ("10G", "no single flag serves them all")]
)
def test_a_context_cut_short_is_said_with_the_flag_that_helps(
    memory: str, sentence: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = planned(capsys, models / "llama-3.2-1b", "--memory", memory, "--device", "cpu", "--dtype", "float32")
    assert code == 0
    assert "It fits, with a context of" in text
    assert f"The model knows 131,072 tokens: {sentence}" in text


def test_weights_are_counted_by_the_files_where_there_are_any(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models / "llama-tiny"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 50_000], "data_offsets": [0, 200_000_000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert re.search(r"weights +0\.10 GB +by the files' headers", planned(capsys, folder, "--memory", "8G")[1])
    assert re.search(r"weights +0\.00 GB +by the conf", planned(capsys, folder, "--memory", "8G", "--load-format", "dummy")[1])


def test_what_cannot_be_planned_is_one_sentence(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(*argv: str | Path) -> tuple[int, str]:
        code = run(["plan", *map(str, argv)])
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return code, text

    monkeypatch.setenv("HF_HUB_CACHE", str(models))
    assert failed(models / "none-such", "--memory", "8G") == (1, failed(models / "none-such", "--memory", "8G")[1])
    assert "is not on this machine yet" in failed("nobody/none-such", "--memory", "8G")[1]
    assert failed(models, "--memory", "8G")[0] == 1  # no config.json
    assert "did you mean --max-model-len?" in failed(models / "llama-tiny", "--max-mdel-len", "1k")[1]
    code, text = failed(models / "llama-tiny", "--memory", "much")
    assert code == 2 and "--memory must be a whole number" in text
    assert failed(models / "llama-tiny", "--memory", "0")[0] == failed(models / "llama-tiny", "--memory")[0] == 2
    (models / "llama-tiny" / "config.json").write_text('{"num_hidden_layers": 2}')
    assert "config.json states no" in failed(models / "llama-tiny", "--memory", "8G")[1]


def test_the_card_s_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="NVIDIA H100 80GB HBM3, 81559, 81000\n")

    monkeypatch.setattr(plan_module.subprocess, "run", answer)
    device = find_device("cuda", None, {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert (device.name, device.on_gpu, device.total_bytes) == ("NVIDIA H100 80GB HBM3", True, 81559 << 20)
    assert device.free_bytes == (81000 << 20) - plan_module.CUDA_BYTES
    assert asked[0][:3] == ["nvidia-smi", "-i", "2"]
    monkeypatch.setattr(plan_module.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=""))
    with pytest.raises(ConfigError, match="--memory 80G"):
        find_device("cuda", None, {})
    cpu = find_device("cpu", None, {})
    assert not cpu.on_gpu and 0 < cpu.free_bytes <= cpu.total_bytes


def test_no_torch_is_imported(models: Path) -> None:
    code = "import sys; from server.cli import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "plan", str(models / "llama-3.1-8b"), "--memory", "80G"]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, check=False).returncode == 0
