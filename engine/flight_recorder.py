"""FlightRecorder: what the engine does, in memory that its parent reads when the engine can no longer tell.

The parent makes a file of `SIZE` bytes and both map it. A kill leaves what was written, and a stopped process need not be
asked. Every value is published after what it refers to, so that a kill between two writes leaves the older truth.

    0    beat_s        time.monotonic() of the last heartbeat
    8    turn_s        of the last turn of the engine's loop; expected_s: what the steps in flight should take, infinite where
                       that is not known
    24   num_launched  steps, since the process started; num_completed
    40   is_serving    1 once the model is loaded
    48   the request that is being taken in (length, id)
    256  two records of the requests in a step (number of the step, length, ids by lines): of the newest and the one before
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from engine.step import SchedulerOutput  # with numpy, which a frontend that starts has no time for

BEAT_INTERVAL_S = 0.5

_BEAT = struct.Struct("<d")
_TURN = struct.Struct("<dd")
_STEPS = struct.Struct("<QQ")
_SERVING = struct.Struct("<Q")
_HANDLED = struct.Struct("<I")
_ROWS = struct.Struct("<QI")
_BEAT_AT, _TURN_AT, _STEPS_AT, _SERVING_AT, _HANDLED_AT, _ROWS_AT = 0, 8, 24, 40, 48, 256
_MOST_HANDLED_BYTES = _ROWS_AT - _HANDLED_AT - _HANDLED.size
_ROWS_SIZE = 1 << 16
SIZE = _ROWS_AT + 2 * _ROWS_SIZE


class StepTimes:
    """How long the steps in flight should take together, by what steps of about as many tokens took before.

    Sizes are told apart by their power of two. A size that is new is expected to take as long, for each token, as the next
    smaller one that is known, or as long as the next larger one.
    """

    def __init__(self) -> None:
        self._durations_s: dict[int, float] = {}
        self._running: deque[int] = deque()  # tokens of the steps in flight
        self._started_s = 0.0  # when the oldest of them began

    def begin(self, num_tokens: int) -> None:
        if not self._running:
            self._started_s = time.monotonic()
        self._running.append(num_tokens)

    def withdraw(self) -> None:
        """The step that began last does not run after all."""
        self._running.pop()

    def end(self) -> None:
        """The oldest step has ended, and the next one, if there is one, has begun."""
        now = time.monotonic()
        duration_s, size = now - self._started_s, self._running.popleft().bit_length()
        before_s = self._durations_s.get(size, duration_s)
        self._durations_s[size] = max(duration_s, before_s + 0.1 * (duration_s - before_s))
        self._started_s = now

    def expected_s(self) -> float:
        """Of all steps in flight; infinite as long as nothing is known."""
        return sum(self._expected_s(num_tokens.bit_length()) for num_tokens in self._running)

    def _expected_s(self, size: int) -> float:
        durations = self._durations_s
        if size in durations:
            return durations[size]
        smaller = max((known for known in durations if known < size), default=None)
        if smaller is not None:
            return durations[smaller] * 2.0 ** (size - smaller)
        return min((durations[known] for known in durations), default=float("inf"))


class FlightRecorder:
    """The engine's side: writes. A few hundred nanoseconds a turn; the ids only when the rows of steps change."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
        self._times = StepTimes()
        self._num_launched = self._num_completed = 0
        self._slots: list[int] = []
        self._ids = b""
        self._recorded = [b"", b""]  # ids in each of the two records

    def start_beating(self) -> None:
        """Write the time every BEAT_INTERVAL_S from a thread, as long as the process runs."""

        def beat() -> None:
            while True:
                _BEAT.pack_into(self._memory, _BEAT_AT, time.monotonic())
                time.sleep(BEAT_INTERVAL_S)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def serving(self) -> None:
        """Loading is over."""
        self.turn()
        _SERVING.pack_into(self._memory, _SERVING_AT, 1)

    def turn(self) -> None:
        """The loop goes on."""
        _TURN.pack_into(self._memory, _TURN_AT, time.monotonic(), self._times.expected_s())

    def compiling(self) -> None:
        """A kernel is being compiled within the step, and nobody knows how long that takes; `turn` tells when it is done."""
        _TURN.pack_into(self._memory, _TURN_AT, time.monotonic(), float("inf"))

    def handling(self, request_id: str) -> None:
        """This request is being taken in; "" afterwards."""
        data = request_id.encode()[:_MOST_HANDLED_BYTES]
        self._memory[_HANDLED_AT + _HANDLED.size : _HANDLED_AT + _HANDLED.size + len(data)] = data
        _HANDLED.pack_into(self._memory, _HANDLED_AT, len(data))

    def launching(self, step: SchedulerOutput, read_ids: Callable[[], Iterable[str]]) -> None:
        """A step is about to be launched. read_ids: asked for its requests where they may not be those of the step before."""
        if step.new_rows or step.forks or step.slots != self._slots:
            self._slots = step.slots
            self._ids = _joined(read_ids())
        number = self._num_launched + 1
        start = _ROWS_AT + number % 2 * _ROWS_SIZE
        if self._recorded[number % 2] != self._ids:
            self._recorded[number % 2] = self._ids
            self._memory[start + _ROWS.size : start + _ROWS.size + len(self._ids)] = self._ids
        _ROWS.pack_into(self._memory, start, number, len(self._ids))
        self._times.begin(step.total_num_tokens)
        self._num_launched = number
        self.turn()
        self._publish()

    def withdrawn(self) -> None:
        """The step launched last did not fit."""
        self._num_launched -= 1
        self._times.withdraw()
        self._publish()

    def completed(self) -> None:
        """The result of the oldest step in flight is known."""
        self._num_completed += 1
        self._times.end()
        self._publish()

    def _publish(self) -> None:
        _STEPS.pack_into(self._memory, _STEPS_AT, self._num_launched, self._num_completed)


