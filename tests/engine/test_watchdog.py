"""The watchdog's judgement, by a clock of its own; and the flight recorder it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import flight_recorder
from engine.flight_recorder import Flight, FlightReader, FlightRecorder, StepTimes
from engine.sampling_params import SamplingParams
from engine.step import NewRow, SchedulerOutput
from engine.suspects import Suspects
from engine.watchdog import LOOK_INTERVAL_S, Watchdog


class Watched:
    """An engine as its parent sees it, over time."""

    def __init__(self, step_timeout_s: float = 15.0) -> None:
        self.watchdog = Watchdog(step_timeout_s)
        self.now_s = 100.0
        self.flight = {
            "beat_s": 1.0,
            "turn_s": 1.0,
            "expected_s": 0.0,
            "num_launched": 0,
            "num_completed": 0,
            "is_serving": True,
        }

    def complaint_after(self, seconds: float, *, beats: bool, turns: bool, is_stopped: bool = False) -> float | None:
        """Seconds until the watchdog complains; None where it does not within `seconds`."""
        for i in range(round(seconds / LOOK_INTERVAL_S)):
            self.now_s += LOOK_INTERVAL_S
            if beats:
                self.flight["beat_s"] += 0.25
            if turns:
                self.flight["turn_s"] += 0.25
            flight = Flight(**self.flight)  # type: ignore[arg-type]
            if self.watchdog.look(flight, self.now_s, is_stopped=is_stopped):
                return (i + 1) * LOOK_INTERVAL_S
        return None


def test_an_engine_that_beats_and_turns_is_well() -> None:
    assert Watched().complaint_after(1000, beats=True, turns=True) is None


def test_silence() -> None:
    assert Watched().complaint_after(100, beats=False, turns=False) == pytest.approx(5, abs=1)
    loading = Watched()
    loading.flight["is_serving"] = False
    assert loading.complaint_after(100, beats=False, turns=False) is None
    assert loading.complaint_after(100, beats=False, turns=False) is not None
    stopped = Watched()
    stopped.flight["is_serving"] = False
    assert stopped.complaint_after(100, beats=False, turns=False, is_stopped=True) == pytest.approx(5, abs=1)


@pytest.mark.parametrize(
    ("expected_s", "limit_s"), [(0.0, 15), (0.5, 15), (4.0, 40), (float("inf"), 300)], ids=["idle", "short", "long", "unknown"]
)
def test_the_limit_of_a_step_goes_by_what_it_should_take(expected_s: float, limit_s: float) -> None:
    engine = Watched()
    engine.flight["expected_s"] = expected_s
    assert engine.complaint_after(400, beats=True, turns=False) == pytest.approx(limit_s, abs=1)


def test_a_parent_that_was_held_up_or_suspended_does_not_blame_the_engine() -> None:
    engine = Watched()
    for _ in range(20):
        assert engine.complaint_after(3, beats=False, turns=False) is None
        engine.now_s += 3600  # the machine sleeps
        engine.flight["beat_s"] += 1
        engine.flight["turn_s"] += 1


# -- step times --------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(flight_recorder.time, "monotonic", lambda: time[0])
    return time


def step_of(times: StepTimes, now: list[float], num_tokens: int, seconds: float) -> None:
    times.begin(num_tokens)
    now[0] += seconds
    times.end()


def test_what_a_step_should_take(now: list[float]) -> None:
    times = StepTimes()
    times.begin(512)
    assert times.expected_s() == float("inf")
    now[0] += 2.0
    times.end()
    assert times.expected_s() == 0
    times.begin(600)
    assert times.expected_s() == pytest.approx(2.0)
    times.begin(2100)
    assert times.expected_s() == pytest.approx(2.0 + 8.0), "both in flight, the new size by its tokens"
    times.withdraw()
    now[0] += 2.0
    times.end()
    times.begin(3)
    assert times.expected_s() == pytest.approx(2.0), "no longer than a larger one"


def test_one_quick_step_does_not_make_the_next_suspicious(now: list[float]) -> None:
    times = StepTimes()
    step_of(times, now, 8, 1.0)
    step_of(times, now, 8, 0.01)
    times.begin(8)
    assert times.expected_s() > 0.8


# -- the recorder ------------------------------------------------------------------------------------------------------


def plan(slots: list[int], *, is_new: bool = False) -> SchedulerOutput:
    rows = [NewRow(slot, np.zeros(1, np.int32), 1, 0, SamplingParams(), 0, ([1],)) for slot in (slots if is_new else [])]
    return SchedulerOutput(step_id=0, new_rows=rows, slots=slots, start_positions=slots, num_tokens=[1] * len(slots))


def test_requests_of_the_steps_in_flight(tmp_path: Path) -> None:
    reader = FlightReader(tmp_path / "flight")
    recorder = FlightRecorder(tmp_path / "flight")
    assert reader.request_ids() == []
    recorder.serving()
    recorder.launching(plan([0, 1], is_new=True), lambda: ["a:1", "a:2", "a:1"])
    assert reader.request_ids() == ["a:1", "a:2"]
    recorder.launching(plan([0, 1]), lambda: pytest.fail("the rows are the same"))
    recorder.completed()
    assert reader.request_ids() == ["a:1", "a:2"]
    recorder.launching(plan([1, 2]), lambda: ["a:2", "a:3"])
    assert sorted(reader.request_ids()) == ["a:1", "a:2", "a:3"]
    recorder.completed()
    assert reader.request_ids() == ["a:2", "a:3"]
    recorder.withdrawn()
    assert reader.request_ids() == []
    recorder.launching(plan([5], is_new=True), lambda: ["a:4"])
    recorder.completed()
    recorder.handling("a:5")
    assert reader.request_ids() == ["a:5"]
    recorder.handling("")
    assert reader.request_ids() == []
    flight = reader.read()
    assert (flight.num_launched, flight.num_completed, flight.is_serving) == (3, 3, True)


def test_more_requests_than_there_is_room_for(tmp_path: Path) -> None:
    reader = FlightReader(tmp_path / "flight")
    recorder = FlightRecorder(tmp_path / "flight")
    ids = [f"0123456789ab:{i}" for i in range(5000)]
    recorder.launching(plan([0], is_new=True), lambda: ids)
    recorded = reader.request_ids()
    assert len(recorded) > 3000 and recorded == ids[: len(recorded)]


def test_a_step_that_compiles_gets_the_time_of_a_first_one(tmp_path: Path) -> None:
    reader, watchdog = FlightReader(tmp_path / "flight"), Watchdog(15.0)
    recorder = FlightRecorder(tmp_path / "flight")
    recorder.serving()
    recorder.launching(plan([0], is_new=True), lambda: ["a:1"])
    recorder.completed()
    recorder.launching(plan([0]), lambda: [])
    assert watchdog.step_limit_s(reader.read()) == 15.0
    before_s = reader.read().turn_s
    recorder.compiling()
    assert watchdog.step_limit_s(reader.read()) == 300.0 and reader.read().turn_s > before_s
    recorder.turn()  # it is compiled: the step has its own time from now on
    assert watchdog.step_limit_s(reader.read()) == 15.0


# -- suspects ----------------------------------------------------------------------------------------------------------


def test_deaths_count_until_a_token_comes() -> None:
    suspects, open_ids = Suspects(), {"a", "b", "c"}
    assert not suspects
    assert suspects.blame(["a", "b"], open_ids) == []
    suspects.clear("b")
    assert suspects.blame(["a", "b", "gone"], open_ids) == []
    assert suspects.runs_alone("a") and not suspects.runs_alone("b") and not suspects.runs_alone("gone")
    assert suspects.blame(["a", "c"], open_ids) == ["a"]
    suspects.clear("b")
    suspects.clear("c")
    assert suspects.blame([], open_ids - {"a"}) == [] and not suspects
