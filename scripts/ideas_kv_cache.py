#!/usr/bin/env python3
"""The KV cache: tokens per second with it and without it, against sequence length, and what it takes in bytes.

    .venv/bin/python scripts/ideas_kv_cache.py   # the demo model on a CPU, the shape of Llama-3.1-8B on a GPU
    .venv/bin/python scripts/ideas_kv_cache.py --lengths 128 1024 --model llama-3.2-1b

A decoder's new token attends to the keys and values of all tokens before it (https://arxiv.org/abs/1706.03762). They never
change, so they are kept. Both sides run through the engine's core over the same loaded model, one request at a time, greedy.
Without the cache a request gives its pages back after each token and is computed again from its first token: that is what the
engine does with a request that it preempts, here after every token. A length's time is the median of the gaps between
tokens, so that the prompt's own computation, which both sides need, is left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from typing import TYPE_CHECKING, Any

from ideas import (
    BLUE,
    GREY,
    ORANGE,
    Idea,
    Plot,
    Results,
    Table,
    length_axis,
    log_axis,
    model_flags,
    model_name,
    number,
    positive,
    progress,
    run,
    size,
)

from engine.memory_plan import ModelShape, estimate_kv_groups
from engine.messages import RequestOutput
from engine.scheduler import Scheduler
from engine.step import ModelRunnerOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.build import LoadedEngine

BLOCK_SIZE = 16
LENGTHS = {"cpu": [64, 128, 256, 512, 1024, 2048], "cuda": [256, 1024, 4096, 16384]}
MODELS = {"cpu": "demo", "cuda": "llama-3.1-8b"}
SEQUENCES = (8192, 131072)

# Attention's sizes as the models' config.json state them; those of dummy_model.SHAPES come from there.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576},
    "Qwen2.5-0.5B": {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896},
    "Llama-2-7B": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096},
    "Llama-3.1-70B": {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192},
    "Gemma-2-9B": {
        "model_type": "gemma2",
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "hidden_size": 3584,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gpt-oss-20b": {
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_size": 2880,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
}
SHAPE_NAMES = {"llama-3.2-1b": "Llama-3.2-1B", "llama-3.1-8b": "Llama-3.1-8B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}


class RecomputingScheduler(Scheduler):
    """Keeps no keys and values from one token to the next: every request is preempted as soon as its token is known."""

    def update(self, result: ModelRunnerOutput) -> list[RequestOutput]:
        outputs = super().update(result)
        served = {output.request_id for output in outputs if output.token_ids}
        for request in [request for request in self._running if request.request_id in served]:
            self._preempt(request)
        return outputs


# -- with and without -------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Results:
    import ideas_engine
    from dummy_model import SHAPES

    from engine.config import CacheConfig

    lengths = args.lengths or ([32, 64] if args.smallest else LENGTHS[args.device])
    model = args.model or ("llama-tiny" if args.smallest else MODELS[args.device])
    cached, uncached = args.tokens
    longest = max(lengths) + max(cached, uncached) + 1
    engine = ideas_engine.load(
        model,
        args.device,
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=-(-longest // BLOCK_SIZE) + 1),
        max_num_seqs=4,
        max_model_len=longest,
        dtype=args.dtype,
    )
    run_side(engine, True, min(lengths), 2, args.seed)
    points = []
    for length in progress(lengths, "KV cache", unit="length"):
        with_cache = run_side(engine, True, length, cached, args.seed, warm_up=args.device == "cuda")
        without = run_side(engine, False, length, uncached, args.seed, warm_up=args.device == "cuda")
        num_equal = sum(a == b for a, b in zip(with_cache.pop("tokens"), without.pop("tokens"), strict=False))
        points.append({"length": length, "with": with_cache, "without": without, "equal_tokens": num_equal})
    ready = engine.ready
    return {
        "model": SHAPE_NAMES.get(model, model_name(model)),
        "random_weights": model in SHAPES,
        "dtype": ready.dtype,
        "kv_bytes_per_token": sum(group.bytes_per_block for group in engine.groups) / BLOCK_SIZE,
        "points": points,
        "models": model_rows(),
    }


def run_side(
    engine: LoadedEngine, keeps: bool, length: int, num_tokens: int, seed: int, *, warm_up: bool = False
) -> dict[str, Any]:
    """A request of `length` tokens that wants num_tokens + 1: gaps between them, and tokens that were computed in all."""
    import ideas_engine
    import numpy as np

    timed = ideas_engine.TimedRunner(engine.runner)
    core = ideas_engine.make_core(
        engine,
        runner=timed,
        scheduler_class=Scheduler if keeps else RecomputingScheduler,
        enable_prefix_caching=False,
        pipeline_depth=0,
    )
    prompt = ideas_engine.random_prompt(np.random.default_rng(seed + length), length, engine.vocab_size)
    load = ideas_engine.Load(prompt, num_tokens + 1)
    if warm_up:
        ideas_engine.serve(core, [load])
        timed.steps.clear()
    (answer,) = ideas_engine.serve(core, [load])
    core.close()
    return {
        "seconds_per_token": statistics.median(ideas_engine.gaps_s([answer])),
        "computed_tokens": sum(sum(step.num_tokens) for step in timed.steps),
        "steps": len(timed.steps),
        "preemptions": answer.num_preemptions,
        "output_tokens": num_tokens + 1,
        "tokens": answer.tokens[0],
    }


# -- bytes ------------------------------------------------------------------------------------------------------------


def model_rows() -> list[dict[str, Any]]:
    """Bytes of keys and values by model in bfloat16, ascending, by the engine's own arithmetic of pages."""
    from dummy_model import SHAPES

    configs = {**PUBLISHED, **{label: SHAPES[name] for name, label in SHAPE_NAMES.items()}}
    rows = []
    for label, config in configs.items():
        shape = ModelShape.of({"vocab_size": 1, **config})
        groups = estimate_kv_groups(config, BLOCK_SIZE, 2)
        rows.append(
            {
                "model": label,
                "layers": shape.num_layers,
                "heads": shape.num_heads,
                "kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "bytes_per_token": sum(group.bytes_per_block for group in groups) // BLOCK_SIZE,
                "sequence_bytes": [
                    sum(math.ceil(min(n, group.window or n) / BLOCK_SIZE) * group.bytes_per_block for group in groups)
                    for n in SEQUENCES
                ],
                "window": next((group.window for group in groups if group.window), None),
            }
        )
    return sorted(rows, key=lambda row: int(row["bytes_per_token"]))


