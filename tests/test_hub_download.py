"""Models of a Hub are fetched whole, once, and go on where they were cut. The hub is a local one; each fetch is a process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.hub_download import MAX_FAILURES, Download, HubFile
from tests.hub_harness import Place, Resolved, new_place

NAME = "someone/model"
HALF, WEIGHT_BYTES = 300_000, 600_000
NOT_NEEDED = (
    ".gitattributes",
    "README.md",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model.fp16.safetensors",
    "model-q4.gguf",
    "modeling_own.py",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "tf_model.h5",
    "training_args.bin",
)


def safetensors(num_bytes: int, seed: int = 0) -> bytes:
    """A file of one tensor, of that many bytes in all."""
    size = num_bytes - 128
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).ljust(120).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


def repository_files() -> dict[str, bytes]:
    """A model as far as its files' names and lengths go."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}".ljust(2000),
        "model.safetensors": safetensors(WEIGHT_BYTES),
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        made.hub.add(NAME, repository_files())
        yield made


def check_whole(place: Place, found: Resolved) -> None:
    assert found.folder is not None, found.output
    for name, content in repository_files().items():
        assert (found.folder / name).read_bytes() == content
    assert list(place.model_cache(NAME).rglob("*.incomplete")) == []


def wait_until_written(process: subprocess.Popen[str], num_bytes: int) -> None:
    """Until the process tells that so much of the weights is on the disk."""
    assert process.stdout is not None
    assert any(f"{NAME}: {num_bytes / 1e6:.2f} of" in line for line in process.stdout)


def test_a_model_is_fetched_once_with_its_bytes_and_rate_told(place: Place) -> None:
    place.hub.bytes_per_s = 500_000
    first = place.resolve(NAME)
    check_whole(place, first)
    # Of the weights: the small files before them are told of where they take long, as a fetch of their own.
    fractions = [fraction for _, detail, fraction in first.progress if fraction is not None and " of 0.60 MB" in detail]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len(fractions) > 3
    assert f"{NAME}: 0.60 of 0.60 MB, " in first.told
    assert " MB/s" in first.told
    assert sorted(asked.name for asked in place.hub.fetched()) == sorted(repository_files())
    before = len(place.hub.asked)
    second = place.resolve(NAME)
    assert second.folder == first.folder
    assert [asked.path for asked in place.hub.asked[before:]] == [f"/api/models/{NAME}"]


def test_huggingface_hub_finds_what_octavo_fetched_and_the_other_way_round(place: Place) -> None:
    def with_library(code: str) -> str:
        command = [sys.executable, "-c", f"from huggingface_hub import snapshot_download; print({code})"]
        return subprocess.run(command, env=place.environ(), check=True, capture_output=True, text=True).stdout.strip()

    found = place.resolve(NAME)
    assert with_library(f"snapshot_download({NAME!r}, local_files_only=True)") == str(found.folder)
    assert with_library(f"snapshot_download({NAME!r})") == str(found.folder)
    assert len(place.hub.fetched()) == 3
    place.hub.add("someone/other", repository_files())
    theirs = with_library("snapshot_download('someone/other')")
    assert len(place.hub.fetched()) == 6
    assert place.resolve("someone/other").folder == Path(theirs)
    assert len(place.hub.fetched()) == 6


def test_a_cut_connection_is_taken_up_where_it_was(place: Place) -> None:
    place.hub.trouble("model.safetensors", 2, cut_after=HALF // 2)
    check_whole(place, place.resolve(NAME))
    asked = place.hub.fetched("model.safetensors")
    assert [each.range for each in asked] == [None, f"bytes={HALF // 2}-", f"bytes={HALF}-"]
    assert sum(each.sent for each in asked) == WEIGHT_BYTES


def test_a_server_that_falls_silent_is_asked_for_the_rest(place: Place) -> None:
    place.hub.trouble("model.safetensors", 1, hold_after=HALF)
    check_whole(place, place.resolve(NAME, environ={"HF_HUB_DOWNLOAD_TIMEOUT": "1"}))
    assert [each.range for each in place.hub.fetched("model.safetensors")] == [None, f"bytes={HALF}-"]


def test_a_killed_process_is_taken_up_where_it_was(place: Place) -> None:
    held = place.hub.trouble("model.safetensors", 1, hold_after=HALF)
    process = place.begin(NAME)
    assert held.reached.wait(60)
    part = place.model_cache(NAME) / "blobs" / f"{hashlib.sha256(safetensors(WEIGHT_BYTES)).hexdigest()}.incomplete"
    wait_until_written(process, HALF)
    process.kill()
    process.communicate(timeout=60)
    assert part.stat().st_size == HALF
    check_whole(place, place.resolve(NAME))
    assert [each.range for each in place.hub.fetched("model.safetensors")] == [None, f"bytes={HALF}-"]


def test_a_part_that_is_not_what_the_hub_has_is_fetched_anew(place: Place) -> None:
    blobs = place.model_cache(NAME) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(safetensors(WEIGHT_BYTES)).hexdigest()}.incomplete").write_bytes(bytes(HALF))
    check_whole(place, place.resolve(NAME))
    assert [each.range for each in place.hub.fetched("model.safetensors")] == [f"bytes={HALF}-", None]


