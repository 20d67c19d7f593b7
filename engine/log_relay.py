"""LogRelay: the lines that an engine process writes to its stderr, on their way into the JSON log of its parent.

Its own records come as JSON and are passed on as they are. Everything else, what a library prints or the interpreter tells
when it dies, becomes one record for what came in one go. Only one process writes to the log then: no line is torn by another.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from engine.logs import MAX_LINE_CHARS, LogLine

QUIET_S = 0.1
READ_BYTES = 2**16

_decoder = msgspec.json.Decoder(LogLine)
_strays = logging.getLogger("engine.stderr")


class LogRelay:
    """process: the name of the one that writes, for lines that do not say."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._rest = b""
        self._strays: list[str] = []

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Until the other end is closed. What is no record is held for a moment, as the next line may belong to it."""
        while True:
            try:
                async with asyncio.timeout(QUIET_S if self._strays else None):
                    data = await reader.read(READ_BYTES)
            except TimeoutError:
                self._log_strays()
                continue
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._rest) > 4 * MAX_LINE_CHARS:  # no line of ours
                self._take(self._rest)
                self._rest = b""
        self._take(self._rest)
        self._log_strays()

    def _take(self, line: bytes) -> None:
        try:
            entry = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._strays.append(text)
            if len(self._strays) > 1000:
                self._log_strays()
            return
        self._log_strays()
        logger = logging.getLogger(entry.logger)
        level = logging.getLevelNamesMapping().get(entry.level.upper(), logging.ERROR)
        if logger.isEnabledFor(level):
            given = {"name": entry.logger, "levelno": level, "levelname": entry.level.upper(), "msg": entry.message}
            logger.handle(logging.makeLogRecord({**given, "json_line": line.decode()}))

    def _log_strays(self) -> None:
        if self._strays:
            text = "\n".join(self._strays)[:MAX_LINE_CHARS]
            self._strays.clear()
            _strays.warning("%s", text, extra={"from_process": self._process})
