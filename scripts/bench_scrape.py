#!/usr/bin/env python3
"""What a scrape of /metrics costs the HTTP process: throughput under full load with a scrape every second and with none, and
how long the metrics take to write.

    scripts/bench_scrape.py                        # 8 pairs of runs, 256 streams, as many tokens as the frontend gets through
    scripts/bench_scrape.py --pairs 20 --keys 50   # more pairs; a server with 50 API keys, which have series of their own

The server, the engine that computes nothing and the clients are those of bench_frontend.py. The two runs of a pair follow one
another on the same server, now the one first and now the other, and are compared with each other: what slows a machine for
minutes slows both. Then the server is scraped without any other load, one scrape after the other, for the processor time of
one: of a core that is busy all the time, a scrape a second takes as much. Writing is timed in one process, on the function that
the server calls, which holds its event loop up; in processor time too, so that others on the machine count less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from bench_frontend import UNLIMITED_RATE, Figures, Load, run_load, served
from bench_frontend_engine import build_model_folder, make_ready

from engine.client import EngineClient
from engine.messages import DeviceUsage, EngineStats
from server.config import ServerConfig
from server.metrics import Metrics

INTERVAL_S = 1.0
PROMETHEUS_ACCEPTS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
FORMATS = {"OpenMetrics": PROMETHEUS_ACCEPTS, "text": "text/plain"}
STATUSES = (200, 400, 401, 404, 429, 500, 503)
NUM_RENDERS = 200
NUM_SCRAPES = 200


def scrape(port: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": PROMETHEUS_ACCEPTS})
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


@contextmanager
def scraping(port: int, times_s: list[float]) -> Iterator[None]:
    """Scrapes every second from a thread; how long each took goes to `times_s`."""
    ended = threading.Event()

    def run() -> None:
        while True:
            started_s = time.perf_counter()
            scrape(port)
            times_s.append(time.perf_counter() - started_s)
            if ended.wait(INTERVAL_S):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Measured(NamedTuple):
    """pairs: runs without scrapes and with one every second. times_s: what each of those scrapes took its client. cpu_s: of one
    scrape, of the HTTP process."""

    pairs: list[tuple[Figures, Figures]]
    times_s: list[float]
    cpu_s: float


def measure(folder: Path, load: Load, num_pairs: int) -> Measured:
    context = multiprocessing.get_context("spawn")
    pairs, times_s = [], list[float]()
    with served(folder, load.step_rate, None) as (server, port):
        run_load(context, load, server, port)  # what is done once is done
        for number in range(num_pairs):
            found: dict[bool, Figures] = {}
            for scrapes in (False, True) if number % 2 == 0 else (True, False):
                if scrapes:
                    with scraping(port, times_s):
                        found[True] = run_load(context, load, server, port)
                else:
                    found[False] = run_load(context, load, server, port)
            pairs.append((found[False], found[True]))
        before = server.cpu_times()
        for _ in range(NUM_SCRAPES):
            scrape(port)
        after = server.cpu_times()
    return Measured(pairs, times_s, (after.user + after.system - before.user - before.system) / NUM_SCRAPES)


def make_metrics(folder: Path, num_keys: int) -> Metrics:
    """With all series that a server with so many keys can have."""
    stats = EngineStats(devices=[DeviceUsage("cuda:0", 1, 2, 0.5)])
    client = SimpleNamespace(state="ready", stats=stats, num_restarts=0, ready=make_ready(str(folder), 1000))
    key_ids = [f"key{number}" for number in range(num_keys)]
    metrics = Metrics(cast(EngineClient, client), ServerConfig(model=str(folder)), key_ids, "0")
    for key_id in [*key_ids, "invalid"] if key_ids else [""]:
        for status in STATUSES:
            metrics.observe_response(key_id, status)
    return metrics


def measure_renders(metrics: Metrics) -> dict[str, dict[str, float]]:
    """By format: milliseconds to write, and bytes."""
    found = {}
    for name, accept in FORMATS.items():
        times_s = []
        for _ in range(NUM_RENDERS):
            started_s = time.thread_time()
            body, _ = metrics.render(accept)
            times_s.append(time.thread_time() - started_s)
        found[name] = {"ms": 1e3 * median(times_s), "ms_max": 1e3 * max(times_s), "bytes": len(body)}
    return found


def losses(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, list[float]]:
    """In per cent, pair by pair: throughput lost, and processor time a token added."""
    return {
        "throughput": [100 * (1 - (b.tokens / b.seconds) / (a.tokens / a.seconds)) for a, b in pairs],
        "cpu_per_token": [100 * ((b.cpu_s / b.tokens) / (a.cpu_s / a.tokens) - 1) for a, b in pairs],
    }


def describe(values: Sequence[float]) -> str:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return f"{median(ordered):+.2f}% (middle half {ordered[quarter]:+.2f} to {ordered[-1 - quarter]:+.2f})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of runs, with scrapes and without")
    parser.add_argument("--streams", type=int, default=Load.streams, help="requests open at a time")
    parser.add_argument("--rounds", type=int, default=2, help="requests of every stream, one after the other")
    parser.add_argument("--input-len", type=int, default=Load.input_len, help="words of a prompt")
    parser.add_argument("--output-len", type=int, default=Load.output_len, help="tokens of an answer")
    parser.add_argument("--rate", type=float, default=UNLIMITED_RATE, help="tokens a second offered")
    parser.add_argument("--clients", type=int, default=Load.clients, help="client processes")
    parser.add_argument("--keys", type=int, default=0, help="API keys of the server whose metrics are written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    load = Load(**{name: getattr(args, name) for name in Load.__dataclass_fields__ if hasattr(args, name)})
    with tempfile.TemporaryDirectory() as name:
        folder = build_model_folder(Path(name))
        renders = measure_renders(make_metrics(folder, args.keys))
        pairs, times_s, cpu_s = measure(folder, load, args.pairs)
    lost = losses(pairs)
    rate = median(a.tokens / a.seconds for a, _ in pairs)
    print(f"{load.streams} streams × {load.rounds}, {load.input_len} words in, {load.output_len} out: {rate:,.0f} tokens/s")
    print(f"a scrape every second, {len(pairs)} pairs: throughput lost {describe(lost['throughput'])}, ", end="")
    print(f"CPU a token {describe(lost['cpu_per_token'])}; a scrape takes {1e3 * median(times_s):.1f} ms under this load")
    print(f"a scrape takes {1e3 * cpu_s:.2f} ms of CPU: {100 * cpu_s / INTERVAL_S:.2f}% of a core")
    for name, row in renders.items():
        print(f"writing {name}, {args.keys} keys: {row['ms']:.2f} ms (longest {row['ms_max']:.2f}), {row['bytes']:,} bytes")
    if args.json:
        record: dict[str, Any] = {"tokens_per_s": rate, "lost_percent": lost, "scrape_s": times_s, "scrape_cpu_s": cpu_s}
        record["renders"] = renders
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
