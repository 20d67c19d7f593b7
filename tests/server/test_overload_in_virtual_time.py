"""Minutes of load on a simulated engine, in virtual time: who waits too long is refused, and nobody else."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest

from tests.server.simulated_engine import Counts, Machine, Request, Simulation

SECONDS = 60.0
CPU = Machine()
GPU = Machine(num_slots=64, num_step_tokens=1024, step_s=0.02, token_s=0.0001, prompt_token_s=0.00002)


def spread(draw: random.Random, prompt_len: int, output_len: int, share: float) -> Callable[[], Request]:
    """Requests whose answers are up to that share shorter or longer."""
    return lambda: Request(prompt_len, max(1, round(output_len * (1 + share * (2 * draw.random() - 1)))))


@cache
def capacity(machine: Machine, prompt_len: int, output_len: int, share: float) -> float:
    """Answers a second while more clients than there are slots ask without end."""
    simulation = Simulation(machine, max_wait_s=0)
    simulation.come_in_circles(machine.num_slots * 3 // 2, 1e9, spread(random.Random(1), prompt_len, output_len, share))
    simulation.run(40.0)
    began_s = simulation.now
    ended = simulation.run(160.0).num_ended
    return ended / (simulation.now - began_s)


def at_rest(simulation: Simulation) -> bool:
    backlog = simulation.backlog
    return (backlog.wait_s(), backlog.tokens_ahead()) == (0.0, 0) and not backlog._running and not any(backlog._open)


LOADS = {
    "demo": (CPU, 128, 64, 0.0),
    "demo, mixed lengths": (CPU, 128, 64, 0.5),
    "long prompts": (CPU, 1000, 64, 0.0),
    "gpu": (GPU, 512, 64, 0.0),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", LOADS)
def test_at_four_times_its_capacity_first_tokens_come_within_twice_their_time_at_capacity(load: str, seed: int) -> None:
    machine, prompt_len, output_len, share = LOADS[load]
    rate = capacity(machine, prompt_len, output_len, share)
    draw = random.Random(seed)
    make = spread(draw, prompt_len, output_len, share)
    simulation = Simulation(machine)
    settled_s = machine.num_slots / rate  # as long as an answer takes with all slots in use
    simulation.come_at_random(draw, rate, settled_s, make)
    simulation.run(settled_s)
    at_capacity = served(simulation, draw, rate, make)
    assert at_rest(simulation)
    overload = served(simulation, draw, 4 * rate, make)
    assert at_rest(simulation)
    assert overload.p99_s() <= 2 * at_capacity.p99_s()
    assert len(overload.waits_s) >= 0.97 * rate * SECONDS  # and as much is done as there can be
    assert set(simulation.sheds) == {"waiting_time"}


def served(simulation: Simulation, draw: random.Random, rate: float, make: Callable[[], Request]) -> Counts:
    """A minute of it, and what has come by then."""
    simulation.come_at_random(draw, rate, SECONDS, make)
    return simulation.run()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_slots_are_never_empty_under_overload(share: float) -> None:
    draw = random.Random(0)
    simulation = Simulation()
    rate = capacity(CPU, 128, 64, share)
    simulation.come_at_random(draw, 4 * rate, 90.0, spread(draw, 128, 64, share))
    simulation.run(15.0)  # all in use
    counts = simulation.run(90.0)
    assert counts.busy_slot_s / (CPU.num_slots * 75.0) >= 0.95


def test_below_its_capacity_hardly_anybody_is_refused() -> None:
    draw = random.Random(0)
    simulation = Simulation()
    simulation.come_at_random(draw, 0.8 * capacity(CPU, 128, 64, 0.0), 300.0, Request)
    counts = simulation.run()
    assert counts.num_refused <= 0.01 * len(counts.waits_s)


@pytest.mark.parametrize("num_tokens", [64, 2])
def test_a_burst_finds_room_whatever_its_size(num_tokens: int) -> None:
    """Also after an overload, from which all paces are known."""
    draw = random.Random(0)
    simulation = Simulation(max_waiting_tokens=0)
    for _ in range(2):
        for index in range(1000):
            simulation.come(simulation.now + index * 0.0005, Request(output_len=num_tokens))
        counts = simulation.run()
        assert (counts.num_refused, counts.num_ended) == (0, 1000)
        assert at_rest(simulation)
        simulation.come_at_random(draw, 12.0, 30.0, Request)
        simulation.run()
        simulation.now += 5.0


@pytest.mark.parametrize("num_requests", [16, 32, 64, 128])
@pytest.mark.parametrize("seconds", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("num_tokens", [8, 64])
def test_clients_that_begin_within_a_second_are_not_refused(num_requests: int, seconds: float, num_tokens: int) -> None:
    """A pool of threads takes that long to begin. It comes three times, from the second time on to paces that are known."""
    draw = random.Random(1)
    for machine in (CPU, GPU):
        simulation = Simulation(machine)
        for _ in range(3):
            simulation.come_at_random(draw, num_requests / seconds, seconds, lambda: Request(40, num_tokens))
            assert simulation.run().num_refused == 0
            simulation.now += 3.0


@pytest.mark.parametrize("num_requests", [64, 128, 256])
@pytest.mark.parametrize("num_tokens", [8, 64])
def test_nearly_all_of_a_crowd_that_comes_again_when_told_are_answered(num_requests: int, num_tokens: int) -> None:
    """Clients that come too slowly for a burst, and again twice, as OpenAI's SDKs do. Told the same second all of them, up to
    40% would be refused three times."""
    draw = random.Random(1)
    simulation = Simulation()
    num_sheds = 0
    for _ in range(4):
        num_sheds = len(simulation.sheds)
        simulation.come_at_random(draw, num_requests / 3.0, 3.0, lambda: Request(40, num_tokens, num_retries=2))
        counts = simulation.run()
        simulation.now += 3.0
    assert counts.num_refused <= 0.02 * num_requests
    assert counts.num_refused + counts.num_ended == num_requests
    assert len(simulation.sheds) > num_sheds or num_requests == 64  # some were told to come again


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("per_slot", [1.0, 1.125, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_clients_in_a_circle_are_never_refused(machine: Machine, per_slot: float, share: float) -> None:
    simulation = Simulation(machine, max_waiting_tokens=0)
    draw = random.Random(0)
    make = spread(draw, 128, 64, share)
    for pause_s in (0.01, 0.3):
        simulation.come_in_circles(int(machine.num_slots * per_slot), simulation.now + 40.0, make, pause_s)
        assert simulation.run().num_refused == 0
        assert at_rest(simulation)
        simulation.now += 5.0


def test_a_stranger_does_not_break_the_circle() -> None:
    simulation = Simulation()
    simulation.come_in_circles(64, 100.0, Request)
    for at_s in range(20, 100, 10):
        simulation.come(at_s, Request())
    assert simulation.run().num_refused == 0


def test_a_burst_followed_by_an_overload_melts() -> None:
    draw = random.Random(0)
    simulation = Simulation()
    rate = capacity(CPU, 128, 64, 0.0)
    for _ in range(200):
        simulation.come(0.0, Request())
    simulation.come_at_random(draw, 4 * rate, 200.0, Request)
    simulation.run(120.0)
    simulation.counts.waits_s.clear()
    assert simulation.run(200.0).p99_s() < 5.0


def test_who_comes_after_a_wave_has_begun_would_wait_for_its_end() -> None:
    simulation = Simulation()
    for index in range(CPU.num_slots):
        simulation.come(index * 0.001, Request())
    simulation.run(6.0)
    assert simulation.backlog.wait_s() > 3.0  # all end at about 11 s, though that is three a second on the average
    simulation.come(simulation.now, Request())
    assert simulation.run().num_refused == 1


def test_four_long_prompts_keep_nobody_away() -> None:
    simulation = Simulation()
    for _ in range(8):  # a pace is learnt
        simulation.come(0.0, Request(prompt_len=4000, output_len=2))
    simulation.run()
    simulation.now += 20.0
    for _ in range(4):
        simulation.come(simulation.now, Request(prompt_len=4000, output_len=2))
    for index in range(3):
        simulation.come(simulation.now + 1.5 + index, Request())
    assert simulation.run().num_refused == 0


def test_a_guess_that_was_wrong_costs_nobody_his_answer() -> None:
    """Answers turn out ten times as long as all before: those who were let in wait longer, and all are answered."""
    draw = random.Random(0)
    simulation = Simulation()
    simulation.come_at_random(draw, 2.0, 60.0, lambda: Request(output_len=20, knows_length=False))
    simulation.run()
    simulation.come_at_random(draw, 8.0, 60.0, lambda: Request(output_len=200, knows_length=False))
    counts = simulation.run()
    assert counts.num_ended + counts.num_refused == 480
    assert counts.num_ended > 40
    assert at_rest(simulation)


@pytest.mark.parametrize("max_wait_s", [0.5, 5.0])
def test_a_bound_of_its_own(max_wait_s: float) -> None:
    draw = random.Random(0)
    simulation = Simulation(max_wait_s=max_wait_s)
    simulation.come_at_random(draw, 11.0, 60.0, Request)
    counts = simulation.run()
    assert 0.5 * max_wait_s < counts.p99_s() < max_wait_s + 2.0


def test_no_bound() -> None:
    draw = random.Random(0)
    simulation = Simulation(max_wait_s=0, max_waiting_tokens=0)
    simulation.come_at_random(draw, 11.0, 60.0, Request)
    assert simulation.run().num_refused == 0
