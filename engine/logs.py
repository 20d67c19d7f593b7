"""How both processes write their logs: a line a record on stderr, for people to read or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Protocol

import msgspec

LogFormat = Literal["human", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("human", "json")
MAX_LINE_CHARS = 256 * 1024

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
Context = Callable[[], Mapping[str, str]]
"""What else is known where a record is made, such as the request it is about."""
DescribeException = Callable[[ExceptionInfo], str]


class Summary(Protocol):
    """What a record may bring as its `summary`, beside a message of a word or two: the same as a sentence and as fields."""

    def sentence(self) -> str: ...
    def fields(self) -> dict[str, Any]: ...


# Everything but a tab and a line break that a terminal, or a program that splits lines, takes for more than a character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_CONTINUED = "\n    "


class LogConfig(msgspec.Struct, frozen=True):
    """level: a name of logging's, in small letters."""

    level: str = "info"
    format: LogFormat = "human"


class LogLine(msgspec.Struct, kw_only=True):
    """What every line of a JSON log has; more fields may follow."""

    time: str
    level: str
    logger: str
    process: str
    message: str


def full_traceback(info: ExceptionInfo) -> str:
    return "".join(traceback.format_exception(info[1])).rstrip("\n") if info[1] is not None else ""


class HumanFormatter(logging.Formatter):
    """Time, level, message, and in brackets the request it is about. What goes on over several lines is indented, so that
    no line but a record's first looks like one, whatever the message holds."""

    def __init__(self, context: Context, describe: DescribeException) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._context = context
        self._describe = describe

    def formatMessage(self, record: logging.LogRecord) -> str:
        summary: Summary | None = record.__dict__.get("summary")
        if summary is not None:
            record.message = summary.sentence()
        line = super().formatMessage(record)
        request_id = self._context().get("request_id")
        end = f" [{request_id}]" if request_id else ""
        if line.isprintable():
            return line + end
        first, *rest = _CONTROL.sub(_escaped, line.rstrip("\n")).split("\n")
        return _CONTINUED.join([first + end, *rest])

    def formatException(self, ei: ExceptionInfo) -> str:
        lines = _CONTROL.sub(_escaped, self._describe(ei)).split("\n")
        return "    " + _CONTINUED.join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, process, message, what the context knows, then the record's own
    `fields` or `summary`, and with an exception its traceback."""

    def __init__(self, process: str, context: Context, describe: DescribeException) -> None:
        super().__init__()
        self._process = process
        self._context = context
        self._describe = describe

    def format(self, record: logging.LogRecord) -> str:
        known = record.__dict__
        if (line := known.get("json_line")) is not None:
            return str(line)
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": known.get("from_process", self._process),
            "message": _message(record),
            **self._context(),
            **known.get("fields", {}),
        }
        summary: Summary | None = known.get("summary")
        if summary is not None:
            entry.update(summary.fields())
        if record.exc_info and record.exc_info[1] is not None:
            entry["traceback"] = self._describe(record.exc_info)[:MAX_LINE_CHARS]
        return _encode(entry)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage().rstrip("\n")[:MAX_LINE_CHARS]
    except Exception:  # some library's mistake, which is not to become a line that is no JSON
        return f"{record.msg!r} (logged with arguments that do not fit)"


def _encode(entry: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(entry, enc_hook=str).decode()
    except UnicodeEncodeError:  # half a character, which this library does not write
        return json.dumps(entry, default=str)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def no_context() -> Mapping[str, str]:
    return {}


def set_up_logging(
    config: LogConfig, process: str, *, context: Context = no_context, describe: DescribeException = full_traceback
) -> None:
    """From now on everything that is logged goes to stderr. process: frontend or engine, for the JSON lines."""
    handler = logging.StreamHandler()
    is_json = config.format == "json"
    handler.setFormatter(JsonFormatter(process, context, describe) if is_json else HumanFormatter(context, describe))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    # No line names them, and they are a fifth of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def log_strays() -> None:
    """Has what Python writes to stderr by itself logged: warnings, and exceptions that nobody caught."""
    logging.captureWarnings(True)
    logger = logging.getLogger("python")

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        logger.critical("an error that nobody caught: %s", kind.__name__, exc_info=(kind, error, trace))

    def on_thread_exception(given: threading.ExceptHookArgs) -> None:
        if given.exc_type is not SystemExit and given.exc_value is not None:
            info = (given.exc_type, given.exc_value, given.exc_traceback)
            logger.error("an error that nobody caught in a thread: %s", given.exc_type.__name__, exc_info=info)

    def on_unraisable(given: sys.UnraisableHookArgs) -> None:
        if given.exc_value is not None:
            info = (given.exc_type, given.exc_value, given.exc_traceback)
            logger.error("an error where nobody could catch it: %s", given.exc_type.__name__, exc_info=info)

    sys.excepthook = on_exception
    threading.excepthook = on_thread_exception
    sys.unraisablehook = on_unraisable
