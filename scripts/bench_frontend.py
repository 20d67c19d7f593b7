#!/usr/bin/env python3
"""What the HTTP process alone can do: `octavo serve` with an engine that computes nothing, and clients that only count.

    scripts/bench_frontend.py                             # 256 streams, several rates, the cost of a token and of a request
    scripts/bench_frontend.py --rates 30000 --profile F   # one rate, and the frontend's time by line of code in the file F

The server is the real one in a process of its own; only the engine's command is replaced by this script, which speaks the
engine's protocol and gives every open choice one token a step, at a fixed number of steps a second. The clients read raw bytes
every few milliseconds and parse nothing but the usage at the end. All on loopback.

For each rate: tokens a second as the clients received them, tokens an event, and the processor time of the frontend process
(all its threads) from the first request to the last byte, in user and in kernel mode. The time of a request beside its tokens
is measured with answers of one token; what is left without it is the time of a token. Its parts are measured one by one on the
real functions in one process (bench_frontend_parts.py).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import psutil
from bench_frontend_engine import build_model_folder
from bench_frontend_parts import measure_parts
from bench_serving import path_of, percentile, words

SCRIPTS = Path(__file__).resolve().parent
START_TIMEOUT_S = 60
RUN_TIMEOUT_S = 300
READ_SIZE = 2**18
UNLIMITED_RATE = 1e6
MAX_OUTPUT_LEN = 16384
TAIL_BYTES = 1024  # holds the last events of a stream, usage among them


@dataclass(frozen=True)
class Load:
    """`streams` requests open at a time, each of which is followed by another until there were `rounds`; lengths in tokens.

    rate: tokens a second in all that the engine offers. poll_ms: a client's pause between two looks at its sockets.
    """

    streams: int = 256
    rounds: int = 1
    input_len: int = 128
    output_len: int = 512
    rate: float = 30000
    endpoint: str = "completions"
    clients: int = 1
    poll_ms: float = 10

    @property
    def num_requests(self) -> int:
        return self.streams * self.rounds

    @property
    def step_rate(self) -> float:
        """Steps a second; the engine gives every open stream a token in each."""
        return self.rate / self.streams


@dataclass
class Counts:
    """What a client has read. ttft_s: from sending a request to the first bytes of its body that hold an event."""

    tokens: int = 0
    events: int = 0
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """One run. user_s, system_s: processor time of the frontend process."""

    tokens: int
    events: int
    requests: int
    seconds: float
    user_s: float
    system_s: float
    ttft_s: list[float]

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def request_bytes(load: Load, index: int) -> bytes:
    text = words(load.input_len, index)
    body: dict[str, Any] = {
        "max_tokens": load.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        **({"messages": [{"role": "user", "content": text}]} if load.endpoint == "chat" else {"prompt": text}),
    }
    content = json.dumps(body).encode()
    head = f"POST {path_of(load.endpoint)} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Stream:
    """One connection: sends its requests one after the other and counts what comes back."""

    def __init__(self, port: int, requests: Sequence[bytes], is_chat: bool) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.counts = Counts()
        self._requests = list(requests)
        self._is_chat = is_chat
        self._tail = b""
        self._sent_at = 0.0
        self._waiting = False

    def send(self) -> bool:
        """The next request; False when there is none left."""
        if not self._requests:
            self.socket.close()
            return False
        self._tail, self._sent_at, self._waiting = b"", time.monotonic(), True
        self.socket.sendall(self._requests.pop(0))
        return True

    def read(self) -> bool:
        """What has come in; True at the end of an answer."""
        data = self.socket.recv(READ_SIZE)
        if not data:
            raise SystemExit(f"the server closed a stream: {self._tail[-300:].decode(errors='replace')}")
        seen = self._tail + data
        # Parts of a mark may lie on both sides of a border, a whole one not: the tail is counted from its last bytes on.
        mark = b'"choices":[{'
        self.counts.events += seen.count(mark, max(len(self._tail) - len(mark) + 1, 0))
        if self._waiting and b"data: " in seen:
            self._waiting = False
            self.counts.ttft_s.append(time.monotonic() - self._sent_at)
        self._tail = seen[-TAIL_BYTES:]
        if not self._tail.endswith(b"0\r\n\r\n"):
            return False
        usage = re.search(rb'"completion_tokens":(\d+)', self._tail)
        if usage is None:
            raise SystemExit(f"an answer without usage: {self._tail[-300:].decode(errors='replace')}")
        self.counts.tokens += int(usage[1])
        self.counts.events -= self._is_chat  # the one with the role
        return True


def read_all(load: Load, port: int, indexes: Sequence[int], start: Any, results: Any) -> None:
    """A client process's main: opens its streams, waits for the others, and reads to the end."""
    streams = [
        Stream(port, [request_bytes(load, index * load.rounds + turn) for turn in range(load.rounds)], load.endpoint == "chat")
        for index in indexes
    ]
    start.wait()
    selector = selectors.DefaultSelector()
    for stream in streams:
        stream.send()
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    while selector.get_map():
        for key, _ in selector.select():
            stream = key.data
            if stream.read():
                selector.unregister(stream.socket)
                if stream.send():
                    selector.register(stream.socket, selectors.EVENT_READ, stream)
        time.sleep(load.poll_ms / 1000)
    for stream in streams:
        results.put(stream.counts)


