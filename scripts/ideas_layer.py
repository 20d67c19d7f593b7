#!/usr/bin/env python3
"""A transformer layer and token generation: the way of one token through the model, with the time and the bytes of each part.

    scripts/ideas_layer.py
    scripts/ideas_layer.py --contexts 128 2048 --model llama-3.2-1b

One request decodes, one token a step: an embedding's row; in every layer a norm, the product for q, k and v, the rotary
embedding and the write into a page, attention over all pages, the output projection, another norm, the products for gate and
up with their activation, and the product down; then the last norm, the head, and the choice of a token. Each number of a
weight is read for one multiplication and one addition, so a part takes as long as its bytes need to arrive from memory:
beside each part's time stand the bytes that it moves, and the share of this machine's memory bandwidth that this is. The parts'
sum is compared with the step measured whole. How parts are timed on either device: scripts/ideas_layer_parts.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from ideas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Idea,
    Plot,
    Results,
    Table,
    model_flags,
    model_name,
    number,
    percent,
    positive,
    progress,
    run,
    size,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK_SIZE = 16
CONTEXTS = {"smallest": [16, 48], "cpu": [128, 1024, 4096], "cuda": [128, 2048, 8192, 32768]}
MODELS = {"smallest": "llama-tiny", "cpu": "demo", "cuda": "llama-3.1-8b"}
STEPS = {"smallest": 3, "cpu": 16, "cuda": 32}
BANDWIDTH_BYTES = {"smallest": 1 << 22, "cpu": 1 << 28, "cuda": 1 << 30}
CAPTURE_LIMIT_S = 10.0

LABELS = {
    "inputs": "inputs of the step",
    "embedding": "embedding",
    "input_norm": "norm",
    "qkv": "q, k, v",
    "rotary": "rotary embedding, KV write",
    "attention": "attention over pages",
    "output": "output projection, add",
    "mlp_norm": "norm",
    "gate_up": "gate and up, activation",
    "down": "down, add",
    "final_norm": "last norm",
    "head": "head",
    "sampling": "choice of the token",
    "around": "around it",
}
KINDS = {"weights of the layers": BLUE, "keys and values": ORANGE, "head": GREEN, "the rest": GREY}


def kind_of(part: str) -> str:
    if part in ("qkv", "output", "gate_up", "down"):
        return "weights of the layers"
    return {"attention": "keys and values", "head": "head"}.get(part, "the rest")


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Results:
    import ideas_engine
    from dummy_model import SHAPES
    from ideas_layer_parts import bandwidth, measure_context

    from engine.config import CacheConfig

    scale = "smallest" if args.smallest else args.device
    contexts = sorted(args.contexts or CONTEXTS[scale])
    model = args.model or MODELS[scale]
    longest = contexts[-1] + 2 * STEPS[scale] + 8
    engine = ideas_engine.load(
        model,
        args.device,
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=-(-longest // BLOCK_SIZE) + 2),
        max_num_seqs=1,
        max_model_len=longest,
        dtype=args.dtype,
    )
    deadline = time.monotonic() + CAPTURE_LIMIT_S
    while engine.runner.idle() and time.monotonic() < deadline:
        pass
    speeds = [bandwidth(args.device, BANDWIDTH_BYTES[scale])]
    core = ideas_engine.make_core(engine)  # with its prefix cache: a longer context begins like a shorter one
    try:
        points = [
            measure_context(engine, core, context, STEPS[scale], args.seed)
            for context in progress(contexts, "parts of a step", unit="context")
        ]
    finally:
        core.close()
    speeds.append(bandwidth(args.device, BANDWIDTH_BYTES[scale]))  # before and after: others may have been at work once
    return {
        "model": model_name(model),
        "random_weights": model in SHAPES,
        "dtype": engine.ready.dtype,
        "bandwidth": {way: max(each[way] for each in speeds) for way in ("copy", "read")},
        "points": points,
    }


# -- showing ----------------------------------------------------------------------------------------------------------


def best_bandwidth(results: Results) -> float:
    """A core's copy may fetch what it overwrites, so the faster of copying and reading stands for the machine."""
    return float(max(results["bandwidth"].values()))


