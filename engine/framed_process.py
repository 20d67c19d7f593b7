"""Asking a child process one thing at a time over its pipes: frames of 4 bytes of length and content, and a time limit."""

from __future__ import annotations

import subprocess
import threading
from typing import IO

_HEADER_BYTES = 4


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Send one frame. Raises BrokenPipeError where nobody reads any more."""
    stream.write(len(content).to_bytes(_HEADER_BYTES, "little") + content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame's content; None at the end of the stream, also where it comes in the middle."""
    header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    size = int.from_bytes(header, "little")
    content = stream.read(size)
    return content if len(content) == size else None


def exchange(process: subprocess.Popen[bytes], content: bytes | None, limit_s: float) -> tuple[bytes | None, bool]:
    """Send a frame (None: only listen), and wait for the answer; a process that takes longer than limit_s is killed.

    Returns the answer, None where the process ended instead, and whether that was for taking too long.
    """
    assert process.stdin is not None and process.stdout is not None
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        if content is not None:
            write_frame(process.stdin, content)
        return read_frame(process.stdout), timed_out.is_set()
    except BrokenPipeError:
        return None, timed_out.is_set()
    finally:
        timer.cancel()