@contextmanager
def served(folder: Path, step_rate: float, profile: Path | None) -> Iterator[tuple[psutil.Process, int]]:
    """`octavo serve` over the fake engine: its process and its port."""
    command = [sys.executable, str(SCRIPTS / "bench_frontend_engine.py"), "serve", str(folder), str(step_rate)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    if profile is not None:
        environ["BENCH_PROFILE"] = str(profile)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, env=environ)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                log.seek(0)
                text = log.read()
                if found := re.search(r" at http://127\.0\.0\.1:(\d+)", text):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{text}")
                time.sleep(0.05)
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def run_load(context: SpawnContext, load: Load, server: psutil.Process, port: int) -> Figures:
    start, results = context.Barrier(load.clients + 1), context.SimpleQueue()
    clients = [
        context.Process(target=read_all, args=(load, port, range(i, load.streams, load.clients), start, results), daemon=True)
        for i in range(load.clients)
    ]
    for client in clients:
        client.start()
    start.wait(START_TIMEOUT_S)
    begin, before = time.monotonic(), server.cpu_times()
    counts: list[Counts] = []
    while len(counts) < load.streams:
        if not results.empty():
            counts.append(results.get())
            continue
        if any(client.exitcode for client in clients) or time.monotonic() > begin + RUN_TIMEOUT_S:
            raise SystemExit("a client failed, or the run took too long; see above")
        time.sleep(0.01)
    seconds, after = time.monotonic() - begin, server.cpu_times()
    for client in clients:
        client.join()
    return Figures(
        tokens=sum(count.tokens for count in counts),
        events=sum(count.events for count in counts),
        requests=load.num_requests,
        seconds=seconds,
        user_s=after.user - before.user,
        system_s=after.system - before.system,
        ttft_s=[one for count in counts for one in count.ttft_s],
    )


def measure(folder: Path, load: Load, profile: Path | None = None) -> Figures:
    """One load against a server of its own."""
    context = multiprocessing.get_context("spawn")
    with served(folder, load.step_rate, profile) as (server, port):
        return run_load(context, load, server, port)


def describe_run(load: Load, figures: Figures, request_cpu_s: float) -> dict[str, float]:
    """The figures of a run as they are printed and written: per second, per event, per token."""
    per_token_us = 1e6 * figures.cpu_s / figures.tokens
    return {
        "offered_tokens_per_s": load.rate,
        "tokens_per_s": figures.tokens / figures.seconds,
        "tokens_per_event": figures.tokens / figures.events,
        "cpu_share": figures.cpu_s / figures.seconds,
        "cpu_us_per_token": per_token_us,
        "user_us_per_token": 1e6 * figures.user_s / figures.tokens,
        "system_us_per_token": 1e6 * figures.system_s / figures.tokens,
        "cpu_us_per_token_alone": per_token_us - 1e6 * request_cpu_s * figures.requests / figures.tokens,
        "tokens_per_s_per_core": 1e6 / per_token_us,
    }


