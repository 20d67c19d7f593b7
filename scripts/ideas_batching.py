#!/usr/bin/env python3
"""Continuous against static batching: throughput, latency under a Poisson load, and who held which slot when.

    .venv/bin/python scripts/ideas_batching.py

A static batch is made of what waits when the engine has nothing to do; nobody joins it, and the next one begins when its last
request has ended. With iteration-level scheduling (Orca, OSDI '22) a request joins at the next step after a slot is free. Both
run here through the engine's core over the same loaded model, with the same requests; what changes is when the scheduler
admits. Its rows are never padded, so even the static side pays nothing for slots that stand empty: what it loses is their use.

Prompts are of 16 to 128 tokens; the lengths of answers are log-normal (sigma 0.8 of the logarithm), as answers of chats are:
many short ones, a few long. First all requests are there at once: steps, idle slots and tokens per second. Then they arrive at
random (Poisson) at a share of the rate that continuous batching completed. Steps and idle slots do not depend on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ideas_engine
import numpy as np
from dummy_model import SHAPES
from ideas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    Idea,
    Plot,
    Results,
    Table,
    log_axis,
    model_flags,
    model_name,
    number,
    percent,
    progress,
    run,
)
from ideas_engine import Answer, InstantRunner, Load, output_tokens, random_prompt

from engine.config import CacheConfig
from engine.in_flight_step import InFlightStep
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step import Runner, SchedulerOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.build import LoadedEngine

PROMPT_LENGTHS = (16, 128)
SIGMA = 0.8
BLOCK_SIZE = 16
MAX_TIMELINE_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """mean_answer and longest_answer in tokens; loads: shares of the rate that continuous batching completes."""

    model: str
    slots: int
    num_requests: int
    mean_answer: int
    longest_answer: int
    loads: tuple[float, ...]


SCALES = {
    "smallest": Scale("llama-tiny", 4, 12, 8, 24, (0.5,)),
    "cpu": Scale("demo", 8, 48, 40, 160, (0.4, 0.8)),
    "cuda": Scale("llama-3.1-8b", 64, 256, 160, 640, (0.5, 0.8)),
}


# -- the two policies -------------------------------------------------------------------------------------------------


class WatchedScheduler(Scheduler):
    """Continuous batching, the engine's own; notes who held which slot, and which slots were idle while somebody waited."""

    def __init__(self, kv_cache: KVCacheManager, *, now: Callable[[], float], **settings: Any) -> None:
        super().__init__(kv_cache, **settings)
        self._now = now
        self._since: dict[int, float] = {}
        self.stays: list[dict[str, Any]] = []
        self.slot_steps = 0
        self.idle_slot_steps = 0

    def schedule(self) -> SchedulerOutput | None:
        step = super().schedule()
        if step is not None:
            self.slot_steps += self.max_num_seqs
            if self._waiting:
                self.idle_slot_steps += self.max_num_seqs - len(self._running)
        return step

    def _start(self, request: Request) -> None:
        super()._start(request)
        self._since[request.slot] = self._now()

    def _leave_slot(self, request: Request) -> None:
        since = self._since.pop(request.slot)
        self.stays.append({"slot": request.slot, "request": request.request_id, "start_s": since, "end_s": self._now()})
        super()._leave_slot(request)


class StaticScheduler(WatchedScheduler):
    """Admits those who wait when nobody runs, as many as there are slots, and nobody else until the last of them has ended."""

    def __init__(self, kv_cache: KVCacheManager, **settings: Any) -> None:
        super().__init__(kv_cache, **settings)
        self._num_joining = 0  # members of the batch that the token budget has not let in yet

    def _admit_waiting(self, flight: InFlightStep, budget: int) -> None:
        if not self._running:
            self._num_joining = min(len(self._waiting), self.max_num_seqs)
        hidden = self._free_slots[: len(self._free_slots) - self._num_joining]
        del self._free_slots[: len(hidden)]
        num_running = len(self._running)
        super()._admit_waiting(flight, budget)
        self._num_joining -= len(self._running) - num_running
        self._free_slots[:0] = hidden