def _joined(request_ids: Iterable[str]) -> bytes:
    """Each id once, one a line, as many as there is room for."""
    ids = "\n".join(dict.fromkeys(request_ids)).encode()
    most = _ROWS_SIZE - _ROWS.size
    return ids if len(ids) <= most else ids[:most].rpartition(b"\n")[0]


class Flight(msgspec.Struct, frozen=True):
    """What the recorder held at one moment. expected_s: of the steps in flight; infinite where nothing is known."""

    beat_s: float
    turn_s: float
    expected_s: float
    num_launched: int
    num_completed: int
    is_serving: bool


class FlightReader:
    """The parent's side: makes the file, and reads it whatever has become of the engine."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(SIZE))
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)

    def read(self) -> Flight:
        memory = self._memory
        (beat_s,) = _BEAT.unpack_from(memory, _BEAT_AT)
        turn_s, expected_s = _TURN.unpack_from(memory, _TURN_AT)
        num_launched, num_completed = _STEPS.unpack_from(memory, _STEPS_AT)
        (is_serving,) = _SERVING.unpack_from(memory, _SERVING_AT)
        return Flight(beat_s, turn_s, expected_s, num_launched, num_completed, bool(is_serving))

    def request_ids(self) -> list[str]:
        """The requests in the steps that are in flight, and the one that is being taken in."""
        flight = self.read()
        ids = self._text(_HANDLED_AT + _HANDLED.size, _HANDLED.unpack_from(self._memory, _HANDLED_AT)[0])
        for start in (_ROWS_AT, _ROWS_AT + _ROWS_SIZE):
            number, length = _ROWS.unpack_from(self._memory, start)
            if flight.num_completed < number <= flight.num_launched:
                ids += self._text(start + _ROWS.size, length)
        return list(dict.fromkeys(ids))

    def _text(self, start: int, length: int) -> list[str]:
        return self._memory[start : start + length].decode(errors="replace").split("\n") if length else []