# -- what it shows ----------------------------------------------------------------------------------------------------


def tables(results: Results) -> list[Table]:
    title = f"{results['model']} in {results['dtype']}, one request at a time"
    return [
        Table(
            title,
            ("sequence length", "tok/s with", "tok/s without", "ratio", "tokens computed for a token, with", "without"),
            [
                [
                    f"{point['length']:,}",
                    number(1 / point["with"]["seconds_per_token"]),
                    number(1 / point["without"]["seconds_per_token"]),
                    f"{ratio(point):.1f}",
                    *(f"{computed_per_token(point, side):,.0f}" for side in ("with", "without")),
                ]
                for point in results["points"]
            ],
        ),
        Table(
            "Keys and values in bfloat16; `--kv-cache-dtype fp8` halves them (* every other layer keeps a window only)",
            ("model", "layers", "query / KV heads", "head size", "a token", *(f"{n:,} tokens" for n in SEQUENCES)),
            [
                [
                    row["model"],
                    str(row["layers"]),
                    f"{row['heads']} / {row['kv_heads']}",
                    str(row["head_dim"]),
                    size(row["bytes_per_token"]),
                    *(size(num_bytes) + ("*" if row["window"] else "") for num_bytes in row["sequence_bytes"]),
                ]
                for row in results["models"]
            ],
        ),
    ]


def computed_per_token(point: dict[str, Any], side: str) -> float:
    """Tokens that were computed for one, on average, after the first."""
    after_first = int(point[side]["computed_tokens"]) - int(point["length"])
    return after_first / (int(point[side]["output_tokens"]) - 1)


def ratio(point: dict[str, Any]) -> float:
    return float(point["without"]["seconds_per_token"] / point["with"]["seconds_per_token"])


def summary(results: Results) -> str:
    first, last = results["points"][0], results["points"][-1]
    weights = " (random weights)" if results["random_weights"] else ""
    growth = (
        ""
        if first is last
        else (
            f" and {ratio(last):.0f} times as long at {last['length']:,}; with it, a token at {last['length']:,} takes "
            f"{last['with']['seconds_per_token'] / first['with']['seconds_per_token']:.2g} times what it takes at "
            f"{first['length']:,}"
        )
    )
    return (
        f"{results['model']}{weights}: without the cache a token takes {ratio(first):.1f} times as long at {first['length']:,} "
        f"tokens{growth}. The cache holds {size(results['kv_bytes_per_token'])} a token."
    )


def draw(results: Results, figure: Figure) -> None:
    speed, memory = figure.subplots(1, 2)
    lengths = [point["length"] for point in results["points"]]
    for side, label, colour, marker in (
        ("with", "with KV cache", BLUE, "o"),
        ("without", "without, and how many times slower", ORANGE, "s"),
    ):
        speed.plot(
            lengths,
            [1 / point[side]["seconds_per_token"] for point in results["points"]],
            color=colour,
            marker=marker,
            label=label,
        )
    for point in results["points"]:
        slow = 1 / point["without"]["seconds_per_token"]
        speed.annotate(
            f"{ratio(point):.0f}×" if ratio(point) >= 10 else f"{ratio(point):.1f}×",
            (point["length"], slow),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
        )
    length_axis(speed, lengths)
    log_axis(speed, "tokens per second")
    speed.margins(y=0.15)
    speed.set_title(f"One request, {results['model']}")
    speed.legend(loc="lower left")
    rows = results["models"]
    bars = memory.barh(
        [row["model"] for row in rows],
        [row["bytes_per_token"] / 1024 for row in rows],
        color=[GREY if row["window"] else BLUE for row in rows],
        height=0.65,
    )
    memory.bar_label(bars, [size(row["bytes_per_token"]) for row in rows], padding=4, fontsize=8.5)
    memory.set_xlabel("KiB in bfloat16")
    memory.set_title("KV cache of a token")
    memory.legend(
        [bars[index] for index in (first_of(rows, windowed=False), first_of(rows, windowed=True))],
        ["all layers see all tokens", "every other layer keeps a window only"],
        loc="lower right",
    )
    memory.grid(axis="y", visible=False)
    memory.margins(x=0.15)


def first_of(rows: list[dict[str, Any]], *, windowed: bool) -> int:
    return next(index for index, row in enumerate(rows) if bool(row["window"]) == windowed)


def arguments(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", help="prompt tokens before the first token")
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs=2,
        default=[16, 2],
        metavar=("WITH", "WITHOUT"),
        help="gaps to measure a length, by side",
    )


IDEA = Idea(
    name="kv-cache",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={"": Plot(draw, "Tokens per second with and without a KV cache against sequence length; bytes per token by model")},
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
