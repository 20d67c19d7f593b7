"""Places where tests let the engine die, so that every way of dying can be repeated. Never armed otherwise."""

from __future__ import annotations

import ctypes
import os
import signal
import time

from engine.messages import CrashKind, CrashPlace, CrashPoint
from engine.step import SchedulerOutput


class ArmedCrashPoint:
    """A crash point in a running engine."""

    def __init__(self, point: CrashPoint, epoch: int) -> None:
        self._point = point
        self._left = point.step if point.epochs is None or epoch in point.epochs else 0
        self._is_marked = point.token_id is None

    def planned(self, step: SchedulerOutput) -> None:
        """Look at the prompts that a step begins with."""
        if self._point.token_id is not None:
            self._is_marked = any(self._point.token_id in row.token_ids[: row.num_prompt_tokens] for row in step.new_rows)

    def reached(self, place: CrashPlace) -> None:
        """Die here, if it is time."""
        if place != self._point.place or not self._left or not self._is_marked:
            return
        self._left -= 1
        if not self._left:
            die(self._point.kind)


def die(kind: CrashKind) -> None:
    """In the given way, of which "cuda_error" and "memory_error" leave it to the caller."""
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "cuda_error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (a test)")
        case "memory_error":
            raise MemoryError("no memory (a test)")
        case "hang":
            while True:
                time.sleep(60)
        case "spin":
            ctypes.PyDLL(None).pause()  # a call that keeps the interpreter's lock
