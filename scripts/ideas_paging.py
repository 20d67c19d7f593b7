#!/usr/bin/env python3
"""Pages against contiguous KV memory: how much of it is wasted, how many requests fit, and what that does to throughput.

    .venv/bin/python scripts/ideas_paging.py

Before PagedAttention (https://arxiv.org/abs/2309.06180) a request's keys and values lay in one piece, reserved when it began.
Both ways run here through the engine's core, with the same memory and the same requests, all there at the start; what changes
is the KV cache manager, which decides who is admitted:

  contiguous, max       every request gets room for the longest that is served, as when nobody knows how long answers become
  contiguous, exact     every request gets room for exactly its prompt and answer, as if that were known, in a buddy allocator,
                        which rounds up to a power of two of pages
  paged, 8 … 128        pages of so many tokens, handed out as tokens come: the engine's own

Lengths are drawn from log-normal distributions with the mean lengths that the PagedAttention paper gives for ShareGPT, 161
tokens of prompt and 338 of answer (sigma 1 of the logarithm, cut so that both fit 2,048). Shares of memory are means over the
steps after which somebody waits for memory. Steps and shares are counted with a runner that computes nothing; tokens per
second are measured with a model. Then the same core serves requests that have something in common, with sharing and without.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ideas_engine
import numpy as np
from ideas import BLUE, GREY, ORANGE, RED, SKY, Idea, Plot, Results, Table, number, percent, run
from ideas_contiguous import ContiguousKVCache
from ideas_engine import Load, random_prompt
from tqdm import tqdm

from engine.config import CacheConfig
from engine.kv_cache_manager import KVCacheManager, PrefixHit
from engine.messages import RequestOutput
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step import KVGroupSpec, ModelRunnerOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.build import LoadedEngine

MAX_MODEL_LEN = 2048
MEAN_PROMPT, MEAN_ANSWER, SIGMA = 161, 338, 1.0
BLOCK_SIZES = (8, 16, 32, 64, 128)
CONTIGUOUS_BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
VOCAB_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Scale:
    """capacity: tokens that the memory holds. num_requests: counted; num_timed: served by the model, in pages of
    timed_block_sizes."""

    capacity: int
    num_requests: int
    num_timed: int
    timed_block_sizes: tuple[int, ...]
    model: str


SCALES = {
    "smallest": Scale(8192, 64, 4, (16,), "llama-tiny"),
    "cpu": Scale(16384, 250, 64, (16, 32, 64), "llama-tiny"),
    "cuda": Scale(65536, 600, 256, (16,), "llama-3.2-1b"),
}


# -- the policies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """reserved_tokens: None for pages."""

    name: str
    block_size: int
    reserved_tokens: Callable[[Request], int] | None = None

    def kv_cache(self, groups: Sequence[KVGroupSpec], capacity: int, max_step_tokens: int) -> KVCacheManager:
        settings: dict[str, Any] = {"block_size": self.block_size, "max_step_tokens": max_step_tokens}
        num_blocks = [capacity // self.block_size]
        if self.reserved_tokens is None:
            return KVCacheManager(groups, num_blocks, enable_prefix_caching=False, **settings)
        return ContiguousKVCache(groups, num_blocks, reserved_tokens=self.reserved_tokens, **settings)


CONTIGUOUS = (
    Policy("contiguous, max", CONTIGUOUS_BLOCK_SIZE, lambda request: MAX_MODEL_LEN),
    Policy("contiguous, exact", CONTIGUOUS_BLOCK_SIZE, lambda request: request.max_total_tokens),
)


def paged(block_size: int) -> Policy:
    return Policy(f"paged, {block_size}", block_size)


@dataclass(slots=True)
class Watch:
    """Sums over the steps after which somebody waits for memory, in tokens of it. stored: keys and values. reserved: for tokens
    that will come. unused: for tokens that never come. free: nobody's, and yet not enough for the next request."""

    capacity: int
    steps: int = 0
    running: int = 0
    most_running: int = 0
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stored", "reserved", "unused", "free"), 0))

    def note(self, running: Sequence[Request]) -> None:
        stored = sum(request.num_computed_tokens for request in running)
        # The last token of an answer is never an input, and so never in the cache.
        used = sum(min(request.page_capacity, request.max_total_tokens - 1) for request in running)
        held = sum(request.page_capacity for request in running)
        now = {"stored": stored, "reserved": used - stored, "unused": held - used, "free": self.capacity - held}
        self.steps += 1
        self.running += len(running)
        self.most_running = max(self.most_running, len(running))
        for name, tokens in now.items():
            self.sums[name] += tokens

    def shares(self) -> dict[str, float]:
        return {name: total / self.steps / self.capacity for name, total in self.sums.items()}


