"""The example programs against a real server with the demo model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import example_completion
import example_dialogue
import pytest
from bench_process import free_port, octavo_command, octavo_environ, running

START_LIMIT_S = 240


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with running([*octavo_command("demo", port, "demo"), "--dtype", "float32"], octavo_environ(), port, log) as server:
        server.wait_ready(START_LIMIT_S)
        yield f"{server.base_url}/v1"


def test_a_text_is_completed_as_it_comes(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example_completion.main(["--base-url", base_url, "--max-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The quick brown fox")
    assert out.endswith("4 tokens in the prompt, 12 generated\n")


def test_two_talk_in_turns_and_the_cache_serves_what_was_said(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example_dialogue.main(["--base-url", base_url, "--turns", "4"]) == 0
    talk, _, figures = capsys.readouterr().out.strip().rpartition("\n\n")
    lines = talk.split("\n")
    assert [line.partition(": ")[0] for line in lines] == ["Alice", "Bob", "Alice", "Bob", "Alice"]
    # A stop string never shows, so no line holds another's turn.
    assert all(line.partition(": ")[2] and not re.search(r"\b(Alice|Bob):", line.partition(": ")[2]) for line in lines)
    numbers = re.findall(r"([\d,]+)(?= \(| tokens in| were)", figures)
    prompt, cached, computed = (int(number.replace(",", "")) for number in numbers)
    assert prompt == cached + computed
    # From the second turn on all but the last line, and what of a page it begins, comes from the cache.
    assert cached > prompt / 2


def test_a_refusal_is_told_as_one(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for program in (example_completion, example_dialogue):
        assert program.main(["--base-url", base_url, "--model", "no-such-model"]) == 1
        error = capsys.readouterr().err
        assert f"{base_url} answered with an error" in error and "404" in error


def test_a_server_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    for program in (example_completion, example_dialogue):
        assert program.main(["--base-url", url]) == 1
        assert f"{url} did not answer" in capsys.readouterr().err
