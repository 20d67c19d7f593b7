"""The frontend's log: one line an event on stderr, never with the text of a prompt unless that is asked for."""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_TIME_FORMAT = "%H:%M:%S"

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class QuietFormatter(logging.Formatter):
    """Writes where an exception came from and of which class it is, not its message: many quote the value they met."""

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802: logging's name
        lines: list[str] = []
        error = ei[1]
        while error is not None:
            where = traceback.format_tb(error.__traceback__)
            lines = [*where, f"{type(error).__module__}.{type(error).__qualname__}\n", *lines]
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "".join(lines).rstrip("\n")


def set_up_logging(level: str, *, log_prompts: bool = False) -> None:
    """level: a name of logging's, in any case. log_prompts: messages of exceptions may be written too."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter if log_prompts else QuietFormatter
    handler.setFormatter(formatter(_FORMAT, _TIME_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "sse_starlette", "asyncio"):  # their debug lines would hold what clients write
        logging.getLogger(name).setLevel(logging.WARNING)