class WatchedScheduler(Scheduler):
    """Tells of its memory after each step after which the next in the queue cannot be admitted for want of it."""

    def __init__(self, kv_cache: KVCacheManager, *, watch: Watch, **settings: Any) -> None:
        super().__init__(kv_cache, **settings)
        self._watch = watch

    def update(self, result: ModelRunnerOutput) -> list[RequestOutput]:
        outputs = super().update(result)
        waiting = next(iter(self._waiting), None)
        if waiting is not None and not self.kv_cache.can_admit(waiting, PrefixHit(0, ([],)), len(self._running)):
            self._watch.note(self._running)
        return outputs


# -- measuring --------------------------------------------------------------------------------------------------------


def draw_loads(count: int, vocab_size: int, seed: int) -> list[Load]:
    """The stated mix: see the module's docstring."""
    generator = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        median = mean / np.exp(SIGMA**2 / 2)
        return [max(1, round(x)) for x in generator.lognormal(np.log(median), SIGMA, count)]

    loads = []
    for prompt, answer in zip(lengths(MEAN_PROMPT), lengths(MEAN_ANSWER), strict=True):
        num_prompt = min(prompt, MAX_MODEL_LEN // 2)
        loads.append(Load(random_prompt(generator, num_prompt, vocab_size), min(answer, MAX_MODEL_LEN - num_prompt)))
    return loads


def count(policy: Policy, loads: Sequence[Load], capacity: int) -> dict[str, Any]:
    """What does not depend on a clock."""
    group = KVGroupSpec(layer_indices=(0,), num_kv_heads=1, head_dim=1, window=None, bytes_per_block=1)
    kv_cache, watch = policy.kv_cache([group], capacity, 512), Watch(capacity)
    core = ideas_engine.make_bare_core(
        kv_cache,
        scheduler_class=functools.partial(WatchedScheduler, watch=watch),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=512,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
    )
    answers = ideas_engine.serve(core, loads)
    core.check_integrity()
    stats = core.stats()
    core.close()
    return {
        "policy": policy.name,
        "shares": watch.shares(),
        "waiting_steps": watch.steps,
        "mean_running": watch.running / watch.steps,
        "most_running": watch.most_running,
        "steps": stats.steps,
        "output_tokens": ideas_engine.output_tokens(answers),
        "preemptions": stats.preemptions,
        "recomputed_tokens": stats.recomputed_tokens,
    }


def time_model(policy: Policy, engine: LoadedEngine, loads: Sequence[Load], capacity: int) -> dict[str, Any]:
    """Output tokens a second of a loaded model, whose pages are all of `capacity`."""
    limits = engine.limits
    kv_cache = policy.kv_cache(engine.groups, capacity, limits.max_num_batched_tokens * (1 + limits.pipeline_depth))
    core = ideas_engine.make_core(engine, kv_cache=kv_cache)
    started = time.perf_counter()
    answers = ideas_engine.serve(core, loads)
    seconds = time.perf_counter() - started
    tokens, steps = ideas_engine.output_tokens(answers), core.stats().steps
    core.close()
    return {"tokens_per_s": tokens / seconds, "timed_steps": steps, "timed_tokens": tokens}


def measure(args: argparse.Namespace) -> Results:
    scale = SCALES["smallest" if args.smallest else args.device]
    policies = [*CONTIGUOUS, *(paged(size) for size in BLOCK_SIZES)]
    timed = [policy for policy in policies if policy in CONTIGUOUS or policy.block_size in scale.timed_block_sizes]
    loads = draw_loads(scale.num_requests, VOCAB_SIZE, args.seed)
    with tqdm(total=len(policies) + len(timed) + 1, desc="paging", unit="policy", file=sys.stderr, dynamic_ncols=True) as bar:
        records = []
        for policy in policies:
            bar.set_postfix_str(f"{policy.name}, counted")
            records.append(count(policy, loads, scale.capacity))
            bar.update()
        speeds: dict[str, dict[str, Any]] = {}
        model = args.model or scale.model
        for block_size in scale.timed_block_sizes:
            engine = load_model(model, args.device, block_size, scale.capacity)
            timed_loads = draw_loads(scale.num_timed, engine.vocab_size, args.seed + 1)
            ideas_engine.serve(ideas_engine.make_core(engine), timed_loads[: max(4, scale.num_timed // 8)])
            for policy in timed:
                if policy.block_size == block_size:
                    bar.set_postfix_str(f"{policy.name}, {model}")
                    speeds[policy.name] = time_model(policy, engine, timed_loads, scale.capacity)
                    bar.update()
            del engine
        bar.set_postfix_str("sharing")
        sharing = share_prefix(args.smallest) + share_choices(args.smallest)
        bar.update()
    lengths = [[len(load.prompt), load.max_tokens] for load in loads]
    return {
        "capacity": scale.capacity,
        "num_requests": scale.num_requests,
        "num_timed": scale.num_timed,
        "mean_prompt": float(np.mean([prompt for prompt, _ in lengths])),
        "mean_answer": float(np.mean([answer for _, answer in lengths])),
        "model": model,
        "policies": [record | speeds.get(record["policy"], {}) for record in records],
        "sharing": sharing,
    }


def load_model(model: str, device: str, block_size: int, capacity: int) -> LoadedEngine:
    return ideas_engine.load(
        model,
        device,
        cache=CacheConfig(block_size=block_size, num_kv_blocks=capacity // block_size),
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
    )


# -- sharing ----------------------------------------------------------------------------------------------------------


def serve_and_count(loads: Sequence[Load], *, enable_prefix_caching: bool) -> dict[str, int]:
    """The most pages that were held at once, and prompt tokens that were computed."""
    group = KVGroupSpec(layer_indices=(0,), num_kv_heads=1, head_dim=1, window=None, bytes_per_block=1)
    kv_cache = KVCacheManager(
        [group], [65536], block_size=16, max_step_tokens=8192, enable_prefix_caching=enable_prefix_caching
    )
    core = ideas_engine.make_bare_core(
        kv_cache, max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE
    )
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, kv_cache.num_referenced_blocks)

    answers = ideas_engine.serve(core, loads, after_step=look)
    core.check_integrity()
    computed = core.stats().computed_tokens
    core.close()
    decodes = sum(load.n * (load.max_tokens - 1) for load in loads)
    assert ideas_engine.output_tokens(answers) == decodes + sum(load.n for load in loads)
    return {"pages": most, "prompt_tokens": computed - decodes}


def compare(name: str, shared: dict[str, int], apart: dict[str, int]) -> dict[str, Any]:
    return {"case": name, "shared": shared, "apart": apart}


def share_prefix(smallest: bool) -> list[dict[str, Any]]:
    """Requests that begin alike, such as with a system prompt of 512 tokens, 64 of their own, 32 of answer."""
    records = []
    for num_requests in (8,) if smallest else (8, 32, 128):
        generator = np.random.default_rng(num_requests)
        prefix = random_prompt(generator, 512, VOCAB_SIZE)
        loads = [Load(prefix + random_prompt(generator, 64, VOCAB_SIZE), 32) for _ in range(num_requests)]
        shared, apart = (serve_and_count(loads, enable_prefix_caching=caching) for caching in (True, False))
        records.append(compare(f"{num_requests} requests, 512 tokens alike + 64, prefix cache", shared, apart))
    return records


def share_choices(smallest: bool) -> list[dict[str, Any]]:
    """n answers of 64 tokens to one prompt of 512, beside n requests that know nothing of each other."""
    records = []
    for n in (4,) if smallest else (2, 4, 16):
        prompt = random_prompt(np.random.default_rng(n), 512, VOCAB_SIZE)
        shared = serve_and_count([Load(prompt, 64, n=n)], enable_prefix_caching=False)
        apart = serve_and_count([Load(prompt, 64)] * n, enable_prefix_caching=False)
        records.append(compare(f"n = {n}, prompt of 512, answers of 64", shared, apart))
    return records


# -- what it shows ----------------------------------------------------------------------------------------------------

SHARES = {
    "stored": ("keys and values", BLUE),
    "reserved": ("reserved for tokens to come", SKY),
    "unused": ("never used", ORANGE),
    "free": ("free, too little for the next", GREY),
}


def tables(results: Results) -> list[Table]:
    load = (
        f"{results['num_requests']} requests of {results['mean_prompt']:.0f} + {results['mean_answer']:.0f} tokens on average, "
        f"memory for {results['capacity']:,}"
    )
    rows = [
        [
            record["policy"],
            *(percent(record["shares"][name]) for name in SHARES),
            number(record["mean_running"]),
            str(record["most_running"]),
            f"{record['steps']:,}",
            number(record["output_tokens"] / record["steps"]),
            number(record.get("tokens_per_s")),
            f"{record['preemptions']} / {record['recomputed_tokens']:,}",
        ]
        for record in results["policies"]
    ]
    columns = ("policy", *(label for label, _ in SHARES.values()), "run at once", "most")
    sharing = [
        [
            record["case"],
            *(f"{record[side][what]:,}" for what in ("pages", "prompt_tokens") for side in ("apart", "shared")),
            percent(saved(record, "pages")),
            percent(saved(record, "prompt_tokens")),
        ]
        for record in results["sharing"]
    ]
    return [
        Table(f"{load}", (*columns, "steps", "tokens a step", f"tok/s, {results['model']}", "preempted / tokens anew"), rows),
        Table(
            "Sharing, in pages of 16 tokens",
            ("case", "pages apart", "pages shared", "prompt tokens apart", "computed", "pages saved", "computing saved"),
            sharing,
        ),
    ]


def saved(record: dict[str, Any], what: str) -> float:
    return 1 - float(record["shared"][what]) / float(record["apart"][what])


def summary(results: Results) -> str:
    by_name = {record["policy"]: record for record in results["policies"]}
    worst, exact, pages = by_name["contiguous, max"], by_name["contiguous, exact"], by_name["paged, 16"]
    speed = ""
    if "tokens_per_s" in pages:
        ratio = pages["tokens_per_s"] / worst["tokens_per_s"]
        speed = f" and {ratio:.1f} times the tokens per second with {results['model']}"
    return (
        f"Of the memory, {percent(worst['shares']['stored'])} holds keys and values where everybody gets room for the longest "
        f"request, {percent(exact['shares']['stored'])} with exact room in one piece, {percent(pages['shares']['stored'])} in "
        f"pages of 16. With pages {pages['mean_running']:.0f} requests run at once instead of {worst['mean_running']:.0f}: "
        f"{worst['steps'] / pages['steps']:.1f} times fewer steps for the same answers{speed}."
    )


def draw_policies(results: Results, figure: Figure) -> None:
    shares, running, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1.7, 1, 1))
    records = results["policies"][::-1]
    names = [record["policy"] for record in records]
    left = np.zeros(len(records))
    for name, (label, colour) in SHARES.items():
        values = np.array([100 * record["shares"][name] for record in records])
        shares.barh(names, values, left=left, color=colour, label=label, height=0.7)
        left += values
    for i, record in enumerate(records):
        shares.text(2, i, percent(record["shares"]["stored"]), va="center", color="white", fontsize=9, fontweight="bold")
    shares.set_xlabel("share of KV memory while others wait, %")
    shares.set_xlim(0, 100)
    shares.legend(loc="upper center", bbox_to_anchor=(0.42, 1.22), ncols=2, fontsize=8.5)
    for axes, what, label in (
        (running, "mean_running", "requests at once"),
        (speed, "tokens_per_s", f"tokens per second, {results['model']}"),
    ):
        figures = [record.get(what, 0.0) for record in records]
        bars = axes.barh(names, figures, color=[RED if "contiguous" in name else BLUE for name in names], height=0.7)
        axes.bar_label(bars, [number(figure) if figure else "not timed" for figure in figures], padding=3, fontsize=8.5)
        axes.margins(x=0.22)
        axes.set_xlabel(label)
    for axes in (shares, running, speed):
        axes.grid(axis="y", visible=False)


def draw_sharing(results: Results, figure: Figure) -> None:
    axes = figure.subplots()
    records = results["sharing"][::-1]
    names = [record["case"] for record in records]
    axes.barh(names, [100] * len(records), height=0.62, color="#E6E8EB", label="each for itself")
    kept = [100 * (1 - saved(record, "pages")) for record in records]
    bars = axes.barh(names, kept, height=0.62, color=BLUE, label="shared")
    texts = [f"{record['shared']['pages']:,} instead of {record['apart']['pages']:,} pages" for record in records]
    axes.bar_label(bars, texts, padding=5, fontsize=9)
    axes.set_xlim(0, 100)
    axes.set_xlabel("pages held at once, % of what they hold without sharing")
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="for tokens per second: demo, a folder, a Hub id, or a shape of scripts/dummy_model.py")


IDEA = Idea(
    name="paging",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={
        "": Plot(
            draw_policies,
            "Share of KV memory that holds keys and values, requests at once and tokens per second, by policy",
            11,
        ),
        "sharing": Plot(draw_sharing, "Pages held with and without sharing: prefix cache and n choices", 10, 3.8),
    },
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
