"""EngineStats: what the engine counts of its requests and steps, and how the numbers of one engine go on in the next."""

from __future__ import annotations

import msgspec

from engine.histogram import Histogram, HistogramCounts
from engine.messages import DeviceUsage, EngineStats
from tests.scheduler_harness import Harness, prompt_of


def test_a_prefix_that_another_computes_defers() -> None:
    harness = Harness()
    prompt = prompt_of(12)
    harness.add("first", prompt)
    harness.add("second", prompt)
    harness.step()  # there is room for four tokens of the second one, but they will be found
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (1, 1, 1)
    harness.run()
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.prefix_query_tokens, stats.cached_prompt_tokens) == (24, 24, 8)


def test_choices_wait_for_the_prompt_and_others_for_slots() -> None:
    harness = Harness(max_num_seqs=3)
    harness.add("three", prompt_of(40), n=3)
    harness.step()
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (1, 2, 2), "the others start from its prompt"
    for i in range(3):
        harness.add(f"more{i}", prompt_of(5, i + 1))
    while harness.core.stats().num_running < 3:
        harness.step()
    stats = harness.core.stats()
    assert (stats.num_waiting, stats.num_deferred) == (3, 0), "for slots"
    harness.run()


def test_a_deferred_request_that_is_aborted_is_not_counted() -> None:
    harness = Harness()
    for name in ("first", "second"):
        harness.add(name, prompt_of(40))
    harness.step()
    harness.core.abort("second")
    stats = harness.core.stats()
    assert (stats.num_waiting, stats.num_deferred) == (0, 0)


def test_prompts_that_read_no_pages_query_none() -> None:
    harness = Harness()
    harness.add("logprobs", prompt_of(10), prompt_logprobs=0)
    harness.add("embedding", prompt_of(11, 1), pooling="mean")
    harness.run()
    stats = harness.core.stats()
    assert (stats.prompt_tokens, stats.prefix_query_tokens) == (21, 0)
    without = Harness(caching=False)
    without.add("plain", prompt_of(10))
    without.run()
    assert (without.core.stats().prompt_tokens, without.core.stats().prefix_query_tokens) == (10, 0)


def test_what_an_earlier_engine_began_is_computed_again() -> None:
    harness = Harness()
    prompt = prompt_of(10)
    first = Harness()
    first.add("r", prompt, n=2)
    first.run()
    harness.add("r", prompt, n=2, output=[first.tokens["r", choice][:3] for choice in range(2)])
    harness.run()
    stats = harness.core.stats()
    assert stats.prompt_tokens == 0, "it was counted there"
    assert stats.recomputed_tokens == 13 + 13 - 8, "the second finds the prompt's full pages"
    assert stats.generation_tokens == 2 * 5


def test_preemption_is_counted() -> None:
    harness = Harness(num_blocks=8)
    for i in range(3):
        harness.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    harness.run()
    stats = harness.core.stats()
    assert stats.preemptions > 0 and stats.recomputed_tokens > 0
    # An answer's last token is never computed; that with which a preempted request comes back is computed for the first time.
    assert stats.computed_tokens == stats.prompt_tokens + 3 * 19 + stats.recomputed_tokens - stats.preemptions


def test_every_step_is_in_the_histograms() -> None:
    for depth in (0, 1):
        harness = Harness(depth=depth)
        for i in range(5):
            harness.add(f"r{i}", prompt_of(9, i))
        harness.run()
        stats = harness.core.stats()
        assert sum(stats.step_time.counts) == sum(stats.step_tokens.counts) == stats.steps > 0
        assert stats.step_tokens.sum == stats.computed_tokens
        assert stats.step_time.sum > 0


def test_a_histogram() -> None:
    histogram = Histogram((1, 10))
    for value in (0.5, 1, 1.5, 10, 11, 12):
        histogram.observe(value)
    found = histogram.counts()
    assert found == HistogramCounts([2, 2, 2], 36)
    histogram.observe(1)
    assert found.counts == [2, 2, 2], "a copy"
    assert HistogramCounts() + found == found + HistogramCounts() == found
    assert found + found == HistogramCounts([4, 4, 4], 72)


def test_counters_go_on_in_the_next_engine_and_gauges_do_not() -> None:
    device = DeviceUsage("cpu", 1, 2)
    one = EngineStats(
        num_running=3,
        num_blocks=9,
        resident_bytes=5,
        devices=[device],
        steps=7,
        step_time=HistogramCounts([1, 2], 3.0),
        generation_tokens=4,
        cpu_seconds=1.5,
    )
    between = one.between_engines(6)
    assert (between.num_running, between.num_waiting, between.num_deferred, between.num_blocks) == (0, 6, 6, 9)
    assert (between.resident_bytes, between.devices) == (0, [])
    assert (between.steps, between.step_time, between.cpu_seconds) == (7, one.step_time, 1.5)
    assert EngineStats().after(one).generation_tokens == 4, "before the next one has done anything"
    after = EngineStats(num_running=1, steps=2, step_time=HistogramCounts([0, 1], 1.0), cpu_seconds=0.25).after(one)
    assert (after.num_running, after.steps, after.step_time, after.cpu_seconds) == (1, 9, HistogramCounts([1, 3], 4.0), 1.75)


def test_it_crosses_the_border() -> None:
    harness = Harness()
    harness.add("r", prompt_of(9))
    harness.run()
    stats = msgspec.structs.replace(harness.core.stats(), devices=[DeviceUsage("cuda:0", 1, 2, None)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=EngineStats) == stats