def shown_point(results: Results) -> dict[str, Any]:
    """The context whose parts are shown one by one: the middle one."""
    points = results["points"]
    found: dict[str, Any] = points[len(points) // 2]
    return found


def total(point: dict[str, Any], field: str) -> float:
    return float(sum(part[field] for part in point["parts"]))


def label(part: dict[str, Any], point: dict[str, Any]) -> str:
    """Where no norm stands by itself, it is within the product behind it."""
    own_norms = any(each["part"] == "input_norm" for each in point["parts"])
    within = "norm, " if part["part"] in ("qkv", "gate_up") and not own_norms else ""
    return within + LABELS[part["part"]]


def tables(results: Results) -> list[Table]:
    point, fastest = shown_point(results), best_bandwidth(results)
    whole = total(point, "seconds")
    return [
        Table(
            f"One token after {point['context']:,}; microseconds of all calls",
            ("part", "shapes", "calls", "µs", "of the step", "bytes", "of the bandwidth"),
            [
                [
                    label(part, point),
                    part["shape"],
                    str(part["calls"]),
                    number(1e6 * part["seconds"]),
                    percent(part["seconds"] / whole),
                    size(part["bytes"]) if part["bytes"] else "–",
                    percent(part["bytes"] / part["seconds"] / fastest) if part["bytes"] and part["seconds"] else "–",
                ]
                for part in point["parts"]
            ],
        ),
        Table(
            f"By context; milliseconds a token. The memory: {number(results['bandwidth']['read'] / 1e9)} GB/s read, "
            f"{number(results['bandwidth']['copy'] / 1e9)} GB/s copied (both ways)",
            (
                "context",
                "bytes",
                "at the memory's speed",
                "sum of the parts",
                "whole, undivided",
                "difference",
                "step by the clock",
            ),
            [
                [
                    f"{each['context']:,}",
                    size(total(each, "bytes")),
                    number(1e3 * total(each, "bytes") / fastest),
                    number(1e3 * total(each, "seconds")),
                    number(1e3 * each["undivided_s"]),
                    percent(total(each, "seconds") / each["undivided_s"] - 1),
                    number(1e3 * each["step_s"]),
                ]
                for each in results["points"]
            ],
        ),
    ]


def share_of(point: dict[str, Any], *kinds: str, field: str = "seconds") -> float:
    return float(sum(part[field] for part in point["parts"] if kind_of(part["part"]) in kinds)) / total(point, field)


def summary(results: Results) -> str:
    point, last = shown_point(results), results["points"][-1]
    weights = " (random weights)" if results["random_weights"] else ""
    moved = total(point, "bytes")
    products = share_of(point, "weights of the layers", "head")
    return (
        f"{results['model']}{weights} in {results['dtype']}: a token after {point['context']:,} others takes "
        f"{number(1e3 * point['undivided_s'])} ms and moves {size(moved)}, which is "
        f"{percent(moved / point['undivided_s'] / best_bandwidth(results))} of what this machine's memory gives "
        f"({number(best_bandwidth(results) / 1e9)} GB/s). "
        f"{percent(products)} of the time goes to "
        f"products with weights and {percent(share_of(point, 'keys and values'))} to attention; after {last['context']:,} "
        f"tokens attention has {percent(share_of(last, 'keys and values'))}. The parts add up to "
        f"{percent(total(point, 'seconds') / point['undivided_s'])} of the step measured whole."
    )


def draw(results: Results, figure: Figure) -> None:
    """The way of a token from top to bottom, each part beginning where the one before it ended."""
    axes = figure.subplots()
    point, fastest = shown_point(results), best_bandwidth(results)
    parts = point["parts"]
    whole = 1e3 * total(point, "seconds")
    start = 0.0
    for row, part in enumerate(parts):
        milliseconds = 1e3 * part["seconds"]
        colour = KINDS[kind_of(part["part"])]
        axes.barh(row, milliseconds, left=start, height=0.72, color=colour, edgecolor=colour, linewidth=0.8)
        end = start + milliseconds
        text = f"{number(milliseconds)} ms" if milliseconds >= 1 else f"{number(1e3 * milliseconds)} µs"
        if part["bytes"] > 0.001 * total(point, "bytes"):
            text += f" · {size(part['bytes'])} · {percent(part['bytes'] / part['seconds'] / fastest)} of the bandwidth"
        place_text(axes, row, start, end, text, whole)
        start = end
    axes.set_yticks(range(len(parts)), [""] * len(parts))
    for row, part in enumerate(parts):
        name_parts(axes, row, label(part, point), part)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * whole)
    axes.set_xlabel("milliseconds since the step began")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"One token after {point['context']:,} others, {results['model']} in {results['dtype']}")
    legend_of_kinds(axes)


