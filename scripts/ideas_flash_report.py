"""The tables and the plot of ideas_flash_attention.py, from its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ideas import BLUE, GREEN, GREY, ORANGE, PURPLE, Results, Table, length_axis, log_axis, number, percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "standard": ("standard", ORANGE, "s"),
    "tiled": ("tiled, plain torch", PURPLE, "^"),
    "torch": ("torch's kernel", GREEN, "D"),
    "engine": ("the engine's kernel", BLUE, "o"),
}


def curve(records: Sequence[dict[str, Any]], kind: str, what: str) -> tuple[list[int], list[float]]:
    """Lengths and figures of a kind, where it fits."""
    points = [(r["length"], r[what]) for r in records if r["kind"] == kind and r.get("fits", True)]
    return [length for length, _ in points], [value for _, value in points]


def power(lengths: Sequence[int], values: Sequence[float]) -> str:
    """The exponent of growth over the last doubling(s): 1 is linear, 2 quadratic. A dash where fewer than two lengths fit."""
    if len(lengths) < 2:
        return "–"
    return f"{math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2]):.2f}"


def main_curve(results: Results, is_causal: bool) -> list[dict[str, Any]]:
    shape = results["cases"][0]["shape"]
    return [r for r in results["cases"] if r["shape"] == shape and r["causal"] == is_causal]


def found(records: Sequence[dict[str, Any]], **keys: Any) -> dict[str, Any] | None:
    return next((r for r in records if all(r[name] == value for name, value in keys.items())), None)


def cell(record: dict[str, Any] | None, text: Callable[[dict[str, Any]], str]) -> str:
    """A dash where there is no such attention."""
    if record is None:
        return "–"
    return text(record) if record.get("fits", True) else "does not fit"


def best(records: Sequence[dict[str, Any]], **keys: Any) -> dict[str, Any] | None:
    """The engine's kernel, or torch's where the engine needs none."""
    return found(records, kind="engine", **keys) or found(records, kind="torch", **keys)


def saving(records: Sequence[dict[str, Any]], **keys: Any) -> float | None:
    standard, flash = found(records, kind="standard", **keys), best(records, **keys)
    if standard is None or flash is None or not standard.get("fits", True):
        return None
    return 1 - float(flash["peak_bytes"]) / float(standard["peak_bytes"])


def tables(results: Results) -> list[Table]:
    made = [
        curve_table(results, True),
        curve_table(results, False),
        shapes_table(results),
        exactness_table(results),
        core_table(results),
    ]
    return [table for table in made if table.rows]


def curve_table(results: Results, is_causal: bool) -> Table:
    records = main_curve(results, is_causal)
    shape = results["cases"][0]["shape"]
    kinds = [kind for kind in KINDS if found(records, kind=kind)]
    rows = []
    for length in sorted({r["length"] for r in records}):
        at = [found(records, kind=kind, length=length) for kind in kinds]
        rows.append(
            [
                f"{length:,}",
                *(cell(r, lambda r: size(r["peak_bytes"])) for r in at),
                percent(saving(records, length=length)),
                *(cell(r, lambda r: number(1000 * r["seconds"])) for r in at),
            ]
        )
    powers = [curve(records, kind, "peak_bytes") for kind in kinds]
    rows.append(["grows as length to the", *(power(*points) for points in powers), "", *[""] * len(kinds)])
    heads, dim = shape.split("x")
    of = f"{heads} heads of {dim}, {results['dtype']}"
    title = f"{'Causal' if is_causal else 'Not causal'}, {of}: memory of a call, and its time in ms"
    columns = ("tokens", *(f"{kind}" for kind in kinds), "saved", *(f"{kind}, ms" for kind in kinds))
    return Table(title, columns, rows)


def shapes_table(results: Results) -> Table:
    rows = []
    first = results["cases"][0]["shape"]
    for case in dict.fromkeys((r["shape"], r["causal"], r["length"]) for r in results["cases"] if r["shape"] != first):
        shape, is_causal, length = case
        keys = {"shape": shape, "causal": is_causal, "length": length}
        standard, flash = found(results["cases"], kind="standard", **keys), best(results["cases"], **keys)
        rows.append(
            [
                shape.replace("x", " × "),
                "yes" if is_causal else "no",
                f"{length:,}",
                cell(standard, lambda r: size(r["peak_bytes"])),
                cell(flash, lambda r: size(r["peak_bytes"])),
                percent(saving(results["cases"], **keys)),
                cell(standard, lambda r: number(1000 * r["seconds"])),
                cell(flash, lambda r: number(1000 * r["seconds"])),
                cell(standard, lambda r: f"{r['error']:.1e}"),
                cell(flash, lambda r: f"{r['error']:.1e}"),
            ]
        )
    columns = (
        "heads × size",
        "causal",
        "tokens",
        "standard",
        "flash",
        "saved",
        "standard, ms",
        "flash, ms",
        "error",
        "flash's error",
    )
    return Table("Other heads (flash: the engine's kernel; torch's where not causal)", columns, rows)


def exactness_table(results: Results) -> Table:
    records = results["exactness"]
    rows = [
        [dtype, *(cell(found(records, kind=kind, dtype=dtype), lambda r: f"{r['error']:.1e}") for kind in KINDS)]
        for dtype in dict.fromkeys(r["dtype"] for r in records)
    ]
    return Table(f"Error against float64, causal, {records[0]['length']:,} tokens", ("dtype", *KINDS), rows)


def core_table(results: Results) -> Table:
    rows = []
    for length in sorted({r["length"] for r in results["core"]}):
        at = [found(results["core"], kind=kind, length=length) for kind in ("standard", "tiled", "torch")]
        rows.append(
            [
                f"{length:,}",
                *(cell(r, lambda r: size(r["peak_bytes"])) for r in at),
                percent(saving(results["core"], length=length)),
                *(cell(r, lambda r: number(1000 * r["seconds"])) for r in at),
            ]
        )
    title = (
        f"A prompt through the engine's core in one step, {results['core_model']}, only the attention changed: memory, and ms"
    )
    return Table(title, ("tokens", "standard", "tiled", "torch", "saved", "standard, ms", "tiled, ms", "torch, ms"), rows)


def summary(results: Results) -> str:
    records = main_curve(results, True)
    engine, standard = curve(records, "engine", "peak_bytes"), curve(records, "standard", "peak_bytes")
    last = max(r["length"] for r in records)
    if not standard[0]:
        return f"Standard attention over {min(r['length'] for r in records):,} tokens does not fit."
    longest = standard[0][-1]
    times = [found(records, kind=kind, length=longest) for kind in ("standard", "engine")]
    assert times[0] is not None and times[1] is not None
    limit = "" if last == longest else f" Standard attention over {last:,} tokens does not fit."
    growth = f" Memory grows as length to the {power(*standard)} with the one and to the {power(*engine)} with the other."
    return (
        f"At {longest:,} tokens standard attention takes {size(standard[1][-1])} and {number(1000 * times[0]['seconds'])} ms, "
        f"the engine's kernel {size(times[1]['peak_bytes'])} ({percent(saving(records, length=longest))} less) and "
        f"{number(1000 * times[1]['seconds'])} ms.{growth if len(standard[0]) > 1 else ''}{limit}"
    )


def draw(results: Results, figure: Figure) -> None:
    memory, speed = figure.subplots(1, 2)
    records = main_curve(results, True)
    lengths = sorted({r["length"] for r in records})
    heads, dim = results["cases"][0]["shape"].split("x")
    for kind, (label, colour, marker) in KINDS.items():
        for axes, what, unit in ((memory, "peak_bytes", 2**20), (speed, "seconds", 1e-3)):
            at, values = curve(records, kind, what)
            grows = f": grows as length$^{{{power(at, values)}}}$" if axes is memory and len(at) > 1 else ""
            axes.plot(at, [value / unit for value in values], color=colour, marker=marker, label=label + grows)
    for axes, what, unit in ((memory, "peak_bytes", 2**20), (speed, "seconds", 1e-3)):
        mark_misfits(axes, records, what, unit)
        length_axis(axes, lengths)
        axes.tick_params(axis="x", labelsize=8.5)
    log_axis(memory, "memory of a call, MiB")
    log_axis(speed, "time, ms")
    memory.set_title(f"Memory, causal, {heads} heads of {dim}, {results['dtype']}")
    speed.set_title("Time")
    memory.legend(loc="upper left")
    speed.legend(loc="lower right")  # times rise from the lower left
    memory.margins(y=0.12)
    speed.margins(y=0.12)
    for length in lengths[1::2]:
        saved, flash = saving(records, length=length), found(records, kind="engine", length=length)
        if saved is not None and flash is not None:
            place = (length, flash["peak_bytes"] / 2**20)
            memory.annotate(
                f"{percent(saved)} saved",
                place,
                textcoords="offset points",
                xytext=(4, -15),
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )


def mark_misfits(axes: Axes, records: Sequence[dict[str, Any]], what: str, unit: float) -> None:
    """A grey cross where the curve of standard attention would go on."""
    lengths, values = curve(records, "standard", what)
    if not lengths:
        return
    for record in records:
        if record["kind"] == "standard" and not record.get("fits", True):
            value = values[-1] / unit * (record["length"] / lengths[-1]) ** 2
            axes.plot([lengths[-1], record["length"]], [values[-1] / unit, value], color=GREY, linestyle=":", linewidth=1.2)
            axes.plot([record["length"]], [value], color=GREY, marker="x", markersize=9, linestyle="none")
            axes.annotate(
                "does not fit", (record["length"], value), textcoords="offset points", xytext=(-8, -3), ha="right", fontsize=8
            )
