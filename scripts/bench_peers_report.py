"""Tables of bench_peers.py: every server's figures, and ours against the goals and the peers of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench_gpu_workloads import Workload
from bench_peers_servers import precision_of

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("c1", num_requests=8, input_len=128, output_len=64),
        Workload("c8", num_requests=32, concurrency=8, input_len=128, output_len=64),
        Workload("c16", num_requests=32, concurrency=16, input_len=512, output_len=32),
        Workload("shared", num_requests=16, concurrency=4, input_len=64, output_len=16, shared_prefix_len=512),
    )
}
"""By name: one stream; eight; sixteen with longer prompts; sixteen requests that share a prefix."""


@dataclass(frozen=True)
class Goal:
    """How many times as fast as which peer: the best of all, or the best that holds weights of the same precision."""

    workload: str
    figure: str
    at_least: float
    same_precision: bool = False


GOALS = (
    Goal("c1", "tpot_p50", 1.0, same_precision=True),
    Goal("c8", "output_tps", 1.5),
    Goal("c16", "output_tps", 1.5),
    Goal("shared", "output_tps", 2.0),
)
LOWER_IS_BETTER = ("tpot_p50", "ttft_p50", "ttft_p99", "itl_p99")
NAMES = {"tpot_p50": "TPOT p50, ms", "output_tps": "output tok/s", "total_tps": "total tok/s"}
Record = dict[str, Any]


def is_ours(server: str) -> bool:
    return server.startswith("octavo")


def values_of(record: Record, server: str, workload: str, figure: str) -> list[float]:
    """One figure of every round that ended without an error."""
    rounds = record["servers"][server].get("workloads", {}).get(workload, [])
    return [entry["figures"][figure] for entry in rounds if not entry["num_errors"] and figure in entry["figures"]]


def pick(values: Sequence[float], figure: str, how: str) -> float:
    """The best or the median of the rounds."""
    if how == "best":
        return min(values) if figure in LOWER_IS_BETTER else max(values)
    return statistics.median(values)


def speed_ratio(ours: float, theirs: float, figure: str) -> float:
    """How many times as fast ours is: above 1 is faster, whichever way the figure counts."""
    return theirs / ours if figure in LOWER_IS_BETTER else ours / theirs


def best_peer(record: Record, goal: Goal, ours: str, how: str) -> tuple[str, float] | None:
    """The fastest peer that the goal compares `ours` with, and its figure; None where none was measured."""
    found = {}
    for server in record["servers"]:
        values = values_of(record, server, goal.workload, goal.figure)
        if is_ours(server) or not values or (goal.same_precision and precision_of(server) != precision_of(ours)):
            continue
        found[server] = pick(values, goal.figure, how)
    if not found:
        return None
    best = pick(list(found.values()), goal.figure, "best")
    return next((server, value) for server, value in found.items() if value == best)


def compare(record: Record, how: str = "median") -> list[Record]:
    """A row for every goal and each of our servers that was measured, beside the best peer of all and that of its precision."""
    rows = []
    for goal in GOALS:
        for server in filter(is_ours, record["servers"]):
            values = values_of(record, server, goal.workload, goal.figure)
            if not values:
                continue
            ours = pick(values, goal.figure, how)
            row: Record = {"workload": goal.workload, "figure": goal.figure, "server": server, "ours": ours}
            row |= {"at_least": goal.at_least, "against_same_precision": goal.same_precision}
            for name, same_precision in (("best", False), ("same_precision", True)):
                peer = best_peer(record, Goal(goal.workload, goal.figure, goal.at_least, same_precision), server, how)
                if peer:
                    ratio = round(speed_ratio(ours, peer[1], goal.figure), 3)
                    row[name] = {"peer": peer[0], "value": peer[1], "ratio": ratio}
            rows.append(row)
    return rows


def format_ratios(rows: Sequence[Record]) -> str:
    lines = ["| workload | figure | server | ours | best peer | ratio | same precision | ratio | goal | reached |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        judged = row.get("same_precision" if row["against_same_precision"] else "best")
        cells = [row["workload"], NAMES[row["figure"]], row["server"], f"{row['ours']:,.1f}"]
        for name in ("best", "same_precision"):
            found = row.get(name)
            cells += [f"{found['peer']} {found['value']:,.1f}", f"{found['ratio']:.2f}"] if found else ["–", "–"]
        cells.append(f"≥ {row['at_least']:g} × {'same precision' if row['against_same_precision'] else 'best'}")
        cells.append("–" if not judged else "yes" if judged["ratio"] >= row["at_least"] else "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_figures(record: Record, how: str = "median") -> str:
    """Every server's figures; of several rounds the picked one and in brackets the range."""
    columns = [(goal.workload, goal.figure) for goal in GOALS]
    columns.insert(1, ("c1", "output_tps"))
    columns.insert(4, ("c16", "total_tps"))
    columns = [column for column in columns if column[0] in record["workloads"]]
    heads = [f"{workload} {NAMES[figure]}" for workload, figure in columns]
    lines = [f"| server | {' | '.join([*heads, 'memory, GB', 'ready after, s: first · second start'])} |"]
    lines.append("|" + "---|" * (len(heads) + 3))
    for server, entry in record["servers"].items():
        if "not_installed" in entry:
            continue
        cells = [_cell(values_of(record, server, *column), column[1], how) for column in columns]
        cells.append(f"{entry['memory_peak_bytes'] / 1e9:.2f}" if entry.get("memory_peak_bytes") else "–")
        cells.append(" · ".join(f"{seconds:.1f}" for seconds in entry.get("ready_s", ())) or "–")
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], figure: str, how: str) -> str:
    if not values:
        return "–"
    spread = f" ({min(values):,.1f}–{max(values):,.1f})" if len(values) > 1 else ""
    return f"{pick(values, figure, how):,.1f}{spread}"


def format_report(record: Record, how: str) -> str:
    """The machine, the figures, the ratios and whatever went wrong."""
    machine = ", ".join(f"{name}: {value}" for name, value in record["machine"].items())
    loads = ["- {}: {}".format(*item) for item in record["workloads"].items()]
    parts = [f"{machine}\n{how} of {record['num_rounds']} rounds", "\n".join(loads)]
    parts += [format_figures(record, how), format_ratios(compare(record, how))]
    notes = []
    for server, entry in record["servers"].items():
        notes += [f"- {server}: {entry[key]}" for key in ("not_installed", "error") if key in entry]
        notes += [f"- {server}: {warning}" for warning in entry.get("warnings", ())]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)
