"""The frontend's log: one line an event on stderr, never with the text of a prompt unless that is asked for."""

from __future__ import annotations

import logging
import traceback

from engine.logs import ExceptionInfo, LogConfig, LogFormat, full_traceback
from engine.logs import set_up_logging as set_up
from server.request_record import log_context


def quiet_traceback(info: ExceptionInfo) -> str:
    """Where an exception came from and of which class it is, not its message: many quote the value they met."""
    lines: list[str] = []
    error = info[1]
    while error is not None:
        where = traceback.format_tb(error.__traceback__)
        lines = [*where, f"{type(error).__module__}.{type(error).__qualname__}\n", *lines]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(lines).rstrip("\n")


def set_up_logging(level: str, *, log_format: LogFormat = "human", log_prompts: bool = False) -> None:
    """level: a name of logging's, in any case. log_prompts: messages of exceptions may be written too."""
    describe = full_traceback if log_prompts else quiet_traceback
    set_up(LogConfig(level, log_format), "frontend", context=log_context, describe=describe)
    for name in ("uvicorn", "sse_starlette", "asyncio"):  # their debug lines would hold what clients write
        logging.getLogger(name).setLevel(logging.WARNING)