def test_a_server_without_ranges_sends_it_all_again(place: Place) -> None:
    place.hub.ignores_ranges = True
    place.hub.trouble("model.safetensors", 1, cut_after=HALF)
    check_whole(place, place.resolve(NAME))
    assert [each.status for each in place.hub.fetched("model.safetensors")] == [200, 200]


def test_a_server_without_ranges_that_always_cuts_is_given_up(place: Place) -> None:
    place.hub.ignores_ranges = True
    place.hub.trouble("model.safetensors", cut_after=HALF)
    assert "was cut" in place.refused(NAME)
    assert len(place.hub.fetched("model.safetensors")) == MAX_FAILURES


def test_what_is_here_without_links_is_not_missing(tmp_path: Path) -> None:
    download = Download(NAME, tmp_path / "models--someone--model", "c0ffee", lambda *_: None)
    download.snapshot.mkdir(parents=True)
    (download.snapshot / "here").write_bytes(bytes(10))
    files = [HubFile(name, 10, name * 8, is_large=False) for name in ("here", "away")]
    assert download.missing_bytes(files) == 10


def test_two_processes_fetch_a_file_once(place: Place) -> None:
    held = place.hub.trouble("model.safetensors", 1, hold_after=HALF)
    first = place.begin(NAME)
    assert held.reached.wait(60)
    second = place.begin(NAME)
    assert second.stdout is not None
    assert any("another process fetches model.safetensors" in line for line in second.stdout)
    held.released.set()
    check_whole(place, Resolved.of(first))
    assert second.communicate(timeout=60) is not None
    assert second.returncode == 0
    assert len(place.hub.fetched("model.safetensors")) == 1


def test_what_is_out_of_order_for_a_while_is_asked_again(place: Place) -> None:
    place.hub.trouble(f"/api/models/{NAME}", 2, status=503)
    place.hub.trouble("config.json", 1, status=500)
    place.hub.trouble("model.safetensors", 1, status=504)
    place.hub.trouble("model.safetensors", 1, status=429, headers={"Retry-After": "1"})
    place.hub.trouble("model.safetensors", 1, status=429, headers={"RateLimit": '"resolvers";r=0;t=1'})
    found = place.resolve(NAME)
    check_whole(place, found)
    assert "again in 0 s: HTTP 503" in found.told
    assert place.hub.storage_url not in found.output
    assert found.told.count("again in 1 s") >= 2


def test_what_is_out_of_order_for_good_is_given_up(place: Place) -> None:
    place.hub.trouble(f"/api/models/{NAME}", 5, status=503)
    sentence = place.refused(NAME)
    assert "answers 503 (out of order)" in sentence
    assert len(place.hub.asked) == 5
    place.hub.trouble(f"/api/models/{NAME}", 1, status=429, headers={"Retry-After": "3600"})
    assert "limits how often it is asked (429)" in place.refused(NAME)
    place.hub.trouble("model.safetensors", 5, cut_after=0)
    sentence = place.refused(NAME)
    assert sentence.startswith(f"the download of {NAME} from {place.hub.url} was cut (")
    assert sentence.endswith("start again, and it goes on from where it was")
    check_whole(place, place.resolve(NAME))


def test_other_bytes_than_the_hub_lists_are_not_kept(place: Place) -> None:
    repository = place.hub.repositories[NAME]
    content = repository.commits[repository.branches["main"]]
    place.hub.corrupted.add("model.safetensors")
    assert "came twice with other bytes than the Hub lists" in place.refused(NAME)
    assert not any(path.stat().st_size == len(content["model.safetensors"]) for path in place.model_cache(NAME).glob("blobs/*"))


def test_only_what_is_needed_is_fetched(place: Place) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": safetensors(5000, i) for i in (1, 2, 3)}
    index = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate([*shards, *shards])}}).encode()
    needed = {
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b"{ }",
        "tokenizer_config.json": b"{  }",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": index,
        **shards,
    }
    place.hub.add("someone/full", {**needed, **{name: name.encode() * 200 for name in NOT_NEEDED}})
    found = place.resolve("someone/full")
    assert found.code == 0, found.output
    assert sorted(asked.name for asked in place.hub.fetched()) == sorted(needed)
    place.resolve("someone/full", trust_remote_code=True)
    assert place.hub.fetched()[-1].name == "modeling_own.py"
    assert place.resolve("someone/full", load_format="dummy", revision="main").code == 0


def test_random_weights_need_no_weights(place: Place) -> None:
    assert place.resolve(NAME, load_format="dummy").code == 0
    assert place.hub.fetched("*.safetensors") == []