POLICIES: dict[str, type[WatchedScheduler]] = {"continuous": WatchedScheduler, "static": StaticScheduler}


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Results:
    scale = SCALES["smallest" if args.smallest else args.device]
    model = args.model or scale.model
    engine = ideas_engine.load(
        model,
        args.device,
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=scale.slots * (longest(scale) // BLOCK_SIZE + 2)),
        max_num_seqs=scale.slots,
        max_model_len=longest(scale),
        dtype=args.dtype,
    )
    loads = draw_loads(scale, engine.vocab_size, args.seed)
    if not args.smallest:
        serve(engine, "continuous", loads[: scale.slots])  # the first steps compile and warm up
    runs: list[dict[str, Any]] = []
    with progress(range(2 * (1 + len(scale.loads))), "batching", unit="run") as bar:
        for policy in POLICIES:
            counted = serve(engine, policy, loads, InstantRunner())
            runs.append({**serve(engine, policy, loads), **{name: counted[name] for name in COUNTED}, "load": None})
            bar.update()
        rate = runs[0]["requests_per_s"]
        for share in scale.loads:
            arriving = at_random_times(loads, share * rate, args.seed)
            for policy in POLICIES:
                runs.append({**serve(engine, policy, arriving), "load": share, "rate": share * rate})
                bar.update()
    return {
        "model": model_name(model),
        "random_weights": model in SHAPES,
        "slots": scale.slots,
        "num_requests": len(loads),
        "mean_answer": statistics.mean(load.max_tokens for load in loads),
        "longest_answer": max(load.max_tokens for load in loads),
        "runs": runs,
    }


COUNTED = ("steps", "slot_steps", "idle_slot_steps")


def longest(scale: Scale) -> int:
    return PROMPT_LENGTHS[1] + scale.longest_answer + 1


def draw_loads(scale: Scale, vocab_size: int, seed: int) -> list[Load]:
    """Requests that are all there at the start."""
    generator = np.random.default_rng(seed)
    mu = np.log(scale.mean_answer) - SIGMA**2 / 2
    answers = np.clip(np.rint(generator.lognormal(mu, SIGMA, scale.num_requests)), 1, scale.longest_answer)
    prompts = generator.integers(PROMPT_LENGTHS[0], PROMPT_LENGTHS[1] + 1, scale.num_requests)
    return [
        Load(random_prompt(generator, int(length), vocab_size), int(answer))
        for length, answer in zip(prompts, answers, strict=True)
    ]


def at_random_times(loads: Sequence[Load], rate: float, seed: int) -> list[Load]:
    """The same requests, arriving by a Poisson process of `rate` a second."""
    times = np.cumsum(np.random.default_rng(seed + 1).exponential(1 / rate, len(loads)))
    return [Load(load.prompt, load.max_tokens, float(time)) for load, time in zip(loads, times, strict=True)]


def serve(engine: LoadedEngine, policy: str, loads: Sequence[Load], runner: Runner | None = None) -> dict[str, Any]:
    """One policy over one load. Times in seconds; steps and slot steps of all of it."""
    made: list[WatchedScheduler] = []
    started = time.perf_counter()

    def make(*args: Any, **settings: Any) -> WatchedScheduler:
        made.append(POLICIES[policy](*args, now=lambda: time.perf_counter() - started, **settings))
        return made[0]

    core = ideas_engine.make_core(engine, runner=runner, scheduler_class=make, enable_prefix_caching=False)
    try:
        answers = ideas_engine.serve(core, loads)
    finally:
        core.close()
    seconds = time.perf_counter() - started
    scheduler = made[0]
    return {
        "policy": policy,
        "seconds": seconds,
        "requests_per_s": len(loads) / seconds,
        "output_tokens": output_tokens(answers),
        "steps": scheduler.stats().steps,
        "slot_steps": scheduler.slot_steps,
        "idle_slot_steps": scheduler.idle_slot_steps,
        "stays": sorted(scheduler.stays, key=lambda stay: stay["start_s"]),
        **latencies(answers),
    }


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    ttft = [answer.first_token_s for answer in answers]
    per_token = [answer.end_s / answer.load.max_tokens for answer in answers]
    found = {}
    for name, values in (("ttft", ttft), ("end", [answer.end_s for answer in answers]), ("per_token", per_token)):
        for percentile in (50, 99):
            found[f"{name}_p{percentile}_s"] = float(np.percentile(values, percentile))
    return found


# -- showing ----------------------------------------------------------------------------------------------------------


def at_once(results: Results) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["load"] is None]


def arriving(results: Results) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["load"] is not None]


def tables(results: Results) -> list[Table]:
    return [
        Table(
            f"All {results['num_requests']} requests there at once, {results['slots']} slots",
            ("policy", "steps", "slots idle while somebody waits", "output tok/s", "requests/s"),
            [
                [
                    run["policy"],
                    f"{run['steps']:,}",
                    percent(run["idle_slot_steps"] / run["slot_steps"]),
                    number(run["output_tokens"] / run["seconds"]),
                    number(run["requests_per_s"]),
                ]
                for run in at_once(results)
            ],
        ),
        Table(
            "Arriving at random; seconds (end to end a token: of the answer, from arrival to end)",
            ("load", "requests/s", "policy", "TTFT p50", "p99", "end to end p50", "p99", "a token p50"),
            [
                [
                    percent(run["load"]),
                    number(run["rate"]),
                    run["policy"],
                    *(number(run[f"{name}_s"]) for name in ("ttft_p50", "ttft_p99", "end_p50", "end_p99", "per_token_p50")),
                ]
                for run in arriving(results)
            ],
        ),
    ]


