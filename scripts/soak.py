#!/usr/bin/env python3
"""Mixed load on `octavo serve` for a while, and whether everything comes back: memory, file descriptors, pages, gauges.

    scripts/soak.py [--minutes 10] [--kill-every 30] [--model MODEL] [further flags of octavo serve]

Starts the server, and round after round lets clients ask everything at once: short and long, streamed and not, structured,
tools, embeddings, nonsense; some go away, some read slowly. After every round all of it has to be at rest. --kill-every kills
the engine now and then: no stream may end by that. The first round is the measure for the others. With --dtype float32 a greedy
request must always give the same text. Exit code 0 where all is well, 1 where not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_process import free_port, octavo_command, octavo_environ, running
from server_watch import POLL_S, ServerWatch, Vitals
from soak_load import Load

START_LIMIT_S = 1800.0  # a first start fetches the model
REST_LIMIT_S = 120.0
END_LIMIT_S = 120.0
MAX_GROWTH_BYTES = 64 * 2**20
MAX_GROWTH_SHARE = 0.10
SPARE_FDS = 8
MIB = 2**20

HEAD = "   time   asked      ok    left refused  failed   kills | peak pages | at rest: front MiB engine MiB  fds  fds  in use"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the flags for the server."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, at most 1,440 [10]")
    parser.add_argument("--rounds", type=int, help="[one a minute, at least 3]")
    parser.add_argument("--clients", type=int, default=16, help="at once [16]")
    parser.add_argument(
        "--kill-every", type=float, metavar="S", help="kill the engine about so often; not oftener than every 10 s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the server's log goes [a temporary file]")
    options, flags = parser.parse_known_args(argv)
    if not 0 < options.minutes <= 1440:
        parser.error("--minutes must be more than 0 and at most 1440")
    if options.kill_every is not None and options.kill_every <= 0:
        parser.error("--kill-every must be more than 0")
    if options.clients < 1 or (options.rounds is not None and options.rounds < 2):
        parser.error("--clients must be at least 1, --rounds at least 2")
    return options, flags


class Soak:
    """The rounds of one run."""

    def __init__(self, watch: ServerWatch, load: Load, options: argparse.Namespace) -> None:
        self._watch = watch
        self._load = load
        self._options = options
        self._rng = random.Random(options.seed)
        self._num_rounds: int = options.rounds or max(3, round(options.minutes))
        self._peak_pages = 0.0
        self.num_kills = 0
        self.at_rest: list[Vitals] = []

    async def run(self) -> None:
        started = time.monotonic()
        print(HEAD, flush=True)
        for _ in range(self._num_rounds):
            await self._round(self._options.minutes * 60 / self._num_rounds)
            vitals = await asyncio.to_thread(self._watch.wait_at_rest, REST_LIMIT_S)
            self.at_rest.append(vitals)
            print(self._row(time.monotonic() - started, vitals), flush=True)
            self._peak_pages = 0.0

    async def _round(self, seconds: float) -> None:
        beside = [asyncio.create_task(self._observe())]
        if self._options.kill_every is not None:
            beside.append(asyncio.create_task(self._kill(self._options.kill_every, time.monotonic() + seconds)))
        try:
            await self._load.run(self._options.clients, seconds)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _observe(self) -> None:
        while True:
            vitals = await asyncio.to_thread(self._watch.vitals)
            self._peak_pages = max(self._peak_pages, vitals.metrics.get("kv_cache_usage_perc", 0.0))
            await asyncio.sleep(1.0)

    async def _kill(self, every_s: float, until_s: float) -> None:
        """Only an engine that has come back: one after the other that dies without a step ends the server, as it should."""
        while True:
            await asyncio.sleep(every_s * self._rng.uniform(0.5, 1.5))
            while not await asyncio.to_thread(self._watch.is_ready):
                await asyncio.sleep(POLL_S)
            engine = self._watch.engine()
            if engine is not None and time.monotonic() < until_s:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine.pid, signal.SIGKILL)
                    self.num_kills += 1

    def _row(self, seconds: float, vitals: Vitals) -> str:
        count = self._load.tally.outcomes
        asked = sum(count[outcome] for outcome in ("ok", "left", "refused", "failed"))
        ended = f"{asked:7d} {count['ok']:7d} {count['left']:7d} {count['refused']:7d} {count['failed']:7d} {self.num_kills:7d}"
        memory = f"{vitals.frontend_rss_bytes / MIB:19.0f} {vitals.engine_rss_bytes / MIB:10.0f}"
        in_use = "nothing" if vitals.at_rest() else "MORE"
        return (
            f"{seconds:6.0f}s {ended} | {self._peak_pages:10.0%} | {memory} "
            f"{vitals.frontend_fds:4d} {vitals.engine_fds:4d} {in_use:>7}"
        )


def verdict(soak: Soak, load: Load, frontend_pid: int) -> list[str]:
    """What is not as it should be."""
    first, last = soak.at_rest[0], soak.at_rest[-1]
    found = [f"a request failed: {failure}" for failure in load.tally.failures]
    if not all(vitals.at_rest() for vitals in soak.at_rest):
        found.append("not everything came to rest after a round")
    if last.frontend_pid != frontend_pid or last.engine_pid == 0:
        found.append("a process is gone")
    if not soak.num_kills and last.engine_pid != first.engine_pid:
        found.append("the engine died")
    for name, before, after in (
        ("frontend", first.frontend_rss_bytes, last.frontend_rss_bytes),
        ("engine", first.engine_rss_bytes, last.engine_rss_bytes),
    ):
        if after - before > max(MAX_GROWTH_BYTES, MAX_GROWTH_SHARE * before):
            found.append(f"the {name}'s memory grew from {before / MIB:.0f} to {after / MIB:.0f} MiB")
    for name, before, after in (
        ("frontend", first.frontend_fds, last.frontend_fds),
        ("engine", first.engine_fds, last.engine_fds),
    ):
        if after > before + SPARE_FDS:
            found.append(f"the {name} has {after} file descriptors open, and had {before}")
    return found


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit code."""
    options, flags = parse(argv)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "log"
        command = [*octavo_command(options.model, port, "soak"), *flags]
        with running(command, octavo_environ(), port, log) as server:
            server.wait_ready(START_LIMIT_S)
            compare = "float32" in flags
            load = Load(server.base_url, options.seed, may_refuse=options.kill_every is not None, compare=compare)
            soak = Soak(ServerWatch(server.process.pid, server.base_url), load, options)
            try:
                asyncio.run(_drive(soak, load))
            except (OSError, http.client.HTTPException) as error:
                found = [f"the server no longer answers: {error!r}"]
            else:
                found = verdict(soak, load, server.process.pid)
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(END_LIMIT_S)
        if code != 0:
            found.append(f"the server ended with code {code}")
        if "Traceback" in log.read_text(encoding="utf-8"):
            found.append("the server's log has a traceback")
    if not compare and load.tally.outcomes["differs"]:
        print(f"{load.tally.outcomes['differs']} texts to the same greedy request differed, as they may below float32")
    print("\n".join(found) if found else "All came back.")
    return 1 if found else 0


async def _drive(soak: Soak, load: Load) -> None:
    refused = await load.prepare()
    if refused:
        print(f"left out, for this model does not take them: {', '.join(refused)}")
    await soak.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
