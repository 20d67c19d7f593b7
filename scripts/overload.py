#!/usr/bin/env python3
"""What happens to a server that is asked for more than it can do: a load at its capacity, then one at four times that.

    scripts/overload.py                                   # the demo model, a minute each
    scripts/overload.py --model M --seconds 20 -- --max-waiting-requests 64     # flags of `octavo serve` after --

Its capacity is what it completes a second while half as many clients again as it runs at once each ask anew as soon as they are
answered, so that no slot is ever empty. Then requests arrive at random (Poisson) at that rate, and at --times it, whether
earlier ones have been answered or not: nobody slows down for a server that is slow. All stream; a share of them gives a time
limit for the first token. Checked, and told by the exit code:

- every request ends in 200, 429 with a Retry-After, or 504, and no stream that has begun is cut without a word;
- the memory of both processes is as large at the end of the overload as in its middle;
- the 99th percentile of the time to first token of those let in is at most twice that at capacity (not with --no-timing);
- when all is over nothing runs, waits or holds a page.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench_process import Server, free_port, octavo_command, octavo_environ, running
from bench_serving import percentile
from server_watch import ServerWatch, Vitals

from server.bench_http import Connections, HttpError, Response
from server.sse_client import EventParser

NAME = "overloaded"
START_LIMIT_S, REST_LIMIT_S, REQUEST_LIMIT_S = 600.0, 120.0, 300.0
LOOK_INTERVAL_S = 0.5
FIRST_ID, LAST_ID = 3, 90  # of tokens that every tokenizer has
MAX_GROWTH_BYTES = 16 * 2**20
MAX_TTFT_RATIO = 2.0


@dataclass(frozen=True)
class Load:
    """Lengths in tokens. timed_share: of requests that give first_token_timeout_s."""

    input_len: int = 128
    output_len: int = 64
    slots: int = 32
    timed_share: float = 0.1
    first_token_timeout_s: float = 2.0
    seed: int = 0

    def payload(self, draw: random.Random) -> dict[str, Any]:
        payload = {
            "prompt": draw.choices(range(FIRST_ID, LAST_ID), k=self.input_len),
            "max_tokens": self.output_len,
            "ignore_eos": True,
            "stream": True,
        }
        if draw.random() < self.timed_share:
            payload["first_token_timeout"] = self.first_token_timeout_s
        return payload

    def num_kv_blocks(self) -> int:
        """Enough for all slots and a little to spare: a large cache is filled, and so grows in memory, for minutes."""
        return self.slots * ((self.input_len + self.output_len) // 16 + 2) * 3 // 2


@dataclass
class Phase:
    """What became of the requests of one load. problems: what is allowed under no load."""

    name: str
    rate: float
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    ttft_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    num_late_streams: int = 0
    problems: list[str] = field(default_factory=list)
    vitals: list[Vitals] = field(default_factory=list)
    seconds: float = 0.0

    def memory_growth(self, name: str) -> float:
        """Bytes between the middle third of this phase and its last."""
        sizes = [getattr(vitals, name) for vitals in self.vitals]
        third = len(sizes) // 3
        return median(sizes[2 * third :]) - median(sizes[third : 2 * third]) if third else 0.0

    def row(self) -> str:
        ttft = [f"{percentile(self.ttft_s, p):.2f}" if self.ttft_s else "-" for p in (50, 99)]
        waiting = max((vitals.metrics.get("num_requests_waiting", 0.0) for vitals in self.vitals), default=0.0)
        retry = f"{median(self.retry_after_s):.0f}" if self.retry_after_s else "-"
        sizes = [
            f"{max((getattr(vitals, name) for vitals in self.vitals), default=0) / 2**20:.0f}"
            for name in ("frontend_rss_bytes", "engine_rss_bytes")
        ]
        counts = [str(self.statuses[status]) for status in (200, 429, 504)]
        return "| " + " | ".join([self.name, f"{self.rate:.2f}", *counts, *ttft, f"{waiting:.0f}", retry, *sizes]) + " |"


HEADER = (
    "| load | requests/s | 200 | 429 | 504 | TTFT p50, s | p99, s | most waiting | Retry-After, s | frontend, MiB "
    "| engine, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


class Driver:
    """Sends loads to one server and watches it meanwhile."""

    def __init__(self, base_url: str, watch: ServerWatch, load: Load) -> None:
        self._connections = Connections(base_url)
        self._watch = watch
        self._load = load
        self._draw = random.Random(load.seed)

    async def closed(self, seconds: float) -> Phase:
        """Half as many clients again as there are slots, each with one request after the other. Its rate: of what they got."""
        phase = Phase("closed", 0.0)
        end_s = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end_s:
                await self._ask(phase)

        await self._watched(phase, lambda: asyncio.gather(*(client() for _ in range(self._load.slots * 3 // 2))))
        phase.rate = phase.statuses[200] / phase.seconds
        return phase

    async def open(self, name: str, rate: float, seconds: float) -> Phase:
        """`rate` requests a second at random times; returns when all of them have ended."""
        phase = Phase(name, rate)

        async def arrive() -> None:
            tasks = []
            at_s = time.monotonic()
            end_s = at_s + seconds
            while (at_s := at_s + self._draw.expovariate(rate)) < end_s:
                await asyncio.sleep(max(0.0, at_s - time.monotonic()))
                tasks.append(asyncio.create_task(self._ask(phase)))
            await asyncio.gather(*tasks)

        await self._watched(phase, arrive)
        return phase

    async def at_rest(self) -> Vitals:
        return await asyncio.to_thread(self._watch.wait_at_rest, REST_LIMIT_S)

    async def _watched(self, phase: Phase, work: Callable[[], Awaitable[object]]) -> None:
        async def look() -> None:
            while True:
                phase.vitals.append(await asyncio.to_thread(self._watch.vitals))
                await asyncio.sleep(LOOK_INTERVAL_S)

        looking = asyncio.create_task(look())
        started = time.monotonic()
        try:
            await work()
        finally:
            phase.seconds = time.monotonic() - started
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _ask(self, phase: Phase) -> None:
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                await self._read_answer(phase)
        except (OSError, asyncio.IncompleteReadError, HttpError, TimeoutError) as error:
            phase.problems.append(f"a request ended without an answer: {error!r}")

    async def _read_answer(self, phase: Phase) -> None:
        payload = self._load.payload(self._draw)
        sent = time.monotonic()
        async with Response(self._connections, "POST", "/v1/completions", payload) as response:
            phase.statuses[response.status] += 1
            if response.status != 200:
                self._read_refusal(phase, response, await response.read_all())
                return
            parser, is_done, is_first = EventParser(), False, True
            while part := await response.read_part():
                for event in parser.push(part):
                    if is_first:
                        phase.ttft_s.append(time.monotonic() - sent)
                        is_first = False
                    is_done = is_done or event == b"[DONE]"
                    if event.startswith(b'{"error"'):
                        self._read_error(phase, json.loads(event)["error"])
            if not is_done:
                phase.problems.append("a stream was cut")

    def _read_refusal(self, phase: Phase, response: Response, body: bytes) -> None:
        if response.status == 429 and 1 <= int(response.headers.get("retry-after", 0)) <= 60:
            phase.retry_after_s.append(int(response.headers["retry-after"]))
        elif response.status != 504 or json.loads(body)["error"]["code"] != "deadline_exceeded":
            phase.problems.append(f"HTTP {response.status}: {body[:200].decode(errors='replace')}")

    def _read_error(self, phase: Phase, error: dict[str, Any]) -> None:
        if error["code"] == "deadline_exceeded":
            phase.num_late_streams += 1
        else:
            phase.problems.append(f"a stream ended with {error['code']}: {error['message']}")


async def drive(server: Server, load: Load, *, seconds: float, times: float, timing: bool) -> list[str]:
    """Puts the loads on a server that is ready, prints what comes of it, and returns what is wrong."""
    driver = Driver(server.base_url, ServerWatch(server.process.pid, server.base_url), load)
    await driver.closed(min(5.0, seconds))  # the first requests take longer than any later
    closed = await driver.closed(seconds / 2)
    phases = [closed]
    for name, rate in (("capacity", closed.rate), (f"{times:g} times", times * closed.rate)):
        await driver.at_rest()
        phases.append(await driver.open(name, rate, seconds))
    rest = await driver.at_rest()
    print(HEADER)
    for phase in phases:
        print(phase.row(), flush=True)
    problems = [f"{phase.name}: {problem}" for phase in phases for problem in phase.problems]
    if not rest.at_rest():
        problems.append(f"something is left when all is over: {rest.metrics}")
    return problems + _judge(phases[1], phases[2], timing)


def _judge(capacity: Phase, overload: Phase, timing: bool) -> list[str]:
    problems = []
    for name in ("frontend_rss_bytes", "engine_rss_bytes"):
        growth = overload.memory_growth(name)
        print(f"{name}: {growth / 2**20:+.1f} MiB from the middle to the end of the overload")
        if growth > MAX_GROWTH_BYTES:
            problems.append(f"{name} grew by {growth / 2**20:.0f} MiB")
    if capacity.ttft_s and overload.ttft_s:
        ratio = percentile(overload.ttft_s, 99) / percentile(capacity.ttft_s, 99)
        print(f"TTFT p99 of those let in: {ratio:.2f} times that at capacity")
        if timing and ratio > MAX_TTFT_RATIO:
            problems.append(f"the p99 of TTFT is {ratio:.2f} times that at capacity, more than {MAX_TTFT_RATIO}")
    return problems


def main(argv: Sequence[str] | None = None, command: Sequence[str] = ()) -> int:
    """command: what serves in place of `octavo serve` (a port is added), for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two loads")
    parser.add_argument("--times", type=float, default=4.0, help="the capacity, for the overload")
    parser.add_argument("--no-timing", action="store_true", help="check all but the times")
    for name in ("input_len", "output_len", "slots", "timed_share", "first_token_timeout_s", "seed"):
        default = getattr(Load, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("flags", nargs="*", help="for octavo serve, after --")
    args = parser.parse_args(argv)
    names = set(Load.__dataclass_fields__)
    load = Load(**{name: value for name, value in vars(args).items() if name in names})
    port = free_port()
    sizes = ["--max-num-seqs", str(load.slots), "--num-kv-blocks", str(load.num_kv_blocks()), "--log-level", "warning"]
    own = [*octavo_command(args.model, port, NAME), *sizes] if not command else [*command, "--port", str(port)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running([*own, *args.flags], octavo_environ(), port, folder / "log"))
        server.wait_ready(START_LIMIT_S)
        problems = asyncio.run(drive(server, load, seconds=args.seconds, times=args.times, timing=not args.no_timing))
    for problem, count in collections.Counter(problems).items():
        print(f"wrong{f' ({count} times)' if count > 1 else ''}: {problem}", file=sys.stderr)
    print("all as it should be" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
