"""A request whose time is up ends with an error, whatever state it is in, and holds nothing any more."""

from __future__ import annotations

import random
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core import EngineCore
from engine.deadlines import FIRST_TOKEN, WHOLE, Deadlines
from engine.errors import DeadlineExceeded
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams, StructuredSpec
from tests.fake_runner import VOCAB_SIZE
from tests.scheduler_harness import Harness, expect, prompt_of


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("engine.deadlines.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def assert_late(harness: Harness, request_id: str, kind: str) -> None:
    error = harness.errors[request_id]
    assert (error.kind, error.code, error.param) == ("DeadlineExceeded", "deadline_exceeded", kind)
    assert kind in error.message


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", [FIRST_TOKEN, WHOLE])
def test_in_the_queue(clock: Clock, depth: int, kind: str) -> None:
    harness = Harness(depth=depth, max_num_seqs=1)
    harness.add("runs", prompt_of(5, seed=1), max_tokens=20)
    harness.add("waits", prompt_of(5, seed=2), **{"first_token_deadline_s" if kind == FIRST_TOKEN else "deadline_s": 1001.0})
    harness.add("next", prompt_of(5, seed=3))
    for _ in range(3):
        harness.step()
    assert not harness.errors
    clock.now = 1001.0
    harness.step()
    assert_late(harness, "waits", kind)
    assert harness.core.stats().num_waiting == 1
    harness.run()
    assert harness.tokens["runs", 0] == expect(prompt_of(5, seed=1), 20)
    assert harness.tokens["next", 0] == expect(prompt_of(5, seed=3), 8)
    assert ("waits", 0) not in harness.tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_in_the_middle_of_its_prompt(clock: Clock, depth: int) -> None:
    harness = Harness(depth=depth)
    harness.add("long", prompt_of(60), first_token_deadline_s=1001.0, deadline_s=1002.0)
    harness.step()
    clock.now = 1001.5
    harness.step()
    assert_late(harness, "long", FIRST_TOKEN)
    harness.run()
    clock.now = 1003.0
    assert harness.step() == []  # told once


@pytest.mark.parametrize("depth", [0, 1])
def test_in_the_middle_of_its_output(clock: Clock, depth: int) -> None:
    harness = Harness(depth=depth)
    harness.add("late", prompt_of(5), max_tokens=50, first_token_deadline_s=1001.0, deadline_s=1002.0)
    harness.add("other", prompt_of(5, seed=1), max_tokens=20)
    for _ in range(5):
        harness.step()
    clock.now = 1001.0
    harness.step()
    assert not harness.errors  # its first token came in time
    clock.now = 1002.0
    harness.step()
    assert_late(harness, "late", WHOLE)
    told = harness.tokens["late", 0]
    assert 0 < len(told) < 50 and told == expect(prompt_of(5), len(told))
    last = next(output for output in harness.outputs if output.error is not None)
    assert last.first_token_index == len(told) and last.finish_reason == "error"
    harness.run()
    assert harness.tokens["other", 0] == expect(prompt_of(5, seed=1), 20)


@pytest.mark.parametrize("depth", [0, 1])
def test_while_it_is_preempted(clock: Clock, depth: int) -> None:
    harness = Harness(depth=depth, num_blocks=12, max_num_seqs=4)
    harness.add("important", prompt_of(9), priority=-1, max_tokens=24)
    harness.add("late", prompt_of(9, seed=1), max_tokens=24, deadline_s=1001.0)
    while harness.core.stats().preemptions == 0:
        harness.step()
    clock.now = 1001.0
    harness.step()
    assert_late(harness, "late", WHOLE)
    harness.run()
    assert harness.tokens["important", 0] == expect(prompt_of(9), 24)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_all_choices_end(clock: Clock, depth: int, num_steps: int) -> None:
    harness = Harness(depth=depth, max_num_seqs=2)
    harness.add("many", prompt_of(9), n=4, max_tokens=30, deadline_s=1001.0)
    for _ in range(num_steps):
        harness.step()
    clock.now = 1001.0
    harness.run()
    assert_late(harness, "many", WHOLE)
    assert len(harness.errors) == 1 and set(harness.finished.values()) == {"error"}


def test_an_embedding_has_no_first_token(clock: Clock) -> None:
    harness = Harness()
    harness.add("vector", prompt_of(60), pooling="mean", deadline_s=1001.0)
    harness.step()
    clock.now = 1001.0
    harness.step()
    assert_late(harness, "vector", WHOLE)
    harness.run()


def test_a_replayed_request_has_had_its_first_token(clock: Clock) -> None:
    harness = Harness()
    known = expect(prompt_of(5), 3)
    harness.add("replayed", prompt_of(5), output=[known], first_token_deadline_s=999.0, deadline_s=1001.0)
    harness.run()
    assert not harness.errors and harness.tokens["replayed", 0] == expect(prompt_of(5), 8)


class Compiles:
    """Grammars that take for ever."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()

    def compile(self, _spec: StructuredSpec) -> Future[Any]:
        return self.future


@pytest.mark.parametrize(("limit", "kind"), [("first_token_deadline_s", FIRST_TOKEN), ("deadline_s", WHOLE)])
def test_while_its_grammar_is_compiled(clock: Clock, limit: str, kind: str) -> None:
    harness = Harness()
    core = EngineCore(
        harness.scheduler,
        harness.runner,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({2}),
        pipeline_depth=0,
        grammars=Compiles(),  # type: ignore[arg-type]
    )
    sampling = SamplingParams(structured=StructuredSpec("regex", "a"))
    times: dict[str, Any] = {limit: 1001.0}
    assert not core.add(AddRequest(request_id="r", prompt_token_ids=[5], sampling=sampling, **times))
    assert core.take_compiled() == [] and core.is_compiling
    clock.now = 1001.0
    ((request_id, error),) = core.take_compiled()
    assert request_id == "r" and isinstance(error, DeadlineExceeded) and error.param == kind
    assert not core.is_compiling and not core.has_work


def test_many_limits_in_any_order(clock: Clock) -> None:
    """Random limits and lengths: whoever ends, ends right, and nobody is ended early."""
    rng = random.Random(0)
    harness = Harness(max_num_seqs=3, num_blocks=40)
    prompts = {f"r{i}": prompt_of(rng.randint(1, 12), seed=i) for i in range(40)}
    limits = {name: 1000.0 + rng.randint(1, 60) if rng.random() < 0.6 else None for name in prompts}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=10, deadline_s=limits[name])
    while harness.core.has_work:
        clock.now += 1.0
        for output in harness.step():
            if output.error is not None:
                limit = limits[output.request_id]
                assert limit is not None and limit <= clock.now < limit + 2
    harness.run()
    assert 0 < len(harness.errors) < 40
    for name, prompt in prompts.items():
        known = harness.tokens.get((name, 0), [])
        assert known == expect(prompt, len(known))
        assert name in harness.errors or len(known) == 10


def test_limits_of_ended_requests_do_not_pile_up(clock: Clock) -> None:
    deadlines = Deadlines()
    for i in range(10_000):
        deadlines.add(f"r{i}", WHOLE, clock.now + 3600)
        deadlines.forget_ended({f"r{i}"}, 1)
        assert len(deadlines) <= Deadlines.MANY + 8
    assert deadlines.take_passed() == []
    clock.now += 3600
    assert ("r9999", WHOLE) in deadlines.take_passed()


def test_both_times_up_in_the_same_step(clock: Clock) -> None:
    """The request ends once, with one error."""
    harness = Harness()
    harness.add("late", prompt_of(60), first_token_deadline_s=1001.0, deadline_s=1001.5, n=2)
    harness.step()
    clock.now = 1002.0
    (output,) = harness.step()
    assert output.error is not None and output.error.param == FIRST_TOKEN
    assert not harness.core.has_work
