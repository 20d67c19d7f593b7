#!/usr/bin/env python3
"""What happens to a server that is asked for more than it can do: a load at its capacity, then one at four times that.

    scripts/overload.py                                   # the demo model, a minute each
    scripts/overload.py --output-spread 0.5               # answers of different lengths
    scripts/overload.py --model M --seconds 20 -- --max-wait-s 5     # flags of `octavo serve` after --

**Capacity** is what it completes a second while no slot is ever empty: half as many clients again as it has slots ask anew as
soon as they are answered (who is refused, after a second at most). Their first answers are of random lengths, so that the
others do not all end together.

**Answers a second**, of every load, are those of the last two thirds of its time, each by the share of its stream that lies in
them: neither how a load begins, with slots that are empty yet, nor how it ends, is in the figure, and loads can be compared.

**At capacity** requests arrive at that rate, as many as that makes but at random times, whether earlier ones have been answered
or not: nobody slows down for a server that is slow. The time to first token is of those that come once the slots have had the
time to fill, that is as long as an answer takes with all slots in use: before that nobody waits, and the figure would be of a
server that is not at its capacity yet. It is mostly waiting: who is asked for exactly what he can do has a queue half the time.

**The overload** is --times that rate, from a server at rest. Of its statuses and times to first token everything counts, from
the first request on. Answers are equally long unless --output-spread says otherwise, which is the worst case: slots that were
filled together are free together.

All stream; a share of the requests gives a time limit for the first token. Checked, and told by the exit code:

- every request ends in 200, 429 with a Retry-After, or 504, and no stream that has begun is cut without a word;
- the memory of both processes is as large at the end of the overload as in its middle;
- the 99th percentile of the time to first token of those let in is at most twice that at capacity (not with --no-timing);
- under the overload it answers as many a second as it can, a tenth less at most (not with --no-timing): to refuse all would
  be easy;
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
MIN_SHARE_ANSWERED = 0.9
RAMP_SHARE = 1 / 3  # of a load's time, in which its slots are filled
LONGEST_RETRY_S = 1.0


@dataclass(frozen=True)
class Load:
    """Lengths in tokens. output_spread: by how much of output_len answers are shorter or longer. timed_share: of requests that
    give first_token_timeout_s."""

    input_len: int = 128
    output_len: int = 64
    output_spread: float = 0.0
    slots: int = 32
    timed_share: float = 0.1
    first_token_timeout_s: float = 2.0
    seed: int = 0

    def payload(self, draw: random.Random, share: float = 1.0) -> dict[str, Any]:
        """share: of the usual length of an answer."""
        length = self.output_len * share * draw.uniform(1 - self.output_spread, 1 + self.output_spread)
        payload = {
            "prompt": draw.choices(range(FIRST_ID, LAST_ID), k=self.input_len),
            "max_tokens": max(1, round(length)),
            "ignore_eos": True,
            "stream": True,
        }
        if draw.random() < self.timed_share:
            payload["first_token_timeout"] = self.first_token_timeout_s
        return payload

    def num_kv_blocks(self) -> int:
        """Enough for all slots and a little to spare: a large cache is filled, and so grows in memory, for minutes."""
        longest = self.input_len + int(self.output_len * (1 + self.output_spread))
        return self.slots * (longest // 16 + 2) * 3 // 2


@dataclass
class Phase:
    """What became of the requests of one load. from_s, to_s: its time. rate: a second, of those that came. spans: of whole
    answers, first token, end, and share of the usual length. problems: what is allowed under no load. Times are of
    time.monotonic()."""

    name: str
    rate: float
    from_s: float
    to_s: float
    spans: list[tuple[float, float, float]] = field(default_factory=list)
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    ttft_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    num_late_streams: int = 0
    problems: list[str] = field(default_factory=list)
    vitals: list[Vitals] = field(default_factory=list)

    def answered(self) -> float:
        """Answers a second in the last two thirds of its time, each by the share of its stream that lies in them."""
        steady_s = self.from_s + (self.to_s - self.from_s) * RAMP_SHARE
        shares = [
            share * max(0.0, min(end_s, self.to_s) - max(first_s, steady_s)) / max(end_s - first_s, 1e-9)
            for first_s, end_s, share in self.spans
        ]
        return sum(shares) / (self.to_s - steady_s)

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
        return (
            "| "
            + " | ".join(
                [self.name, f"{self.rate:.2f}", f"{self.answered():.2f}", *counts, *ttft, f"{waiting:.0f}", retry, *sizes]
            )
            + " |"
        )


HEADER = (
    "| load | requests/s | answers/s | 200 | 429 | 504 | TTFT p50, s | p99, s | most waiting | Retry-After, s | frontend, MiB "
    "| engine, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


class Driver:
    """Sends loads to one server and watches it meanwhile."""

    def __init__(self, base_url: str, watch: ServerWatch, load: Load) -> None:
        self._connections = Connections(base_url)
        self._watch = watch
        self._load = load
        self._draw = random.Random(load.seed)
        self._draw_times = random.Random(load.seed)

    async def closed(self, seconds: float) -> Phase:
        """Half as many clients again as there are slots, each with one request after the other."""
        began_s = time.monotonic()
        phase = Phase("closed", 0.0, began_s, began_s + seconds)

        async def client() -> None:
            share = self._draw.random()
            while time.monotonic() < phase.to_s:
                retry_after_s = await self._ask(phase, share)
                share = 1.0
                await asyncio.sleep(min(retry_after_s, LONGEST_RETRY_S))

        await self._watched(phase, lambda: asyncio.gather(*(client() for _ in range(self._load.slots * 3 // 2))))
        phase.rate = sum(phase.statuses.values()) / (time.monotonic() - began_s)
        return phase

    async def open(self, name: str, rate: float, seconds: float, settle_s: float = 0.0) -> Phase:
        """`rate` requests a second at random times, of which those count that come after settle_s; returns when all of them
        have ended."""
        began_s = time.monotonic()
        phase = Phase(name, rate, began_s + settle_s, began_s + settle_s + seconds)
        times = [began_s + self._draw_times.uniform(0.0, settle_s) for _ in range(round(rate * settle_s))]
        times += [phase.from_s + self._draw_times.uniform(0.0, seconds) for _ in range(round(rate * seconds))]

        async def arrive() -> None:
            tasks = []
            for at_s in sorted(times):
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
        try:
            await work()
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _ask(self, phase: Phase, share: float = 1.0) -> float:
        """How many seconds later to ask again, where it was refused."""
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                return await self._read_answer(phase, share)
        except (OSError, asyncio.IncompleteReadError, HttpError, TimeoutError) as error:
            phase.problems.append(f"a request ended without an answer: {error!r}")
            return LONGEST_RETRY_S

    async def _read_answer(self, phase: Phase, share: float) -> float:
        payload = self._load.payload(self._draw, share)
        sent = time.monotonic()
        async with Response(self._connections, "POST", "/v1/completions", payload) as response:
            phase.statuses[response.status] += 1
            if response.status != 200:
                self._read_refusal(phase, response, await response.read_all())
                return float(response.headers.get("retry-after", 0))
            parser, is_done, first = EventParser(), False, 0.0
            while part := await response.read_part():
                for event in parser.push(part):
                    if not first:
                        first = time.monotonic()
                        if sent >= phase.from_s:
                            phase.ttft_s.append(first - sent)
                    is_done = is_done or event == b"[DONE]"
                    if event.startswith(b'{"error"'):
                        self._read_error(phase, json.loads(event)["error"])
            if is_done:
                phase.spans.append((first, time.monotonic(), share))
            else:
                phase.problems.append("a stream was cut")
        return 0.0

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


def _told(phase: Phase) -> Phase:
    print(phase.row(), flush=True)
    return phase


async def drive(server: Server, load: Load, *, seconds: float, times: float, timing: bool) -> list[str]:
    """Puts the loads on a server that is ready, prints what comes of it, and returns what is wrong."""
    driver = Driver(server.base_url, ServerWatch(server.process.pid, server.base_url), load)
    await driver.closed(min(5.0, seconds))  # the first requests take longer than any later
    print(HEADER)
    phases = [_told(await driver.closed(seconds))]
    capacity = phases[0].answered()
    await driver.at_rest()
    phases.append(_told(await driver.open("capacity", capacity, seconds, settle_s=load.slots / capacity)))
    await driver.at_rest()
    phases.append(_told(await driver.open(f"{times:g} times", times * capacity, seconds)))
    rest = await driver.at_rest()
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
    share = overload.answered() / capacity.rate
    print(f"answers a second under the overload: {share:.2f} of the capacity")
    if timing and share < MIN_SHARE_ANSWERED:
        problems.append(f"under the overload it answers {share:.2f} of what it can, less than {MIN_SHARE_ANSWERED}")
    return problems


def main(argv: Sequence[str] | None = None, command: Sequence[str] = ()) -> int:
    """command: what serves in place of `octavo serve` (a port is added), for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two loads")
    parser.add_argument("--times", type=float, default=4.0, help="the capacity, for the overload")
    parser.add_argument("--no-timing", action="store_true", help="check all but the times")
    for name in ("input_len", "output_len", "output_spread", "slots", "timed_share", "first_token_timeout_s", "seed"):
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
