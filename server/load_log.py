"""How a load is told on stderr: a line of the log a phase, and what comes bit by bit on a line of a terminal, written over.

Where stderr is no terminal, a download is a line of the log every few seconds.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from engine.logs import LogFormat
from engine.messages import LoadProgress

logger = logging.getLogger("octavo.server")

LOG_INTERVAL_S = 10.0
BAR_CHARS = 20
_CLEAR = "\r\x1b[K"


class LoadLog:
    """Called with each piece of progress. in_place: whether `stream` is a terminal whose line can be written over."""

    def __init__(self, stream: TextIO, *, in_place: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._in_place = in_place
        self._clock = clock
        self._is_shown = False
        self._phase = ""
        self._was_whole = False
        self._logged_s = -math.inf

    @classmethod
    def of_stderr(cls, log_format: LogFormat) -> LoadLog:
        """Takes care that a record of the log does not end up behind the line that is written over."""
        in_place = log_format == "human" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        made = cls(sys.stderr, in_place=in_place)
        if in_place:
            for handler in logging.getLogger().handlers:
                handler.addFilter(made._before_record)
        return made

    def __call__(self, progress: LoadProgress) -> None:
        fraction = progress.fraction
        detail = f": {progress.detail}" if progress.detail else ""
        if fraction is None:
            logger.info("%s%s", progress.phase, detail)
            self._phase, self._was_whole = "", False
            return
        if self._in_place and fraction < 1:
            self._show(progress, fraction)
            return
        now = self._clock()
        is_first = self._phase != progress.phase
        is_end = fraction >= 1 and not self._was_whole  # the disk may take a while yet, and nothing more is to be told
        if is_first or is_end or (fraction < 1 and now - self._logged_s >= LOG_INTERVAL_S):
            self._phase, self._logged_s, self._was_whole = progress.phase, now, fraction >= 1
            logger.info("%s%s (%d%%)", progress.phase, detail, 100 * fraction)

    def clear(self) -> None:
        """Take the line away that is written over, before something else is written."""
        if self._is_shown:
            self._is_shown = False
            self._stream.write(_CLEAR)
            self._stream.flush()

    def _show(self, progress: LoadProgress, fraction: float) -> None:
        filled = int(BAR_CHARS * fraction)
        bar = "━" * filled + "─" * (BAR_CHARS - filled) + " "
        width = shutil.get_terminal_size().columns - 1
        line = f"{progress.phase} {bar}{100 * fraction:3.0f}%  {progress.detail}"
        if len(line) > width:
            line = line.replace(bar, "", 1)
        # The cursor goes back to the first column: what another process writes then begins there.
        self._stream.write(f"{_CLEAR}{line[:width]}\r")
        self._stream.flush()
        self._is_shown = True

    def _before_record(self, _: logging.LogRecord) -> bool:
        self.clear()
        return True
