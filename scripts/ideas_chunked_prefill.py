#!/usr/bin/env python3
"""Chunked prefill: how long those who are being answered wait for their next token while long prompts arrive.

    .venv/bin/python scripts/ideas_chunked_prefill.py
    .venv/bin/python scripts/ideas_chunked_prefill.py --prompt-tokens 4096 --chunks 128 512

A step takes as long as its tokens need, and everybody in it gets the next token when it ends. A long prompt that is computed
whole makes one long step. Cut into chunks that ride along with the decodes (Sarathi-Serve, OSDI '24), it makes many steps that
are a little longer. All sides run through the engine's core over the same loaded model, with the same requests; what changes is
the scheduler's max_num_batched_tokens (and max_num_mixed_tokens, in the engine's own rule on a GPU: engine/step_budget.py).

Some requests are being answered all the time. A long prompt arrives whenever they have got a certain number of tokens more, so
that every side has the same steps to make whatever its clock says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ideas_engine
import numpy as np
from dummy_model import SHAPES
from ideas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    Idea,
    Plot,
    Results,
    Table,
    log_axis,
    model_flags,
    model_name,
    number,
    positive,
    progress,
    run,
)
from ideas_engine import Answer, Load, TimedRunner, gaps_s, output_tokens, random_prompt

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.engine_limits import EngineLimits
from engine.step_budget import TILE_ROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.build import LoadedEngine
    from engine.core import EngineCore

BLOCK_SIZE = 16
SHORT_PROMPT = 32
LONG_ANSWER = 4
CAPTURE_LIMIT_S = 15.0


@dataclass(frozen=True, slots=True)
class Scale:
    """num_running requests get num_tokens tokens each; num_prompts prompts arrive meanwhile, evenly. chunks: tokens a step.
    repeats: runs of a side, of which the one whose longest wait is the median is shown."""

    model: str
    num_running: int
    num_tokens: int
    prompt_tokens: int
    num_prompts: int
    chunks: tuple[int, ...]
    repeats: int = 1

    @property
    def slots(self) -> int:
        return self.num_running + self.num_prompts

    @property
    def whole(self) -> int:
        """Tokens of a step that takes a whole prompt and all who decode."""
        return -(-(self.prompt_tokens + self.slots) // TILE_ROWS) * TILE_ROWS


SCALES = {
    "smallest": Scale("llama-tiny", 3, 24, 90, 2, (16, 48)),
    "cpu": Scale("demo", 8, 120, 1024, 3, (64, 128, 256, 512)),
    "cuda": Scale("llama-3.1-8b", 64, 240, 8192, 4, (256, 512, 1024, 2048, 4096), repeats=3),
}


@dataclass(frozen=True, slots=True)
class Side:
    """A scheduler's setting. is_default: what `octavo serve` does on this device when nothing is said."""

    name: str
    max_num_batched_tokens: int
    max_num_mixed_tokens: int | None = None
    is_default: bool = False


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Results:
    scale = scale_of(args)
    engine = ideas_engine.load(
        scale.model,
        args.device,
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=num_blocks(scale)),
        max_num_seqs=scale.slots,
        max_num_batched_tokens=scale.whole,
        max_model_len=scale.prompt_tokens + scale.num_tokens + SHORT_PROMPT,
        dtype=args.dtype,
    )
    sides = sides_of(engine, scale, args.device)
    if not args.smallest:
        warm_up(engine, scale, sides, args.seed)
    runs = [median_run(engine, scale, side, args.seed) for side in progress(sides, "chunked prefill", unit="side")]
    for each in runs:
        each["equal_texts"] = sum(a == b for a, b in zip(each["texts"], runs[-1]["texts"], strict=True))
    for each in runs:
        del each["texts"]
    return {
        "model": model_name(scale.model),
        "random_weights": scale.model in SHAPES,
        "dtype": engine.ready.dtype,
        "num_running": scale.num_running,
        "num_tokens": scale.num_tokens,
        "num_prompts": scale.num_prompts,
        "prompt_tokens": scale.prompt_tokens,
        "runs": runs,
    }


