"""What `octavo doctor` finds out about models: of a small hub, of the cache, and of folders that are not whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import ModelConfig
from engine.errors import ModelLoadError
from server.doctor_model import ModelFacts, judge_model
from tests.hub_harness import ROOT, Place, new_place
from tests.test_hub_download import NAME, repository_files

GATED = "meta/gated"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        made.hub.add(NAME, repository_files())
        made.hub.add(GATED, repository_files(), gated=True)
        yield made


def asked(place: Place, name: str, **environ: str) -> dict[str, Any]:
    config = msgspec.json.encode(ModelConfig(model=name)).decode()
    command = [sys.executable, "-m", "engine.self_check", "model", config]
    environment = place.environ(**environ)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_model_of_the_hub_that_is_not_here_yet(place: Place) -> None:
    answer = asked(place, NAME)
    assert answer.get("error") is None, answer
    sizes = sum(len(content) for name, content in repository_files().items() if name.endswith(".safetensors"))
    assert (answer["folder"], answer["download_bytes"]) == (None, sizes)
    assert (answer["architecture"], answer["config"]["model_type"]) == ("llama", "llama")
    assert not any(each.path.endswith(".safetensors") for each in place.hub.fetched()), "no weights are fetched"


def test_a_file_that_is_no_gguf(place: Place) -> None:
    path = place.path / "model.gguf"
    path.write_bytes(b"<html>")
    assert asked(place, str(path))["error"].startswith(f"{path} is no GGUF file: give a Hugging Face folder")


@pytest.mark.parametrize(
    ("name", "environ", "what", "remedy"),
    [
        (GATED, {}, "is gated", "HF_TOKEN"),
        ("meta/nothing", {}, "no Hub model", "check the spelling"),
        ("./nothing", {}, "there is no file or folder", "give a Hub id"),
        (NAME, {"HF_HUB_OFFLINE": "1"}, "is not in the cache", "start once without"),
        (NAME, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached", "check the network"),
    ],
)
def test_what_cannot_be_had(place: Place, name: str, environ: dict[str, str], what: str, remedy: str) -> None:
    (finding,) = judge_model(ModelFacts(name, answer=asked(place, name, **environ)))
    assert finding.level == "problem" and what in finding.what and remedy in finding.remedy


def test_a_folder_with_a_file_that_was_cut(tmp_path: Path, place: Place) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in repository_files().items():
        (folder / name).write_bytes(content)
    assert asked(place, str(folder))["folder"] == str(folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (finding,) = judge_model(ModelFacts("model", answer=asked(place, str(folder))))
    assert finding.level == "problem" and "is damaged" in finding.what
    weights.unlink()
    assert "weight" in asked(place, str(folder))["error"]


def test_errors_of_models_say_what_to_do_behind_a_colon() -> None:
    """By which they are split into what is and what to do."""
    error = ModelLoadError("X is gated: accept its terms")
    (finding,) = judge_model(ModelFacts("X", answer={"error": error.message}))
    assert (finding.what, finding.remedy) == ("X is gated", "accept its terms")
