"""StepClock: long steps leave time before the next is planned, short and unknown ones none."""

from __future__ import annotations

import pytest

from engine import step_clock
from engine.step_clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: time[0])
    return time


def run(clock: StepClock, now: list[float], num_tokens: int, seconds: float, host_s: float = 0.001) -> None:
    clock.launched(num_tokens, host_s)
    now[0] += seconds
    clock.finished()


def test_a_long_step_leaves_time(now: list[float]):
    clock = StepClock()
    for _ in range(60):
        run(clock, now, 1000, 0.040)
    clock.launched(1010, 0.001)
    spare = clock.spare_s()
    assert 0.040 * 0.75 - 2 * 0.0011 - clock.MARGIN_S < spare < 0.030
    now[0] += spare
    assert clock.spare_s() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(1000, 0.007), (300, 0.040)])
def test_short_and_unknown_steps_leave_none(now: list[float], num_tokens: int, seconds: float):
    clock = StepClock()
    assert clock.spare_s() == 0.0, "nothing runs"
    run(clock, now, num_tokens, seconds)
    clock.launched(1000, 0.001)
    assert clock.spare_s() == 0.0


def test_a_step_begins_when_the_one_before_ends(now: list[float]):
    clock = StepClock()
    run(clock, now, 1000, 0.040)
    clock.launched(1000, 0.001)
    now[0] += 0.005
    clock.launched(500, 0.001)
    now[0] += 0.035
    clock.finished()
    first = clock.spare_s()
    clock.finished()
    assert first == 0.0, "500 tokens have not been seen yet"
    run(clock, now, 1000, 0.020)
    clock.launched(1000, 0.001)
    assert 0.0 < clock.spare_s() < 0.015
