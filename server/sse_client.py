"""Server-sent events as a client reads them: https://html.spec.whatwg.org/multipage/server-sent-events.html, 9.2.6."""

from __future__ import annotations

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Bytes in, cut anywhere; the data of events out.

    Names, ids and comments are passed over: OpenAI's events say everything in their data. Lines may end in LF, CRLF or CR;
    several `data` lines make one event, joined by LF.
    """

    def __init__(self) -> None:
        self._rest = b""  # the line that has not ended yet
        self._data: list[bytes] = []  # of the event that has not ended yet
        self._is_after_cr = False
        self._is_first_line = True

    def push(self, part: bytes) -> list[bytes]:
        """The data of every event that ends in this part of the stream."""
        if self._is_after_cr and part.startswith(b"\n"):
            part, self._is_after_cr = part[1:], False  # the second half of a CRLF
        if part:
            self._is_after_cr = part.endswith(b"\r")
        if b"\r" in part:
            part = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + part).split(b"\n")
        if self._is_first_line and lines:
            self._is_first_line = False
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        return self._take(lines)

    def finish(self) -> list[bytes]:
        """The event that the stream's end left without its blank line: servers forget it after the last one."""
        return self._take([self._rest, b""])

    def _take(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line == b"data":
                self._data.append(b"")
        return events
