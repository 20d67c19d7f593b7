"""scripts/soak.py: a few seconds of it against a real server, and that it sees what it is there to see."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import cast

import pytest
import soak
from server_watch import GAUGES, ServerWatch, Vitals
from soak_load import Load

from server.bench_http import Connections, Response
from tests.tiny_config import make_folder

GOOD = Vitals(10, 11, 100 * 2**20, 400 * 2**20, 20, 15, dict.fromkeys(GAUGES, 0.0))
SAME = b'data: {"choices": [{"text": "one"}]}\n\ndata: [DONE]\n\n'
FLAGS = (
    "--load-format", "dummy", "--dtype", "float32", "--max-model-len", "256", "--num-kv-blocks", "256", "--num-threads", "1",
)  # fmt: skip


@pytest.mark.timeout(900)
def test_a_soak_of_some_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str], run_all: bool) -> None:
    kills = ("--kill-every", "5") if run_all else ()
    load = ("--minutes", "0.5" if run_all else "0.1", "--rounds", "2", "--clients", "6")
    code = soak.main(["--model", str(make_folder(tmp_path / "model")), *load, *kills, *FLAGS])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "All came back." in output and output.count("nothing") == 2, output


def verdict(*at_rest: Vitals, num_kills: int = 0) -> list[str]:
    options = argparse.Namespace(seed=0, rounds=2, minutes=1)
    load = Load("http://127.0.0.1:1", 0, may_refuse=False, compare=True)
    run = soak.Soak(cast(ServerWatch, None), load, options)
    run.at_rest, run.num_kills = list(at_rest), num_kills
    return soak.verdict(run, load, 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frontend_rss_bytes": 200 * 2**20}, "the frontend's memory grew from 100 to 200 MiB"),
        ({"engine_rss_bytes": 500 * 2**20}, "the engine's memory grew"),
        ({"frontend_fds": 40}, "40 file descriptors"),
        ({"metrics": dict.fromkeys(GAUGES, 0.01)}, "not everything came to rest"),
        ({"engine_pid": 12}, "the engine died"),
        ({"engine_pid": 0}, "a process is gone"),
    ],
)
def test_what_does_not_come_back(changes: dict[str, object], words: str) -> None:
    assert verdict(GOOD, GOOD) == []
    assert words in verdict(GOOD, dataclasses.replace(GOOD, **changes))[0]  # type: ignore[arg-type]


def test_another_engine_is_in_order_after_a_kill() -> None:
    assert verdict(GOOD, dataclasses.replace(GOOD, engine_pid=12), num_kills=1) == []


@pytest.mark.parametrize(
    ("kind", "status", "body", "outcome"),
    [
        ("chat", 200, b"data: {}\n\ndata: [DONE]\n\n", "ok"),
        ("chat", 200, b"data: {}\n\n", "failed"),
        ("chat", 200, b'data: {"error": {}}\n\ndata: [DONE]\n\n', "failed"),
        ("chat", 500, b"{}", "failed"),
        ("chat", 503, b"{}", "failed"),
        ("chat", 400, b"{}", "failed"),
        ("wrong", 400, b"{}", "ok"),
        ("wrong", 200, b"{}", "failed"),
        ("chat", 429, b"{}", "refused"),
        ("same", 200, SAME, "ok"),
        ("same", 200, SAME.replace(b"one", b"two"), "failed"),
    ],
)
def test_how_answers_are_judged(kind: str, status: int, body: bytes, outcome: str) -> None:
    load = Load("http://127.0.0.1:1", 0, may_refuse=False, compare=True)
    response = Response(Connections("http://127.0.0.1:1"), "POST", "/")
    response.headers = {"content-type": "text/event-stream", "retry-after": "1"}
    response.status = 200
    load.judge("same", "/v1/completions", response, SAME)  # the text that later ones are compared with
    load.tally.outcomes.clear()
    response.status = status
    load.judge(kind, "/v1/completions", response, body)
    assert load.tally.outcomes[outcome] == 1, load.tally


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--minutes", "1e9"], ["--clients", "0"], ["--kill-every", "0"]])
def test_bounds(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        soak.parse(flags)