COLUMNS = (
    ("offered/s", "offered_tokens_per_s", ",.0f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("tokens/event", "tokens_per_event", ".2f"),
    ("cores busy", "cpu_share", ".2f"),
    ("CPU µs/token", "cpu_us_per_token", ".2f"),
    ("user", "user_us_per_token", ".2f"),
    ("system", "system_us_per_token", ".2f"),
    ("without requests", "cpu_us_per_token_alone", ".2f"),
    ("tokens/s/core", "tokens_per_s_per_core", ",.0f"),
)


def print_table(columns: Sequence[tuple[str, str, str]], rows: Sequence[dict[str, float]]) -> None:
    cells = [[title for title, _, _ in columns], *([format(row[key], spec) for _, key, spec in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def measure_requests(folder: Path, load: Load, num_requests: int) -> dict[str, float]:
    """What a request costs beside its tokens, many at a time; and how long its first token takes, one at a time."""
    short = replace(load, output_len=1, rate=UNLIMITED_RATE, clients=1)
    many = measure(folder, replace(short, rounds=math.ceil(num_requests / load.streams)))
    alone = measure(folder, replace(short, streams=1, rounds=num_requests, poll_ms=0))
    return {
        "input_len": load.input_len,
        "cpu_ms": 1e3 * many.cpu_s / many.requests,
        "ttft_ms_p50": 1e3 * percentile(alone.ttft_s, 50),
        "ttft_ms_p99": 1e3 * percentile(alone.ttft_s, 99),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=Load.streams, help="requests open at a time")
    parser.add_argument("--rounds", type=int, default=Load.rounds, help="requests of every stream, one after the other")
    parser.add_argument("--input-len", type=int, default=Load.input_len, help="words of a prompt; a token each, about")
    parser.add_argument("--output-len", type=int, default=Load.output_len, help="tokens of an answer")
    parser.add_argument("--rates", type=float, nargs="+", default=[15000, 30000, 60000], help="tokens a second offered")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default=Load.endpoint)
    parser.add_argument("--clients", type=int, default=Load.clients, help="client processes")
    parser.add_argument("--poll-ms", type=float, default=Load.poll_ms, help="a client's pause between two looks")
    parser.add_argument("--requests", type=int, default=512, help="requests by which the cost of one is measured")
    parser.add_argument("--steps", type=int, default=300, help="steps by which the parts of a token's cost are measured")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write there where the last rate's time goes, by sampling")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    load = Load(**{name: getattr(args, name) for name in Load.__dataclass_fields__ if hasattr(args, name)})
    print(f"{load.streams} streams × {load.rounds}, {load.input_len} words in, {load.output_len} out, {load.endpoint}")
    with tempfile.TemporaryDirectory() as name:
        folder = build_model_folder(Path(name))
        by_length = {
            length: measure_requests(folder, replace(load, input_len=length), args.requests)
            for length in sorted({load.input_len, 4 * load.input_len})
        }
        request_cpu_s = by_length[load.input_len]["cpu_ms"] / 1e3
        loads = [replace(load, rate=rate) for rate in args.rates]
        rates = [describe_run(one, measure(folder, one, args.profile), request_cpu_s) for one in loads]
        long_answers = replace(load, output_len=MAX_OUTPUT_LEN)
        parts = measure_parts(folder, [request_bytes(long_answers, index) for index in range(load.streams)], args.steps)
    print_table(COLUMNS, rates)
    for length, row in by_length.items():
        print(
            f"a request of {length} words: {row['cpu_ms']:.2f} ms of CPU beside its tokens; one at a time, its first token "
            f"comes after {row['ttft_ms_p50']:.2f} ms (p50), {row['ttft_ms_p99']:.2f} ms (p99)"
        )
    print("µs/token by part: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    if args.json:
        record = {"load": asdict(load), "rates": rates, "requests": list(by_length.values()), "us_per_token": parts}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