def place_text(axes: Axes, row: int, start: float, end: float, text: str, whole: float) -> None:
    """In a bar that is long enough, else beside it where there is room."""
    if end - start > 0.36 * whole:
        axes.text((start + end) / 2, row, text, ha="center", va="center", fontsize=8, color="white")
        return
    on_the_left = start > 0.55 * whole
    axes.annotate(
        text,
        (start if on_the_left else end, row),
        xytext=(-5 if on_the_left else 5, 0),
        textcoords="offset points",
        ha="right" if on_the_left else "left",
        va="center",
        fontsize=8,
    )


def name_parts(axes: Axes, row: int, name: str, part: dict[str, Any]) -> None:
    """Beside the axis: what a part is called, and under it the shapes."""
    calls = f"   × {part['calls']} layers" if part["calls"] > 1 else ""
    for text, offset, colour, font_size in ((name + calls, 0.18, INK, 9), (part["shape"], -0.26, "#5F6368", 7)):
        axes.annotate(
            text,
            (0, row - offset),
            xytext=(-8, 0),
            textcoords="offset points",
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=font_size,
            color=colour,
        )


def legend_of_kinds(axes: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    axes.legend(handles=handles, loc="lower left", handlelength=1.2)


def draw_contexts(results: Results, figure: Figure) -> None:
    """A token's time by context; and the bytes a second of the parts that move most of them."""
    bars, speeds = figure.subplots(1, 2)
    points = results["points"]
    places = list(range(len(points)))
    below = [0.0] * len(points)
    for kind, colour in KINDS.items():
        heights = [1e3 * share_of(point, kind) * total(point, "seconds") for point in points]
        bars.bar(places, heights, bottom=below, color=colour, width=0.62, label=kind)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    whole = [1e3 * point["undivided_s"] for point in points]
    bars.hlines(whole, [place - 0.4 for place in places], [place + 0.4 for place in places], INK, label="measured whole")
    bars.set_xticks(places, [f"{point['context']:,}" for point in points])
    bars.set_xlabel("tokens before")
    bars.set_ylabel("milliseconds a token")
    bars.set_title("A token's time, part by part")
    bars.grid(axis="x", visible=False)
    bars.margins(y=0.3)
    bars.legend(loc="upper left", ncols=2, handlelength=1.2)
    draw_speeds(speeds, results)


def draw_speeds(axes: Axes, results: Results) -> None:
    point, fastest = results["points"][-1], best_bandwidth(results)
    parts = [part for part in point["parts"] if part["bytes"] > 0.001 * total(point, "bytes")]
    speeds = [part["bytes"] / part["seconds"] / 1e9 for part in parts]
    names = [LABELS[part["part"]] for part in parts]
    drawn = axes.barh(names, speeds, color=[KINDS[kind_of(part["part"])] for part in parts], height=0.65)
    axes.bar_label(drawn, [number(speed) for speed in speeds], label_type="center", fontsize=8.5, color="white")
    axes.axvline(fastest / 1e9, color=PURPLE, linewidth=1.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*speeds, fastest / 1e9))
    axes.set_xlabel(f"GB per second (line: the memory's speed, {number(fastest / 1e9)})")
    axes.set_title(f"How fast the parts read, after {point['context']:,} tokens")
    axes.grid(axis="y", visible=False)


def arguments(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument("--contexts", type=positive, nargs="+", help="tokens before the one that is measured")


IDEA = Idea(
    name="layer",
    description=__doc__,
    measure=measure,
    tables=tables,
    summary=summary,
    plots={
        "": Plot(
            draw, "The parts of one token's step from top to bottom, with shapes, times and bytes", width=10.5, height=6.6
        ),
        "contexts": Plot(draw_contexts, "A token's time by context and part; the bytes a second that each large part reads"),
    },
    arguments=arguments,
)


if __name__ == "__main__":
    sys.exit(run(IDEA))
