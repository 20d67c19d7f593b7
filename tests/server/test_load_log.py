"""How a load is told, on a terminal and in a log."""

from __future__ import annotations

import io
import logging

import pytest

from engine.messages import LoadProgress
from server.load_log import LOG_INTERVAL_S, LoadLog


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_has_a_line_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock, stream = Clock(), io.StringIO()
    log = LoadLog(stream, in_place=False, clock=clock)
    log(LoadProgress("resolve", "a/b", None))
    for second in range(101):
        clock.now_s = second
        log(LoadProgress("fetch", f"a/b: {second} of 100 MB", second / 100))
    log(LoadProgress("fetch", "a/b: 100 of 100 MB", 1.0))
    log(LoadProgress("load", "a/b", None))
    log(LoadProgress("warm up", "", None))
    fetched = [f"fetch: a/b: {second} of 100 MB ({second}%)" for second in range(0, 101, int(LOG_INTERVAL_S))]
    assert caplog.messages == ["resolve: a/b", *fetched, "load: a/b", "warm up"]
    assert stream.getvalue() == ""


def test_a_terminal_has_one_line_that_goes_away(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    log = LoadLog(stream, in_place=True)
    log(LoadProgress("fetch", "a/b: 1.00 of 4.00 GB, 85.0 MB/s", 0.25))
    assert stream.getvalue() == "\r\x1b[Kfetch  25%  a/b: 1.00 of 4.00 GB, 85.0 MB/s\r"  # the bar did not fit
    log.clear()
    log.clear()
    assert stream.getvalue().endswith("\r\r\x1b[K")
    assert caplog.messages == []
    monkeypatch.setenv("COLUMNS", "80")
    log(LoadProgress("fetch", "a/b: 1.00 of 4.00 GB, 85.0 MB/s", 0.25))
    assert stream.getvalue().endswith("\x1b[Kfetch " + "━" * 5 + "─" * 15 + "  25%  a/b: 1.00 of 4.00 GB, 85.0 MB/s\r")
    log(LoadProgress("fetch", "a/b: 4.00 of 4.00 GB, 85.0 MB/s", 1.0))
    assert caplog.messages == ["fetch: a/b: 4.00 of 4.00 GB, 85.0 MB/s (100%)"]