def test_pickles_are_fetched_only_where_they_are_allowed(place: Place) -> None:
    files = repository_files()
    files["pytorch_model.bin"] = files.pop("model.safetensors")[::-1]
    files["optimizer.pt"] = bytes(2000)
    place.hub.add("someone/pickled", files)
    sentence = place.refused("someone/pickled")
    assert "only pickles such as pytorch_model.bin" in sentence
    assert "--allow-pickled-weights" in sentence
    assert place.hub.fetched() == []
    found = place.resolve("someone/pickled", allow_pickled_weights=True)
    assert found.code == 0, found.output
    assert sorted(asked.name for asked in place.hub.fetched()) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(place: Place) -> None:
    weights = {"model.safetensors": safetensors(5000)}
    place.hub.add("a/alien", {"config.json": b'{"model_type": "alien"}', **weights})
    assert place.refused("a/alien") == "nobody knows the model type 'alien'"
    place.hub.add("a/gguf", {"some-Q4.gguf": bytes(2000)})
    assert "download some-Q4.gguf and give its path" in place.refused("a/gguf")
    place.hub.add("a/mistral", {"config.json": b"{}", "consolidated.safetensors": safetensors(5000)})
    assert "has weights in consolidated.safetensors, but transformers reads model.safetensors" in place.refused("a/mistral")
    place.hub.add("a/nothing", {"README.md": b"soon"})
    assert "a/nothing has no config.json" in place.refused("a/nothing")
    index = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
    place.hub.add("a/hollow", {"config.json": b'{"model_type": "llama"}', "model.safetensors.index.json": index})
    assert "names model-00001-of-00001.safetensors, which the Hub does not list" in place.refused("a/hollow")
    assert [asked.name for asked in place.hub.fetched("*.safetensors")] == []


def test_a_branch_a_tag_and_a_commit(place: Place) -> None:
    repository = place.hub.repositories[NAME]
    old = repository.branches["main"]
    changed = {**repository_files(), "config.json": b'{"model_type": "llama", "is": "new"}'}
    new = repository.commit(changed)
    repository.branches["dev/next"], repository.tags["v1"] = new, old
    for revision, commit in ((None, new), ("v1", old), ("dev/next", new), (old, old)):
        found = place.resolve(NAME, revision=revision)
        assert found.folder is not None, found.output
        assert found.folder.name == commit
    assert len(place.hub.fetched("model.safetensors")) == 1
    offline = {"HF_HUB_OFFLINE": "1"}
    for revision, commit in ((None, new), ("v1", old)):
        found = place.resolve(NAME, revision=revision, environ=offline)
        assert found.folder is not None, found.output
        assert found.folder.name == commit
    assert place.refused(NAME, revision="v2").endswith("has no revision 'v2': it has main, dev/next, v1")
    assert f"{NAME} at revision 'v2' is not in the cache" in place.refused(NAME, revision="v2", environ=offline)


def test_a_file_that_is_too_large_for_http_is_left_to_the_library(place: Place) -> None:
    check_whole(place, place.resolve(NAME, environ={"RESOLVE_MAX_HTTP_BYTES": str(HALF)}))
    assert next(asked.path for asked in place.hub.asked if asked.method == "HEAD").endswith("/model.safetensors")


def test_a_damaged_file_in_the_cache_is_named_or_fetched_again(place: Place) -> None:
    found = place.resolve(NAME)
    assert found.folder is not None
    weights = (found.folder / "model.safetensors").resolve()
    os.truncate(weights, HALF)
    sentence = place.refused(NAME, environ={"HF_HUB_OFFLINE": "1"})
    assert sentence == (
        f"{found.folder}/model.safetensors is damaged, it has {HALF:,} bytes instead of {WEIGHT_BYTES:,}: start once without "
        "HF_HUB_OFFLINE, and it is fetched again"
    )
    assert len(place.hub.fetched("model.safetensors")) == 1
    check_whole(place, place.resolve(NAME))
    assert len(place.hub.fetched("model.safetensors")) == 2


def test_a_damaged_file_of_a_folder_is_named(tmp_path: Path, place: Place) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in repository_files().items():
        (folder / name).write_bytes(content)
    os.truncate(folder / "model.safetensors", HALF)
    assert place.refused(str(folder)).endswith(f"bytes instead of {WEIGHT_BYTES:,}: copy it there again")
    (folder / "model.safetensors").write_bytes(b"\n".join([b"<html>"] * 20))
    assert "its first bytes are no safetensors header: copy it there again" in place.refused(str(folder))


def test_nothing_is_asked_for_what_is_here(tmp_path: Path, place: Place) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in repository_files().items():
        (folder / name).write_bytes(content)
    assert place.resolve(str(folder)).folder == folder
    assert place.network_calls == []
    place.resolve(NAME)
    assert any("socket.connect" in call for call in place.network_calls)  # the guard sees what there is
    place.network_log.unlink()
    before = len(place.hub.asked)
    check_whole(place, place.resolve(NAME, environ={"HF_HUB_OFFLINE": "1"}))
    place.refused("someone/else", environ={"HF_HUB_OFFLINE": "1"})
    assert place.network_calls == []
    assert len(place.hub.asked) == before


def test_a_cached_model_is_served_while_the_hub_is_out_of_order(place: Place) -> None:
    found = place.resolve(NAME)
    place.hub.trouble("/api/*", status=503)
    again = place.resolve(NAME)
    assert again.folder == found.folder
    assert "what the cache holds of it is served" in again.output
