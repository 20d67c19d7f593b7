"""One model for bench_gpu.py: start its server, watch it come to full speed, send the workloads, end it.

Before each measured workload a short load of the same kind runs uncounted, unless the first load had as many streams: CUDA
graphs come by load, and the figures to compare with are of servers that were warm.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_gpu_workloads import Figures, Model, Workload
from bench_process import Server, free_port, octavo_command, octavo_environ, running
from bench_serving import HttpError, Load, Sample, describe, gather, percentile, probe, summarize

WARMUP_OUTPUT_LEN = 48
STEADY_WITHIN = 0.1  # of the steady throughput


@contextmanager
def serving(folder: Path, name: str, server_args: Sequence[str], log: Path) -> Iterator[Server]:
    """`octavo serve` with random weights on a free port, from this checkout; its log is kept in `log`."""
    port = free_port()
    command = [*octavo_command(str(folder), port, name), "--load-format", "dummy", *server_args]
    with running(command, octavo_environ(), port, log) as server:
        yield server


def measure_model(
    model: Model,
    folder: Path,
    out: Path,
    *,
    workloads: Sequence[Workload],
    with_first_load: bool,
    num_processes: int,
    server_args: Sequence[str] = (),
    settle_s: float = 3.0,
    time_limit_s: float = 300.0,
) -> dict[str, Any]:
    """The record of one server's life: start-up, throughput by the second from its first ready answer, the workloads.

    Where the server fails or outlasts time_limit_s, `error` says so and what was measured until then is kept.
    """
    record: dict[str, Any] = {"server_args": list(server_args), "workloads": {}}
    with serving(folder, model.name, server_args, out / f"{model.name}.log") as server:
        # Clients of a killed server get errors, so that the benchmark goes on.
        limit = threading.Timer(time_limit_s, server.process.kill)
        limit.start()
        try:
            ready_s = server.wait_ready(time_limit_s)
            record["startup"] = {"ready_s": round(ready_s, 2), "phases": phases(server.lines, ready_s)}
            say(f"{model.name}: ready after {ready_s:.1f} s: {format_phases(record['startup']['phases'])}")
            base = asyncio.run(probe(Load(server.base_url, model=model.name)))
            if with_first_load:
                ready_at = time.monotonic()
                samples = gather(load_of(model.first_load, base, seed=1), num_processes, False)
                curve = by_second(samples, ready_at)
                record["startup"] |= {"steady_after_s": steady_after(curve), "by_second": curve}
                say(format_curve(curve, record["startup"]["steady_after_s"]))
                time.sleep(settle_s)
            for number, workload in enumerate(workloads):
                if not (with_first_load and workload.concurrency == model.first_load.concurrency):
                    warm_up(workload, base, num_processes, seed=1000 + number)
                load = load_of(workload, base, seed=2000 + number)
                summary = summarize(gather(load, min(num_processes, load.num_requests), False))
                record["workloads"][workload.name] = {
                    "load": describe(load),
                    "figures": short_figures(summary),
                    "summary": summary,
                }
                say(f"{model.name} {workload.name}: {describe(load)}: {format_figures(short_figures(summary))}")
                if summary["num_errors"]:
                    say(f"  {summary['num_errors']} errors: {summary['errors']}")
                if server.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {server.process.returncode} in the workload {workload.name}")
        except (RuntimeError, OSError, EOFError, HttpError, SystemExit) as error:
            record["error"] = str(error)
            say(f"{model.name}: {error}")
            for at, line in server.lines[-12:]:
                say(f"  {at:8.2f} {line[:300]}")
        finally:
            limit.cancel()
        record["log_notes"] = [line for _, line in server.lines if re.search(r" (WARNING|ERROR) ", line)][:40]
    return record


def say(text: str) -> None:
    print(text, flush=True)


def load_of(workload: Workload, base: Load, seed: int) -> Load:
    """A seed of its own keeps a workload's prompts out of the prefix cache that others filled."""
    fields = ("num_requests", "concurrency", "rate", "input_len", "output_len", "shared_prefix_len", "temperature", "top_p")
    return replace(base, seed=seed, **{name: getattr(workload, name) for name in fields})


