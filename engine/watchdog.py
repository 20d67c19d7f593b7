"""Watchdog: judges from the flight recorder whether an engine process still lives and gets on."""

from __future__ import annotations

from engine.flight_recorder import Flight

LOOK_INTERVAL_S = 0.25
BEAT_TIMEOUT_S = 5.0
# While loading, a library may keep the interpreter to itself for long: only the kernel knows then whether it is stopped.
LOADING_BEAT_TIMEOUT_S = 120.0
STEP_FACTOR = 10.0
# Nothing is known of how fast this model is before its first step, nor of how long a compiler takes.
FIRST_STEP_FACTOR = 20.0


class _Standstill:
    """For how long a value has not changed, in the time that the observer itself was awake: a machine that was suspended, or a
    frontend that was held up, is nothing the engine could help."""

    def __init__(self) -> None:
        self._value = -1.0
        self.seconds = 0.0

    def see(self, value: float, elapsed_s: float) -> None:
        if value != self._value:
            self._value, self.seconds = value, 0.0
        else:
            self.seconds += min(elapsed_s, 2 * LOOK_INTERVAL_S)


class Watchdog:
    """Of one life of the engine. step_timeout_s: what any turn of its loop may take; a step whose tokens should take longer
    gets STEP_FACTOR times that."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._beat = _Standstill()
        self._turn = _Standstill()
        self._looked_s: float | None = None

    @property
    def beat_age_s(self) -> float:
        """For how long the process has shown no sign of life."""
        return self._beat.seconds

    def step_limit_s(self, flight: Flight) -> float:
        """What the present turn may take."""
        if flight.expected_s == float("inf"):
            return FIRST_STEP_FACTOR * self._step_timeout_s
        return max(self._step_timeout_s, STEP_FACTOR * flight.expected_s)

    def look(self, flight: Flight, now_s: float, *, is_stopped: bool) -> str | None:
        """What is wrong, in a sentence; None while nothing is. is_stopped: the kernel says so."""
        elapsed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        self._beat.see(flight.beat_s, elapsed_s)
        limit_s = BEAT_TIMEOUT_S if flight.is_serving or is_stopped else LOADING_BEAT_TIMEOUT_S
        if self._beat.seconds >= limit_s:
            state = "is stopped" if is_stopped else "shows no sign of life"
            return f"the engine process {state} (no heartbeat for {self._beat.seconds:.0f} s)"
        if not flight.is_serving:
            return None
        self._turn.see(flight.turn_s, elapsed_s)
        limit_s = self.step_limit_s(flight)
        if self._turn.seconds < limit_s:
            return None
        number = flight.num_completed + 1
        what = f"step {number}" if flight.num_launched > flight.num_completed else f"the engine, after step {number - 1},"
        return f"{what} has been stuck for {self._turn.seconds:.0f} s (allowed are {limit_s:.0f} s)"
