"""What keeps a Hub's model from being fetched is said in one sentence with the remedy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.model_cache import is_hub_id, nearest_in_cache
from tests.hub_harness import Place, Resolved, new_place
from tests.test_hub_download import HALF, NAME, repository_files, wait_until_written

GATED = "meta/gated"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        made.hub.add(NAME, repository_files())
        made.hub.add(GATED, repository_files(), gated=True)
        made.hub.add("corp/secret", repository_files(), private=True)
        made.hub.tokens = {"hf_good": {GATED, "corp/secret"}, "hf_other": set()}
        yield made


def test_a_gated_model(place: Place) -> None:
    page = f"{place.hub.url}/{GATED}"
    sentence = place.refused(GATED)
    assert sentence.startswith(f"{GATED} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account")
    sentence = place.refused(GATED, environ={"HF_TOKEN": "hf_other"})
    assert "the token in HF_TOKEN (or of `hf auth login`) may not read it: accept the terms at " + page in sentence
    sentence = place.refused(GATED, environ={"HF_TOKEN": "hf_wrong"})
    assert sentence.startswith("the Hub does not accept the token in HF_TOKEN")
    sentence = place.refused(GATED, environ={"HF_TOKEN": "hf_go…d"})
    assert "holds characters that no token has" in sentence
    assert place.hub.fetched() == []


@pytest.mark.parametrize("name", ["../../../evil.safetensors", "{path}/evil.safetensors"])
def test_a_hub_that_lists_a_file_elsewhere_on_this_machine(name: str, place: Place) -> None:
    name = name.format(path=place.path)
    index = json.dumps({"weight_map": {"weight": name}}).encode()
    files = repository_files() | {"model.safetensors.index.json": index, name: b"x" * HALF}
    del files["model.safetensors"]
    place.hub.add("someone/evil", files)
    sentence = place.refused("someone/evil")
    assert "does not answer like a Hugging Face Hub" in sentence and "lies outside of the repository" in sentence
    assert not list(place.path.rglob("evil.safetensors"))


def test_a_token_is_sent_to_the_hub_alone_and_never_logged(place: Place) -> None:
    outputs = [place.resolve(GATED, environ={"HF_TOKEN": token, "HF_DEBUG": "1"}) for token in ("hf_wrong", "hf_good\n")]
    assert [found.code for found in outputs] == [1, 0], outputs[1].output
    illegal = ("a/b/c", "a b", "./a", "/a", "a--b", "-a/b", "a/b.git", "a/b.gguf", "ä/b", "a" * 97, "a/", "")
    assert not any(map(is_hub_id, illegal))


def test_the_nearest_names(tmp_path: Path) -> None:
    for name in ("meta-llama--Llama-3.1-8B", "meta-llama--Llama-3.2-1B", "openai--gpt-oss-20b", "gpt2"):
        (tmp_path / f"models--{name}" / "snapshots" / "1").mkdir(parents=True)
        (tmp_path / f"models--{name}" / "snapshots" / "1" / "config.json").write_text("{}")
    (tmp_path / "models--meta-llama--Llama-3.1-8b" / "snapshots").mkdir(parents=True)  # nothing of it is there

    def nearest(name: str) -> list[str]:
        return nearest_in_cache(ModelConfig(model=name, download_dir=str(tmp_path)))

    assert nearest("meta-llama/Llama-3.1-8b")[0] == "meta-llama/Llama-3.1-8B"
    assert nearest("Llama-3.1-8B")[0] == "meta-llama/Llama-3.1-8B"
    assert nearest("someone/llama-3.2-1b")[0] == "meta-llama/Llama-3.2-1B"
    assert nearest("gpt-2")[0] == "gpt2"
    assert nearest("Qwen/Qwen3-0.6B") == []


def test_off_line(place: Place) -> None:
    assert place.resolve(NAME).code == 0
    cache = place.path / "hf" / "hub"
    assert place.refused("someone/modle", environ=OFFLINE) == (
        f"someone/modle is not in the cache {cache} (in the cache there is {NAME}), and HF_HUB_OFFLINE forbids to fetch it: "
        "start once without HF_HUB_OFFLINE, or give a local folder"
    )
    folder = place.resolve(NAME).folder
    assert folder is not None
    (folder / "model.safetensors").unlink()
    assert place.refused(NAME, environ=OFFLINE).startswith(f"{NAME} is in the cache {cache} without the weights, and HF_HUB")


def test_a_hub_that_cannot_be_reached(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    sentence = place.refused(NAME, environ={"HF_ENDPOINT": nobody})
    assert sentence == (
        f"{NAME} cannot be looked up, since the Hub at {nobody} cannot be reached ([Errno 111] Connection refused): check the "
        "network and HF_ENDPOINT, or give a local folder"
    )
    assert "(Request URL is missing an 'http://'" in place.refused(NAME, environ={"HF_ENDPOINT": "localhost:1"})
    sentence = place.refused(NAME, environ={"HF_ENDPOINT": place.hub.storage_url})
    assert sentence.startswith(f"the Hub at {place.hub.storage_url} refuses {NAME} with 404 (no such blob)")


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "octavo-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small disk is a mount, which only root may make")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_download(place: Place) -> None:
    with small_disk(place.path / "small", 512 * 1024):
        cache = place.path / "small" / "models"
        sentence = place.refused(NAME, download_dir=str(cache))
        assert sentence == (
            f"{cache}/models--someone--model needs 0.6 MB and its disk has 0.5 MB free: free some space or name another folder "
            "with --download-dir"
        )
        assert place.hub.fetched("model.safetensors") == []


def test_a_disk_that_fills_up_keeps_what_has_come(place: Place) -> None:
    with small_disk(place.path / "small", 1024 * 1024):
        held = place.hub.trouble("model.safetensors", 1, hold_after=HALF)
        process = place.begin(NAME, download_dir=str(place.path / "small"))
        wait_until_written(process, HALF)
        filling = place.path / "small" / "other"
        with filling.open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
            while True:
                other.write(bytes(4096))
        held.released.set()
        found = Resolved.of(process)
        assert found.error == (
            f"the disk that holds {place.path}/small is full: free some space or name another folder with --download-dir"
        ), found.output
        filling.unlink()
        assert place.resolve(NAME, download_dir=str(place.path / "small")).code == 0
        begun = place.hub.fetched("model.safetensors")[1].range
        assert begun is not None
        assert int(begun.removeprefix("bytes=").rstrip("-")) >= HALF


def test_a_cache_that_may_only_be_read_serves_what_it_has(place: Place) -> None:
    repository = place.hub.repositories[NAME]
    repository.tags["v1"] = repository.branches["main"]
    with small_disk(place.path / "small", 2 * 1024 * 1024):
        first = place.resolve(NAME, download_dir=str(place.path / "small"))
        subprocess.run(["mount", "-o", "remount,ro", str(place.path / "small")], check=True)
        again = place.resolve(NAME, download_dir=str(place.path / "small"), revision="v1")
        assert again.folder == first.folder
        assert "refs/v1 could not be written (Read-only file system): without a network" in again.output
        repository.commit({**repository_files(), "config.json": b'{"model_type": "llama", "is": "new"}'})
        sentence = place.refused(NAME, download_dir=str(place.path / "small"))
        assert "cannot be written or read (Read-only file system)" in sentence


def test_a_limit_of_a_file_s_length(place: Place) -> None:
    sentence = place.refused(NAME, environ={"RESOLVE_MAX_FILE_BYTES": str(HALF)})
    assert sentence.startswith(f"the disk or a limit (ulimit -f) of {place.path}/hf/hub does not let a file grow as large")


def test_a_cache_that_may_not_be_written(place: Place) -> None:
    (place.path / "file").write_text("not a folder")
    sentence = place.refused(NAME, download_dir=str(place.path / "file"))
    assert sentence.startswith(f"{place.path}/file")
    assert "--download-dir" in sentence
