"""Scheduler and core over a fake runner: what each step computes, and that nothing is lost, shared wrongly or done twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from engine.step import ModelRunnerOutput
from engine.step_budget import StepBudget
from tests.fake_runner import VOCAB_SIZE
from tests.scheduler_harness import Harness, expect, prompt_of


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_alone_and_together_say_the_same(depth: int):
    harness = Harness(depth=depth)
    prompts = {f"r{i}": prompt_of(3 + 7 * i, seed=i) for i in range(6)}
    for name, prompt in prompts.items():
        harness.add(name, prompt)
    harness.run()
    assert {name: harness.tokens[name, 0] for name in prompts} == {n: expect(p, 8) for n, p in prompts.items()}
    assert set(harness.finished.values()) == {"length"}


def test_one_step_mixes_decodes_with_a_chunk_and_keeps_the_budget():
    harness = Harness(max_num_batched_tokens=17)
    harness.add("short", prompt_of(5))
    harness.step()
    harness.add("long", prompt_of(60, seed=1))
    harness.step()
    step = harness.runner.steps[-1]
    assert step.num_tokens == [1, 16]
    while ("long", 0) not in harness.tokens:
        before = len(harness.tokens["short", 0])
        if ("short", 0) in harness.finished:
            break
        harness.step()
        assert len(harness.tokens["short", 0]) == before + 1, "a chunk stopped another request's token"
    harness.run()
    assert all(step.total_num_tokens <= 17 for step in harness.runner.steps)
    assert harness.tokens["long", 0] == expect(prompt_of(60, seed=1), 8)


@pytest.mark.parametrize(
    ("num_decodes", "expected"), [(0, 8192), (1, 8192), (2, 8192), (4, 4096), (16, 1024), (32, 512), (100, 512), (200, 768)]
)
def test_the_more_sequences_decode_the_less_of_a_prompt_joins_their_step(num_decodes: int, expected: int):
    harness = Harness(
        num_blocks=2000,
        block_size=16,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_num_mixed_tokens=1024,
        max_model_len=10_000,
    )
    for i in range(num_decodes):
        harness.add(f"r{i}", prompt_of(5, seed=i), max_tokens=3)
    if num_decodes:
        harness.step()
    harness.add("long", prompt_of(9000))
    harness.add("short", prompt_of(20, seed=-1))
    harness.step()
    step = harness.runner.steps[-1]
    assert step.num_tokens[:-1] == [1] * num_decodes, "one chunk, cut, and nothing behind it"
    assert step.num_tokens[-1] % 16 == 0, "a chunk that is cut ends with a page"
    assert expected - 16 < step.total_num_tokens <= expected


@pytest.mark.parametrize(("waited_s", "expected"), [(0.0, 512), (0.04, 512), (0.06, 768), (0.09, 1024), (9.0, 1024)])
def test_steps_grow_while_a_prompt_waits(waited_s: float, expected: int):
    budget = StepBudget(max_num_seqs=256, max_num_batched_tokens=8192, max_num_mixed_tokens=1024, block_size=16)
    assert budget.prompt_tokens(64, waited_s) == expected - 64


def test_a_prompt_gets_on_beside_as_many_decodes_as_there_may_be():
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=4, max_num_mixed_tokens=4)
    for i in range(3):
        harness.add(f"r{i}", prompt_of(3, seed=i), max_tokens=40)
    for _ in range(4):
        harness.step()
    harness.add("late", prompt_of(20), max_tokens=1)
    for _ in range(21):
        harness.step()
    assert harness.finished == {("late", 0): "length"}, "three decodes and one prompt token a step"
    harness.run()


def test_a_finished_request_makes_room_at_once():
    harness = Harness(max_num_seqs=2)
    for i, count in enumerate((1, 9, 3)):
        harness.add(f"r{i}", prompt_of(4, seed=i), max_tokens=count)
    harness.step()
    harness.step()
    assert len(harness.runner.steps[-1].slots) == 2, "the third request did not take the place of the first"
    harness.run()


@pytest.mark.parametrize("depth", [0, 1])
def test_stop_tokens_min_tokens_and_ignore_eos(depth: int):
    harness = Harness(depth=depth)
    prompt = prompt_of(6)
    expected = expect(prompt, 8)
    harness.add("stop", prompt, stop_token_ids=(expected[3],))
    harness.add("late", prompt, stop_token_ids=(expected[0], expected[5]), min_tokens=4)
    harness.run()
    assert harness.tokens["stop", 0] == expected[:4] and harness.finished["stop", 0] == "stop"
    assert harness.tokens["late", 0] == expected[:6] and harness.finished["late", 0] == "stop"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6)])
def test_a_prefix_is_computed_once(windows: tuple[int | None, ...], depth: int):
    harness = Harness(windows=windows, depth=depth)
    shared = prompt_of(40)
    harness.add("first", [*shared, 3, 4, 5])
    harness.run()
    before = harness.runner.num_computed
    harness.add("second", [*shared, 6, 7])
    harness.run()
    assert harness.tokens["second", 0] == expect([*shared, 6, 7], 8)
    assert harness.runner.num_computed - before == 2 + 7, "only the new tokens and the decodes are computed"
    assert next(o.num_cached_tokens for o in harness.outputs if o.request_id == "second") == 40


@pytest.mark.parametrize("depth", [0, 1])
def test_simultaneous_requests_wait_for_a_prefix_that_is_being_computed(depth: int):
    harness = Harness(depth=depth, max_num_batched_tokens=16, max_num_seqs=8)
    shared = prompt_of(40)
    for i in range(6):
        harness.add(f"r{i}", [*shared, 10 + i, 20 + i], max_tokens=4)
    harness.run()
    assert harness.runner.num_computed == 40 + 6 * 2 + 6 * 3
    for i in range(6):
        assert harness.tokens[f"r{i}", 0] == expect([*shared, 10 + i, 20 + i], 4)


def test_waiters_fall_back_when_the_owner_of_a_prefix_dies():
    harness = Harness(max_num_batched_tokens=8)
    shared = prompt_of(40)
    harness.add("owner", shared)
    harness.add("waiter", [*shared, 9])
    harness.step()
    assert len(harness.runner.steps[-1].slots) == 1
    harness.core.abort("owner")
    harness.run()
    assert harness.tokens["waiter", 0] == expect([*shared, 9], 8)


def test_salts_share_nothing_and_caching_can_be_off():
    for salt, caching, saved in (("", True, 40), ("other", True, 0), ("", False, 0)):
        harness = Harness(caching=caching)
        harness.add("a", prompt_of(41))
        harness.run()
        message = AddRequest(
            request_id="b", prompt_token_ids=prompt_of(41), sampling=SamplingParams(max_tokens=2), cache_salt=salt
        )
        harness.core.add(message)
        harness.run()
        assert next(o.num_cached_tokens for o in harness.outputs if o.request_id == "b") == saved


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("length", [8, 10])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_n_choices_prefill_once_and_share_their_pages(length: int, windows: tuple[int | None, ...], depth: int):
    harness = Harness(depth=depth, windows=windows)
    prompt = prompt_of(length)
    harness.add("r", prompt, n=4, max_tokens=5)
    harness.step()
    if windows == (None,):
        assert harness.kv.num_referenced_blocks == -(-length // 4) + (3 if length % 4 else 0)
    harness.run()
    assert harness.runner.num_computed == length + 4 * 4
    assert [harness.tokens["r", i] for i in range(4)] == [expect(prompt, 5, choice=i) for i in range(4)]
    assert len({tuple(harness.tokens["r", i]) for i in range(4)}) == 4


@pytest.mark.parametrize("depth", [0, 1])
def test_more_choices_than_slots_queue_up(depth: int):
    harness = Harness(depth=depth, max_num_seqs=3)
    prompt = prompt_of(10)
    harness.add("r", prompt, n=7, max_tokens=5)
    harness.run()
    assert [harness.tokens["r", i] for i in range(7)] == [expect(prompt, 5, choice=i) for i in range(7)]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6)])
def test_preemption_changes_no_text(windows: tuple[int | None, ...], depth: int):
    harness = Harness(num_blocks=14, windows=windows, depth=depth, max_num_seqs=6)
    prompts = {f"r{i}": prompt_of(9 + i, seed=i) for i in range(6)}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=30)
    harness.run()
    assert {name: harness.tokens[name, 0] for name in prompts} == {n: expect(p, 30) for n, p in prompts.items()}
    if None in windows:
        assert harness.core.stats().preemptions > 0


def test_a_replayed_request_goes_on_where_it_was():
    harness = Harness()
    prompt, expected = prompt_of(9), expect(prompt_of(9), 8)
    message = AddRequest(
        request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=8), output_token_ids=[expected[:3]]
    )
    harness.core.add(message)
    harness.tokens["r", 0] = expected[:3]
    harness.run()
    assert harness.tokens["r", 0] == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_prompt_logprobs_cover_every_position_once(depth: int):
    harness = Harness(depth=depth, max_num_batched_tokens=8)
    prompt = prompt_of(30)
    harness.add("warm", prompt)
    harness.run()
    harness.add("r", prompt, prompt_logprobs=0, n=2, max_tokens=2)
    harness.add("none", prompt, prompt_logprobs=0, max_tokens=0)
    harness.run()
    for name in ("r", "none"):
        first = next(o for o in harness.outputs if o.request_id == name and o.choice_index == 0)
        assert first.prompt_logprobs is not None
        assert [e and -e.logprob for e in first.prompt_logprobs] == [None, *map(float, prompt[1:])]
    assert harness.tokens["none", 0] == [] and harness.finished["none", 0] == "length"
    assert harness.tokens["r", 1] == expect(prompt, 2, choice=1)


def test_what_can_never_run_is_refused_with_the_number_that_fits():
    harness = Harness(num_blocks=10, max_model_len=200)
    with pytest.raises(ContextLengthExceeded, match="fits 40 tokens"):
        harness.add("r", prompt_of(30), max_tokens=11)
    with pytest.raises(ContextLengthExceeded, match=r"holds 200 tokens, but the prompt has 30 and 171 more"):
        harness.add("r", prompt_of(30), max_tokens=171)
    with pytest.raises(InvalidRequest, match=f"0 to {VOCAB_SIZE - 1}"):
        harness.add("r", [VOCAB_SIZE])
    with pytest.raises(InvalidRequest, match="no tokens"):
        harness.add("r", [])
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        harness.add("r", [3], stop_token_ids=(-1,))
    assert not harness.core.has_work
    harness.add("r", prompt_of(30), max_tokens=10)
    harness.run()
    assert len(harness.tokens["r", 0]) == 10


def test_a_sliding_window_holds_only_its_window():
    harness = Harness(windows=(8,), num_blocks=12, max_num_batched_tokens=8, max_model_len=2000)
    harness.add("r", prompt_of(300), max_tokens=100)
    peak = 0
    while harness.core.has_work:
        harness.step()
        peak = max(peak, harness.kv.num_referenced_blocks)
    assert peak <= 5
    assert harness.tokens["r", 0] == expect(prompt_of(300), 100)


def test_less_than_four_percent_of_allocated_pages_is_wasted():
    harness = Harness(num_blocks=4000, block_size=16, max_num_seqs=64, max_num_batched_tokens=4096, max_model_len=2000)
    rng = random.Random(0)
    for i in range(64):
        harness.add(f"r{i}", prompt_of(rng.randint(150, 350), seed=i), max_tokens=rng.randint(20, 150))
    used, allocated = 0, 0
    while harness.core.has_work:
        harness.step()
        used += sum(r.num_computed_tokens for r in harness.scheduler.unfinished())
        allocated += harness.kv.num_referenced_blocks * 16
    assert 1 - used / allocated < 0.04


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fails_late", [False, True])
def test_a_step_that_does_not_fit_once_changes_no_text(depth: int, fails_late: bool):
    harness = Harness(depth=depth)
    harness.runner.fails_late = fails_late
    for i in range(4):
        harness.add(f"r{i}", prompt_of(5, seed=i), max_tokens=20, n=2)
    for _ in range(3):
        harness.step()
    harness.add("late", prompt_of(12, seed=9), n=3)
    failures = iter([True])
    harness.runner.out_of_memory = lambda step: next(failures, False)
    harness.step()
    assert harness.core.stats().preemptions == 1, "the youngest prompt gives way"
    num_steps = len(harness.runner.steps)
    harness.step()
    assert len(harness.runner.steps) == num_steps + 1 and not harness.runner.steps[-1].new_rows, "the next step goes without it"
    harness.run()
    for i in range(4):
        assert [harness.tokens[f"r{i}", c] for c in range(2)] == [expect(prompt_of(5, seed=i), 20, choice=c) for c in range(2)]
    assert [harness.tokens["late", c] for c in range(3)] == [expect(prompt_of(12, seed=9), 8, choice=c) for c in range(3)]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("caching", [False, True])
def test_a_request_that_never_fits_fails_alone(depth: int, caching: bool):
    harness = Harness(depth=depth, caching=caching, max_num_batched_tokens=32)
    harness.runner.out_of_memory = lambda step: max(step.start_positions) + max(step.num_tokens) > 40
    for i in range(3):
        harness.add(f"r{i}", prompt_of(7, seed=i), max_tokens=20)
    harness.step()
    harness.add("large", prompt_of(60, seed=5), n=2)
    harness.add("after", prompt_of(20, seed=6))
    harness.run()
    for i in range(3):
        assert harness.tokens[f"r{i}", 0] == expect(prompt_of(7, seed=i), 20)
    assert harness.tokens["after", 0] == expect(prompt_of(20, seed=6), 8)
    assert harness.finished["large", 0] == harness.finished["large", 1] == "error"
    error = next(output.error for output in harness.outputs if output.error)
    assert "ran out of memory twice in a row with this request (60 tokens" in error.message


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_shrink_until_they_fit_and_grow_again(depth: int):
    harness = Harness(depth=depth, max_num_batched_tokens=64, num_blocks=200, max_num_seqs=6)
    harness.runner.out_of_memory = lambda step: step.total_num_tokens > 24
    prompts = {f"r{i}": prompt_of(30, seed=i) for i in range(6)}
    for name, prompt in prompts.items():
        harness.add(name, prompt)
    harness.run()
    assert {name: harness.tokens.get((name, 0)) for name in prompts} == {n: expect(p, 8) for n, p in prompts.items()}
    harness.runner.out_of_memory = lambda step: False
    harness.add("slow", prompt_of(4), max_tokens=150)
    harness.run()
    harness.add("r", prompt_of(100, seed=11))
    harness.step()
    assert harness.runner.steps[-1].total_num_tokens == 64
    harness.run()


def test_of_two_prompts_in_a_step_the_one_that_does_not_fit_fails():
    harness = Harness(max_num_batched_tokens=64, num_blocks=100)
    harness.runner.out_of_memory = lambda step: any(  # a prompt of more than 20 tokens
        start + count > 20 for start, count in zip(step.start_positions, step.num_tokens, strict=True)
    )
    harness.add("large", prompt_of(28, seed=1), max_tokens=2)
    harness.add("small", prompt_of(9, seed=2), max_tokens=4)
    harness.run()
    assert harness.finished == {("large", 0): "error", ("small", 0): "length"}


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 50), st.integers(0, 12), st.integers(1, 3), st.booleans(), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 30), st.sampled_from([None, 0, 1])),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=st.lists(ACTIONS, max_size=40),
    depth=st.integers(0, 1),
    windows=st.sampled_from([(None,), (7,), (None, 7), (9, None)]),
    num_blocks=st.integers(17, 40),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 24),
    mixed=st.integers(6, 24),
    failures=st.lists(st.booleans(), max_size=30),
)
def test_random_lives_end_with_every_page_free_and_the_right_text(
    actions, depth, windows, num_blocks, max_num_seqs, budget, mixed, failures
):
    harness = Harness(
        num_blocks=num_blocks,
        windows=windows,
        depth=depth,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_num_mixed_tokens=min(mixed, budget),
        max_model_len=100,
    )
    fates = iter(failures)
    harness.runner.out_of_memory = lambda step: next(fates, False)
    asked: dict[str, tuple[list[int], int, int]] = {}
    aborted: set[tuple[str, int]] = set()
    for action in actions:
        if action[0] == "add":
            _, length, max_tokens, n, shared, logprobs = action
            name = f"r{len(asked)}"
            prompt = prompt_of(length, seed=0 if shared else len(asked) + 1)
            harness.add(name, prompt, max_tokens=max_tokens, n=n, prompt_logprobs=0 if logprobs else None)
            asked[name] = (prompt, max_tokens, n)
        elif action[0] == "step":
            for _ in range(action[1]):
                harness.step()
        else:
            name, choice = f"r{action[1]}", action[2]
            harness.core.abort(name, choice)
            harness.core.check_integrity()
            if name in asked:
                aborted |= {(name, i) for i in range(asked[name][2]) if choice in (None, i)}
    harness.run()
    for name, (prompt, max_tokens, n) in asked.items():
        for choice in range(n):
            expected = expect(prompt, max_tokens, choice=choice)
            said = harness.tokens.get((name, choice), [])
            if harness.finished.get((name, choice), "error") == "error":
                assert (name, choice) in aborted or sum(failures) >= 2
                assert said == expected[: len(said)]
            else:
                assert said == expected and harness.finished[name, choice] == "length"


def test_a_step_that_does_not_fit_and_whose_parent_of_forks_has_ended():
    """The step before told, after this one's launch, that the request's numbers are bad: its fork has no slot to leave."""
    harness = Harness(depth=1, max_num_batched_tokens=16)
    harness.add("bad", prompt_of(20), n=2, prompt_logprobs=0)
    scheduler = harness.scheduler
    begun, forks = scheduler.schedule(), scheduler.schedule()
    assert begun is not None and forks is not None and len(forks.forks) == 1
    (output,) = scheduler.update(ModelRunnerOutput(begun.step_id, [], [], {}, bad_rows=[0]))
    assert output.finish_reason == "error"
    assert scheduler.roll_back() == []
    scheduler.check_integrity()
    assert not scheduler.has_unfinished and scheduler.kv_cache.num_referenced_blocks == 0
