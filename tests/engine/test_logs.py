"""The two forms of a log line, and what an engine's stderr becomes on its way into a JSON log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from engine.log_relay import LogRelay
from engine.logs import JsonFormatter, LogConfig, full_traceback, no_context, set_up_logging

RECORD = re.compile(r"^\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR|CRITICAL) ", re.MULTILINE)
NASTY = "a\nb\r\x1b[31m\x85\u2028c\ud800"


class Request:
    def sentence(self) -> str:
        return "GET /x 200"

    def fields(self) -> dict[str, Any]:
        return {"path": "/x", "total_s": 0.5, "number": 2**70, "nan": float("nan"), "odd": {1}}


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before[0], before[1]


def written(root: logging.Logger, kind: str, **context: str) -> io.StringIO:
    """Where the log goes to from now on."""
    set_up_logging(LogConfig("debug", kind), "engine", context=lambda: context)  # type: ignore[arg-type]
    stream = io.StringIO()
    root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
    return stream


def test_a_line_of_json(root: logging.Logger) -> None:
    stream = written(root, "json", request_id="r1", trace_id="t1")
    logging.getLogger("a.b").warning("%d of %s", 3, "it", extra={"fields": {"more": [1]}})
    logging.getLogger("a.b").info("request", extra={"summary": Request()})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    ids = {"process": "engine", "request_id": "r1", "trace_id": "t1"}
    assert first == {"level": "warning", "logger": "a.b", "message": "3 of it", "more": [1], **ids}
    assert (second["message"], second["path"], second["total_s"], second["nan"]) == ("request", "/x", 0.5, None)


def test_a_traceback_is_one_field(root: logging.Logger) -> None:
    stream = written(root, "json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("a").exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["traceback"].endswith("ValueError: two\nlines")


def test_whatever_is_logged_is_one_line_of_json(root: logging.Logger) -> None:
    stream = written(root, "json")
    logger = logging.getLogger("a")
    logger.info("%s", NASTY)
    logger.info("%d", "no number")
    logger.info("%s and %s", *[1])
    logger.info({"not": "text"})
    lines = stream.getvalue().strip("\n").split("\n")
    messages = [json.loads(line)["message"] for line in lines]
    assert messages[0] == NASTY
    assert messages[1:3] == [f"{text!r} (logged with arguments that do not fit)" for text in ("%d", "%s and %s")]
    assert messages[3] == "{'not': 'text'}"


def test_a_line_for_people(root: logging.Logger) -> None:
    stream = written(root, "human", request_id="r1")
    logging.getLogger("a").info("it is so")
    logging.getLogger("a").info("request", extra={"summary": Request()})
    one, two = stream.getvalue().splitlines()
    assert RECORD.match(one) and one.endswith(" INFO    it is so [r1]") and two.endswith(" INFO    GET /x 200 [r1]")


def test_no_message_looks_like_a_line_of_its_own(root: logging.Logger) -> None:
    stream = written(root, "human", request_id="r1")
    forged = "so\n12:00:00 INFO    forged\r\x1b[2K12:00:00 INFO    forged\x8512:00:00 ERROR   forged"
    logging.getLogger("a").info("%s", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("a").exception("it failed")
    text = stream.getvalue()
    assert len(RECORD.findall(text)) == 2 and not re.search("[\r\x1b\x85]", text)
    assert text.splitlines()[0].endswith("INFO    so [r1]")


def test_what_nobody_caught_is_logged() -> None:
    program = (
        "import threading, warnings\n"
        "from engine.logs import LogConfig, log_strays, set_up_logging\n"
        "set_up_logging(LogConfig('info', 'json'), 'engine'); log_strays()\n"
        "warnings.warn('old\\nthing')\n"
        "class Leaky:\n    def __del__(self): raise OSError('in a destructor')\n"
        "Leaky()\n"
        "def fail(): raise KeyError('in a thread')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "raise RuntimeError('at the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    warning, destructor, thread, end = map(json.loads, done.stderr.splitlines())
    assert warning["logger"] == "py.warnings" and "old\nthing" in warning["message"] and done.returncode == 1
    assert "in a destructor" in destructor["traceback"] and "in a thread" in thread["traceback"]
    assert end["level"] == "critical" and end["traceback"].endswith("RuntimeError: at the end")


def relayed(root: logging.Logger, *parts: bytes | float) -> list[dict[str, Any]]:
    """What a JSON log has of what an engine writes; a number is a pause in seconds."""

    async def run() -> None:
        reader = asyncio.StreamReader()
        relaying = asyncio.create_task(LogRelay("engine").run(reader))
        for part in parts:
            if isinstance(part, bytes):
                reader.feed_data(part)
            await asyncio.sleep(0 if isinstance(part, bytes) else part)
        reader.feed_eof()
        await relaying

    set_up_logging(LogConfig("info", "json"), "frontend")
    stream = io.StringIO()
    root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
    asyncio.run(run())
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def line_of(message: str, level: int = logging.INFO) -> bytes:
    record = logging.makeLogRecord({"name": "engine.core", "levelno": level, "msg": message})
    record.levelname = logging.getLevelName(level)
    return JsonFormatter("engine", no_context, full_traceback).format(record).encode() + b"\n"


def test_an_engines_own_lines_are_passed_on(root: logging.Logger) -> None:
    line = line_of("ä\nb")
    half = len(line) // 2
    lines = relayed(root, line[:half], line[half:] + line_of("quiet", logging.DEBUG))
    assert lines == [json.loads(line)] and lines[0]["process"] == "engine"


def test_what_else_it_writes_becomes_a_record(root: logging.Logger) -> None:
    lines = relayed(root, b"Fatal error\n  File x\n", b"\n", line_of("between"), b"{}\n\xff 7\n", b'{"level": "no record"}')
    assert [line["message"] for line in lines] == ["Fatal error\n  File x", "between", '{}\n� 7\n{"level": "no record"}']
    assert {line["process"] for line in lines} == {"engine"} and lines[0]["logger"] == "engine.stderr"


def test_after_a_moment_it_is_a_record_of_its_own(root: logging.Logger) -> None:
    assert [line["message"] for line in relayed(root, b"one\n", 0.5, b"two\n")] == ["one", "two"]


def test_a_line_without_end_is_cut(root: logging.Logger) -> None:
    lines = relayed(root, *[b"x" * 2**16] * 40, b"\n", line_of("after"))
    assert lines[-1]["message"] == "after" and len(lines) < 5
