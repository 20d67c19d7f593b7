"""`octavo serve` with a Hub's model, from the command to an answer or to the sentence with which it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests import tiny_models
from tests.hub_harness import LIMIT_S, ROOT, Place, new_place

NAME, GATED, SECRET_TOKEN = "someone/model", "meta/gated", "hf_secret"
FLAGS = (
    "--device",
    "cpu",
    "--num-threads",
    "1",
    "--dtype",
    "float32",
    "--kv-cache-memory-bytes",
    "32M",
    "--log-level",
    "debug",
)
Change = Callable[[Place], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("hub")
    folder = tiny_models.build("llama", path / "model")
    with new_place(path) as made:
        made.hub.add(NAME, folder)
        made.hub.add(GATED, folder, gated=True)
        made.hub.tokens = {SECRET_TOKEN: {GATED}}
        yield made


def start(place: Place, name: str, *flags: str, **environ: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and its address once it serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", name, "--port", str(port), "--log-level", "debug", *FLAGS, *flags]
    started = {name: value for name, value in place.environ(**environ).items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=started, cwd=ROOT)
    return process, f"http://127.0.0.1:{port}"


def wait_for(process: subprocess.Popen[str], beginning: str) -> str:
    """The log up to a line."""
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith(beginning):
            return log
    raise AssertionError(f"the server ended with {process.wait(LIMIT_S)}:\n{log}")


def complete(url: str) -> str:
    prompt = {"prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}
    text: str = httpx.post(f"{url}/v1/completions", json=prompt, timeout=LIMIT_S).json()["choices"][0]["text"]
    return text


def answer(place: Place, name: str, *flags: str, **environ: str) -> tuple[str, str]:
    """(what it writes to a prompt, its log) of a server that is started for it, and ends in order."""
    process, url = start(place, name, *flags, **environ)
    log = wait_for(process, "Octavo serves ")
    try:
        text = complete(url)
    finally:
        process.send_signal(signal.SIGTERM)
        log += process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, log
    assert "Traceback" not in log
    return text, log


def refused(place: Place, name: str, *flags: str, **environ: str) -> tuple[str, str]:
    """(the sentence, the log) of a server that does not come to serve."""
    process, _ = start(place, name, *flags, **environ)
    try:
        log = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()
    assert process.returncode == 1, log
    assert "Traceback" not in log
    *_, last = log.splitlines()
    assert last.startswith("octavo: "), log
    assert log.count("octavo: ") == 1
    return last.removeprefix("octavo: "), log


def test_a_model_is_fetched_and_served_and_then_without_any_network(place: Place) -> None:
    place.hub.bytes_per_s = 300_000  # so that there is progress to be told
    text, log = answer(place, NAME)
    place.hub.bytes_per_s = None
    assert re.search(r" fetch: someone/model: 0\.\d\d of 0\.61 MB, \d\.\d MB/s \(\d\d?%\)\n", log), log
    assert place.hub.storage_url not in log
    assert [asked.name for asked in place.hub.fetched("*.safetensors")] == ["model.safetensors"]
    assert not any("harness" in asked.path for asked in place.hub.asked)
    before = len(place.hub.asked)
    place.network_log.unlink(missing_ok=True)
    again, log = answer(place, NAME, HF_HUB_OFFLINE="1")
    assert again == text
    assert place.network_calls == []
    assert len(place.hub.asked) == before


def test_a_gated_model_is_refused_by_the_command(place: Place) -> None:
    sentence, _ = refused(place, GATED)
    page = f"{place.hub.url}/{GATED}"
    assert sentence.startswith(f"{GATED} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account")


def test_a_local_folder_needs_no_network(place: Place, run_all: bool) -> None:
    if not run_all:
        pytest.skip("one more start: with --run-all")
    place.network_log.unlink(missing_ok=True)
    before = len(place.hub.asked)
    answer(place, str(place.path / "model"))
    assert place.network_calls == []
    assert len(place.hub.asked) == before


def test_a_gated_model_with_its_token(place: Place, run_all: bool) -> None:
    if not run_all:
        pytest.skip("one more start: with --run-all")
    text, log = answer(place, GATED, HF_TOKEN=SECRET_TOKEN, HF_DEBUG="1")
    assert text
    assert SECRET_TOKEN not in log


@dataclass(frozen=True)
class Refusal:
    """A start that ends with `sentence` (a part of it): of `name`, with flags and environment, after `change`."""

    sentence: str
    name: str = NAME
    flags: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()
    change: Change = lambda place: None


def pickled(place: Place) -> None:
    files = {path.name: path.read_bytes() for path in (place.path / "model").iterdir()}
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    place.hub.add("someone/pickled", files)


def images(place: Place) -> None:
    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vision_config": {}}'
    files = {path.name: path.read_bytes() for path in (place.path / "model").iterdir()}
    place.hub.add("someone/images", {**files, "config.json": config, "model.safetensors": bytes(5000)})


def damaged(place: Place) -> None:
    (weights,) = place.model_cache(NAME).glob("snapshots/*/model.safetensors")
    os.truncate(weights, 300_000)


def cut(place: Place) -> None:
    files = {path.name: path.read_bytes() for path in (place.path / "model").iterdir()}
    files["model.safetensors"] += bytes(8)
    place.hub.add("someone/cut", files)
    place.hub.trouble("model.safetensors", 5, cut_after=0)


REFUSALS = {
    "wrong token": Refusal("does not accept the token in HF_TOKEN", "a/b", environ=(("HF_TOKEN", "hf_wrong"),)),
    "unknown": Refusal(
        "no Hub model 'someone/modle': check the spelling (in the cache there is someone/model)", "someone/modle"
    ),
    "no id": Refusal("there is no file or folder some/one/model: give a Hub id", "some/one/model"),
    "revision": Refusal(f"{NAME} has no revision 'v9': it has main", flags=("--revision", "v9")),
    "off line": Refusal("is not in the cache", "a/b", environ=(("HF_HUB_OFFLINE", "1"),)),
    "nobody there": Refusal("cannot be reached", "a/b", environ=(("HF_ENDPOINT", "http://127.0.0.1:9"),)),
    "pickled": Refusal("pass --allow-pickled-weights", "someone/pickled", change=pickled),
    "images": Refusal("it takes images or audio", "someone/images", change=images),
    "cut": Refusal("start again, and it goes on from where it was", "someone/cut", change=cut),
    "no folder": Refusal("name another folder with --download-dir", flags=("--download-dir", "/dev/null")),
    "damaged": Refusal("bytes instead of", environ=(("HF_HUB_OFFLINE", "1"),), change=damaged),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_command_says(kind: str, place: Place, run_all: bool) -> None:
    if not run_all:
        pytest.skip("a start each: with --run-all")
    refusal = REFUSALS[kind]
    if not place.model_cache(NAME).exists():
        place.resolve(NAME)
    refusal.change(place)
    sentence, log = refused(place, refusal.name, *refusal.flags, **dict(refusal.environ))
    assert refusal.sentence in sentence
    assert not any(value in log for name, value in refusal.environ if name == "HF_TOKEN")
    if kind in ("pickled", "images"):
        assert not place.hub.fetched("*.bin")
        assert not any(asked.sent == 5000 for asked in place.hub.fetched("*.safetensors"))


def test_an_engine_that_takes_a_dead_one_s_place_has_its_weights(place: Place, run_all: bool) -> None:
    if not run_all:
        pytest.skip("two more starts: with --run-all")
    process, url = start(place, NAME)
    assert process.stderr is not None
    try:
        wait_for(process, "Octavo serves ")
        text = complete(url)
        before = len(place.hub.asked)
        other = tiny_models.build("llama", place.path / "other", seed=1)
        place.hub.repositories[NAME].commit({path.name: path.read_bytes() for path in other.iterdir()})
        (engine,) = [child for child in psutil.Process(process.pid).children() if "engine" in " ".join(child.cmdline())]
        engine.kill()
        assert complete(url) == text
        assert len(place.hub.asked) == before
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def test_a_killed_server_s_download_goes_on(place: Place, run_all: bool) -> None:
    if not run_all:
        pytest.skip("two more starts: with --run-all")
    path = Path("killed")
    held = place.hub.trouble("model.safetensors", 1, hold_after=300_000)
    process, _ = start(place, NAME, "--download-dir", str(place.path / path))
    assert held.reached.wait(LIMIT_S)
    assert process.stderr is not None
    assert any("fetch: someone/model: 0.30 of 0.61 MB" in line for line in process.stderr)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    held.released.set()
    before = len(place.hub.fetched("model.safetensors"))
    assert answer(place, NAME, "--download-dir", str(place.path / path))[0]
    assert [asked.range for asked in place.hub.fetched("model.safetensors")[before:]] == ["bytes=300000-"]