def scale_of(args: argparse.Namespace) -> Scale:
    """Raises ValueError for chunks that the scheduler does not take."""
    scale = SCALES["smallest" if args.smallest else args.device]
    scale = replace(
        scale,
        model=args.model or scale.model,
        prompt_tokens=args.prompt_tokens or scale.prompt_tokens,
        chunks=tuple(sorted(args.chunks or scale.chunks)),
    )
    if scale.chunks[0] < scale.slots or scale.chunks[-1] >= scale.whole:
        raise ValueError(
            f"--chunks must be between {scale.slots} (a token for everybody) and {scale.whole - 1} (less than a whole prompt "
            f"of {scale.prompt_tokens} tokens), got {', '.join(map(str, scale.chunks))}"
        )
    return scale


def num_blocks(scale: Scale) -> int:
    """For all of them at their full length, and the page more that each may soon want."""
    running = SHORT_PROMPT + scale.num_tokens + 1
    long = scale.prompt_tokens + LONG_ANSWER + 1
    pages = scale.num_running * -(-running // BLOCK_SIZE) + scale.num_prompts * -(-long // BLOCK_SIZE)
    return pages + 2 * scale.slots


def sides_of(engine: LoadedEngine, scale: Scale, device: str) -> list[Side]:
    """Ascending; the whole prompt is the last."""
    default = EngineLimits.of(EngineConfig(model=ModelConfig(model=scale.model), device=device))
    sides = [
        Side(f"{chunk:,}", chunk, is_default=default.max_num_mixed_tokens is None and chunk == default.max_num_batched_tokens)
        for chunk in scale.chunks
    ]
    mixed = engine.limits.max_num_mixed_tokens
    if mixed is not None:
        sides.append(Side("rule", scale.whole, mixed, is_default=True))
    return [*sides, Side("whole", scale.whole)]


def warm_up(engine: LoadedEngine, scale: Scale, sides: Sequence[Side], seed: int) -> None:
    """Graphs are captured and a step of every side's kinds has run, so that neither is taken for a prompt's doing."""
    deadline = time.monotonic() + CAPTURE_LIMIT_S
    while engine.runner.idle() and time.monotonic() < deadline:
        pass
    short = replace(scale, num_tokens=8, num_prompts=1)
    for side in sides:
        measure_side(engine, short, side, seed)


def median_run(engine: LoadedEngine, scale: Scale, side: Side, seed: int) -> dict[str, Any]:
    """A longest wait is easily somebody else's doing: a run where the machine was busy with other things shows nothing."""
    runs = [measure_side(engine, scale, side, seed) for _ in range(scale.repeats)]
    return sorted(runs, key=lambda each: float(each["itl_max_s"]))[len(runs) // 2]


def measure_side(engine: LoadedEngine, scale: Scale, side: Side, seed: int) -> dict[str, Any]:
    """Times in seconds from the moment when all the running ones have their first token."""
    timed = TimedRunner(engine.runner)
    core = ideas_engine.make_core(
        engine,
        runner=timed,
        enable_prefix_caching=False,
        max_num_batched_tokens=side.max_num_batched_tokens,
        max_num_mixed_tokens=side.max_num_mixed_tokens,
    )
    made = np.random.default_rng(seed)
    vocab = engine.vocab_size
    running = [Load(random_prompt(made, SHORT_PROMPT, vocab), scale.num_tokens) for _ in range(scale.num_running)]
    prompts = [Load(random_prompt(made, scale.prompt_tokens, vocab), LONG_ANSWER) for _ in range(scale.num_prompts)]
    try:
        served = Served(core, running, prompts)
        served.run()
    finally:
        core.close()
    gaps = list(gaps_s(served.running))
    # The running ones' own prompts came before; a step in flight then was theirs too.
    steps = [step for step in timed.steps if step.started_s >= served.started]
    return {
        "side": side.name,
        "tokens_a_step": side.max_num_batched_tokens,
        "mixed_tokens_a_step": side.max_num_mixed_tokens,
        "is_default": side.is_default,
        "steps": len(timed.steps),
        "largest_step": max(sum(step.num_tokens) for step in steps),
        "computed_tokens": sum(sum(step.num_tokens) for step in timed.steps),
        "output_tokens": output_tokens(served.running + served.long),
        "seconds": served.seconds,
        "itl_p50_s": float(np.percentile(gaps, 50)),
        "itl_p99_s": float(np.percentile(gaps, 99)),
        "itl_max_s": max(gaps),
        "ttft_s": [answer.first_token_s for answer in served.long],
        "arrivals_s": [answer.load.arrival_s for answer in served.long],
        "token_times_s": served.running[0].times_s[0],
        "texts": [answer.tokens[0] for answer in served.running + served.long],
    }


class Served:
    """The running requests, and the long prompts that come in between. Times count from when all run."""

    def __init__(self, core: EngineCore, running: Sequence[Load], prompts: Sequence[Load]) -> None:
        self._core = core
        self._prompts = list(prompts)
        self.started = time.perf_counter()
        self.running = [Answer(load, [[]], [[]]) for load in running]
        self.long: list[Answer] = []
        self.seconds = 0.0
        for index, load in enumerate(running):
            ideas_engine.add(core, f"running:{index}", load)

    def run(self) -> None:
        every = self.running[0].load.max_tokens // len(self._prompts)
        while not all(answer.tokens[0] for answer in self.running):
            self._step()
        self._restart_clock()
        base = len(self.running[-1].tokens[0])
        while self._core.has_work:
            num_arrived = len(self.long)
            is_due = len(self.running[-1].tokens[0]) - base >= every * num_arrived + every // 4
            if num_arrived < len(self._prompts) and is_due:
                load = replace(self._prompts[num_arrived], arrival_s=time.perf_counter() - self.started)
                self.long.append(Answer(load, [[]], [[]]))
                ideas_engine.add(self._core, f"long:{num_arrived}", load)
            self._step()
        self.seconds = time.perf_counter() - self.started

    def _step(self) -> None:
        outputs = self._core.step()
        now = time.perf_counter() - self.started
        for output in outputs:
            kind, _, index = output.request_id.partition(":")
            (self.running if kind == "running" else self.long)[int(index)].take(output, now)

    def _restart_clock(self) -> None:
        """What came before were the running ones' own prompts."""
        self.started = time.perf_counter()
        for answer in self.running:
            answer.times_s = [[0.0]]


# -- showing ----------------------------------------------------------------------------------------------------------


def label(each: dict[str, Any]) -> str:
    """For people, as short as a tick of an axis."""
    if each["side"] == "rule":
        low, high = each["mixed_tokens_a_step"] // 2, each["mixed_tokens_a_step"]
        return f"{low:,}–{high:,}"
    return str(each["side"])


def default_of(results: Results) -> dict[str, Any]:
    """What the engine does by itself; the middle side where no side is that."""
    runs = results["runs"][:-1]
    return next((each for each in runs if each["is_default"]), runs[len(runs) // 2])


def tables(results: Results) -> list[Table]:
    total = results["runs"][0]["computed_tokens"]
    return [
        Table(
            f"{results['num_running']} running requests, {results['num_prompts']} prompts of {results['prompt_tokens']:,} "
            f"tokens arrive ({total:,} tokens computed in all; * what the engine does by itself); milliseconds",
            ("tokens a step", "steps", "largest step", "ITL p50", "p99", "max", "TTFT of the long ones", "tokens/s in all"),
            [
                [
                    label(each) + " *" * each["is_default"],
                    f"{each['steps']:,}",
                    f"{each['largest_step']:,}",
                    *(number(1e3 * each[f"itl_{name}_s"]) for name in ("p50", "p99", "max")),
                    number(1e3 * statistics.mean(each["ttft_s"])),
                    number(each["computed_tokens"] / each["seconds"]),
                ]
                for each in results["runs"]
            ],
        )
    ]


def summary(results: Results) -> str:
    ours, whole = default_of(results), results["runs"][-1]
    smallest = results["runs"][0]
    weights = " (random weights)" if results["random_weights"] else ""
    return (
        f"{results['model']}{weights} in {results['dtype']}, {results['num_running']} requests being answered while prompts of "
        f"{results['prompt_tokens']:,} tokens arrive: computed whole, a prompt lets them wait "
        f"{milliseconds(whole, 'itl_max_s')} for a token; in steps of {label(ours)} tokens at most "
        f"{milliseconds(ours, 'itl_max_s')}, in steps of {label(smallest)} {milliseconds(smallest, 'itl_max_s')}. The prompt's "
        f"own first token comes after {milliseconds(whole, 'ttft_s')} whole, {milliseconds(ours, 'ttft_s')} and "
        f"{milliseconds(smallest, 'ttft_s')} in chunks. All sides compute {whole['computed_tokens']:,} tokens."
    )


def milliseconds(each: dict[str, Any], field: str) -> str:
    return f"{number(1e3 * float(np.mean(each[field])))} ms"


def draw(results: Results, figure: Figure) -> None:
    """Gaps between the tokens of one running request over time, on three sides."""
    whole, ours, smallest = results["runs"][-1], default_of(results), results["runs"][0]
    shown = [whole, ours] + [smallest] * (smallest is not ours)
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True)
    titles = [f"Whole prompts: a step of up to {whole['largest_step']:,} tokens"]
    titles += [f"Steps of {label(each)} tokens" + " (the engine's own)" * each["is_default"] for each in shown[1:]]
    for axes, each, title, colour in zip(panels, shown, titles, (ORANGE, BLUE, GREEN), strict=False):
        draw_gaps(axes, each, colour)
        axes.set_title(title)
        axes.set_ylabel("ms")
    panels[0].set_xlim(0, max(max(each["token_times_s"]) for each in shown))
    panels[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    panels[-1].set_xlabel("seconds; a point is a token of one of the running requests, as high as the wait for it")


def draw_gaps(axes: Axes, each: dict[str, Any], colour: str) -> None:
    times = each["token_times_s"]
    gaps = [1e3 * (after - before) for before, after in pairwise(times)]
    for index, (arrival, ttft) in enumerate(zip(each["arrivals_s"], each["ttft_s"], strict=True)):
        text = "a long prompt, from arrival to first token" * (index == 0)
        axes.axvspan(arrival, arrival + ttft, color="#E9ECF1", linewidth=0, label=text)
    axes.vlines(times[1:], 0, gaps, color=colour, linewidth=0.8)
    axes.plot(times[1:], gaps, "o", color=colour, markersize=2.5, label="wait for a token")
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


def draw_trade_off(results: Results, figure: Figure) -> None:
    """By chunk size: what the running ones wait, what the prompt waits, and what the machine does in all."""
    gaps, prompts, speed = figure.subplots(1, 3)
    # The engine's rule is no size among the others: it stands apart.
    fixed = [each for each in results["runs"] if each["side"] != "rule"]
    rule = [each for each in results["runs"] if each["side"] == "rule"]
    for name, colour, style, text in (("p50", SKY, "-", "median"), ("p99", BLUE, "-", "p99"), ("max", ORANGE, ":", "longest")):
        draw_line(gaps, [1e3 * each[f"itl_{name}_s"] for each in fixed + rule], len(fixed), colour, style, text)
    log_axis(gaps, "milliseconds")
    gaps.legend(loc="best")
    gaps.set_title("Wait for the next token")
    draw_line(prompts, [statistics.mean(each["ttft_s"]) for each in fixed + rule], len(fixed), GREEN, "-", "")
    prompts.set_ylim(bottom=0)
    prompts.set_ylabel("seconds")
    prompts.set_title("First token of a long prompt")
    places = list(range(len(fixed + rule)))
    bars = [each["computed_tokens"] / each["seconds"] for each in fixed + rule]
    speed.bar(places, bars, color=[BLUE if each["is_default"] else GREY for each in fixed + rule], width=0.65)
    speed.set_ylabel("tokens per second")
    speed.set_title("Prompts and answers together")
    for axes in (gaps, prompts, speed):
        axes.set_xticks(places, [label(each) for each in fixed + rule], rotation=35 if len(places) > 5 else 0)
        axes.set_xlabel("tokens a step" + " (last: the engine's rule)" * bool(rule))
        axes.grid(axis="x", visible=False)


def draw_line(axes: Axes, values: Sequence[float], num_fixed: int, colour: str, style: str, text: str) -> None:
    axes.plot(range(num_fixed), values[:num_fixed], style, color=colour, marker="o", label=text)
    axes.plot(range(num_fixed, len(values)), values[num_fixed:], "D", color=colour)


def arguments(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--prompt-tokens", type=positive, help="of each long prompt")
    parser.add_argument("--chunks", type=positive, nargs="+", help="tokens a step, a side each")


IDEA = Idea(
    name="chunked-prefill",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={
        "": Plot(draw, "The wait for each token of a running request over time, while long prompts arrive", height=6.0),
        "trade-off": Plot(
            draw_trade_off,
            "By tokens a step: waits for the next token, time to the first token of long prompts, tokens per second",
        ),
    },
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