def warm_up(workload: Workload, base: Load, num_processes: int, seed: int) -> None:
    """As many requests as are open at once (for a rate, those of a second), with short answers, prompts of their own."""
    at_once = workload.concurrency if workload.rate is None else max(1, round(workload.rate))
    output_len = min(workload.output_len, WARMUP_OUTPUT_LEN)
    load = replace(load_of(workload, base, seed), rate=None, concurrency=at_once, num_requests=at_once, output_len=output_len)
    gather(load, min(num_processes, at_once), False)


def phases(lines: Sequence[tuple[float, str]], ready_s: float) -> dict[str, float]:
    """Seconds of each start-up phase, in order: from the line that begins it to the next one, or to the first answer."""
    marks = [(at, line) for at, line in lines if at <= ready_s and re.match(r"\d\d:\d\d:\d\d ", line)]
    costs = {"until the first line": marks[0][0]} if marks else {}
    for (at, line), (end, _) in pairwise([*marks, (ready_s, "")]):
        name = re.sub(r"^\S+\s+\S+\s+", "", line).split(":")[0].strip()[:40]
        costs[name] = costs.get(name, 0.0) + end - at
    return {name: round(cost, 3) for name, cost in costs.items()}


def by_second(samples: Sequence[Sample], start: float) -> list[dict[str, float]]:
    """Tokens a second and ITL for every second after `start`. A chunk counts for its request's mean tokens a chunk."""
    tokens: dict[int, float] = defaultdict(float)
    gaps: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.error or not sample.chunk_times:
            continue
        weight = sample.output_tokens / len(sample.chunk_times)
        for at in sample.chunk_times:
            tokens[int(at - start)] += weight
        for before, at in pairwise(sample.chunk_times):
            gaps[int(at - start)].append(at - before)
    return [
        {
            "second": second,
            "output_tps": round(tokens[second], 1),
            "itl_p50_ms": round(1000 * percentile(gaps[second], 50), 2) if gaps[second] else 0.0,
            "itl_p99_ms": round(1000 * percentile(gaps[second], 99), 2) if gaps[second] else 0.0,
        }
        for second in range(max(tokens, default=-1) + 1)
    ]


def steady_after(curve: Sequence[dict[str, float]], window: int = 5) -> int | None:
    """Seconds until the throughput of `window` seconds first comes within a tenth of the best that any such window shows.

    A window smooths the waves of a closed load, whose requests begin together. None for a run too short to say.
    """
    rates = [point["output_tps"] for point in curve]
    means = [sum(rates[i : i + window]) / window for i in range(len(rates) - window + 1)]
    if not means:
        return None
    return next(second for second, mean in enumerate(means) if mean >= (1 - STEADY_WITHIN) * max(means))


def short_figures(summary: dict[str, Any]) -> Figures:
    """The figures that the tables compare, by the names of bench_gpu_workloads."""
    found = {"output_tps": summary["output_tokens_per_s"], "total_tps": summary["total_tokens_per_s"]}
    columns = (("ttft_p50", "ttft", "p50"), ("ttft_p99", "ttft", "p99"), ("tpot_p50", "tpot", "p50"), ("itl_p99", "itl", "p99"))
    return found | {name: summary[f"{kind}_ms"][column] for name, kind, column in columns if summary[f"{kind}_ms"]}


def format_figures(figures: Figures) -> str:
    return ", ".join(f"{name} {value:,.1f}" for name, value in figures.items())


def format_phases(costs: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in costs.items())


def format_curve(curve: Sequence[dict[str, float]], steady: int | None) -> str:
    points = " ".join(f"{point['output_tps']:.0f}/{point['itl_p99_ms']:.0f}" for point in curve)
    when = "too short to say when steady" if steady is None else f"steady after {steady} s"
    return f"  from the first ready answer, tok/s / ITL p99 ms by the second ({when}): {points}"