def summary(results: Results) -> str:
    continuous, static = at_once(results)
    pairs = arriving(results)
    ours, theirs = pairs[-2], pairs[-1]
    weights = " (random weights)" if results["random_weights"] else ""
    return (
        f"{results['model']}{weights}, {results['slots']} slots, answers of {results['mean_answer']:.0f} tokens on average and "
        f"{results['longest_answer']} at most: static batches take {static['steps'] / continuous['steps']:.1f} times the "
        f"steps, because {percent(static['idle_slot_steps'] / static['slot_steps'])} of their slots stand idle while "
        f"somebody waits, and give {static['output_tokens'] / static['seconds']:,.0f} tokens a second where continuous "
        f"batching gives "
        f"{continuous['output_tokens'] / continuous['seconds']:,.0f}. At {percent(ours['load'])} of the rate that continuous "
        f"batching can complete, the median first token comes after {number(ours['ttft_p50_s'])} s instead of "
        f"{number(theirs['ttft_p50_s'])} s."
    )


def draw_timeline(results: Results, figure: Figure) -> None:
    """Slots over time for both policies, with all requests there at once."""
    axes = figure.subplots(2, 1, sharex=True)
    runs = at_once(results)
    slots = min(results["slots"], MAX_TIMELINE_SLOTS)
    for axis, a_run in zip(axes, runs, strict=True):
        draw_slots(axis, a_run, slots)
    axes[0].set_xlim(0, max(stay["end_s"] for a_run in runs for stay in a_run["stays"]))
    some = f" ({slots} of {results['slots']} slots)" * (slots < results["slots"])
    axes[0].set_title(f"Continuous batching: a slot that is free is taken at the next step{some}")
    axes[1].set_title("Static batching, the same requests: slots stand empty until the batch's longest answer has ended")
    axes[1].set_xlabel("seconds; a bar is a request in its slot")


def draw_slots(axis: Axes, a_run: dict[str, Any], slots: int) -> None:
    for stay in a_run["stays"]:
        if stay["slot"] < slots:
            colour = COLOURS[int(stay["request"].split(":")[1]) % len(COLOURS)]
            seconds = stay["end_s"] - stay["start_s"]
            axis.barh(stay["slot"], seconds, left=stay["start_s"], height=0.82, color=colour, edgecolor="white", linewidth=0.6)
    axis.set_ylabel("slot")
    axis.set_yticks(range(0, slots, max(1, slots // 8)))
    axis.set_ylim(slots - 0.4, -0.6)
    axis.grid(visible=False)


def draw(results: Results, figure: Figure) -> None:
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.5))
    runs = at_once(results)
    colours = {"continuous": BLUE, "static": ORANGE}
    throughput = bars.bar(
        [run["policy"] for run in runs],
        [run["output_tokens"] / run["seconds"] for run in runs],
        color=[colours[run["policy"]] for run in runs],
        width=0.6,
    )
    bars.bar_label(
        throughput,
        [
            f"{run['output_tokens'] / run['seconds']:,.0f}\n{percent(run['idle_slot_steps'] / run['slot_steps'])} idle"
            for run in runs
        ],
        padding=3,
        fontsize=9,
    )
    bars.set_ylabel("output tokens per second")
    bars.set_title("All requests there at once")
    bars.margins(y=0.2)
    bars.grid(axis="x", visible=False)
    for policy, colour in colours.items():
        mine = [run for run in arriving(results) if run["policy"] == policy]
        rates = [run["rate"] for run in mine]
        curves.plot(rates, [run["ttft_p99_s"] for run in mine], color=colour, marker="o", label=f"{policy}, p99")
        curves.plot(rates, [run["ttft_p50_s"] for run in mine], color=colour, marker="o", linestyle=":", label=f"{policy}, p50")
    curves.axvline(runs[0]["requests_per_s"], color=GREY, linewidth=1)
    curves.annotate(
        "all that continuous\nbatching completes",
        (runs[0]["requests_per_s"], 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=INK,
    )
    log_axis(curves, "time to first token, seconds")
    curves.set_xlabel("requests per second (Poisson)")
    curves.set_title("Latency against load")
    curves.set_xlim(left=0)
    curves.margins(y=0.15)
    curves.legend(loc="center left")


def arguments(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)


IDEA = Idea(
    name="batching",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={
        "": Plot(draw, "Tokens per second of both policies, and time to first token against the rate of requests"),
        "timeline": Plot(
            draw_timeline, "Which request held which slot when, with continuous and with static batching", height=5.2
        ),
    },
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
