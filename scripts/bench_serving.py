#!/usr/bin/env python3
"""Load generator for an OpenAI-compatible server: many streams at once, latencies and throughput as the client sees them.

    scripts/bench_serving.py --concurrency 8 --num-requests 64 --input-len 128 --output-len 64
    scripts/bench_serving.py --rate 20 --num-requests 400 --processes 4 --input-len 1024 --output-len 128

Needs only the standard library. Token counts come from the server's `usage`; prompts are random words, their number found by
two probe requests. One Python process reads some 12,000 chunks a second: give more `--processes` to fast servers.

TTFT: from sending the request to the first text. ITL: between two chunks of text. TPOT: (last text - first text) / (output
tokens - 1). E2E: until the stream's end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import queue
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_report import MARKDOWN_HEAD, Sample, format_markdown_row, format_table, summarize

WORDS = re.findall(
    "[a-z]+",
    """
    time year people way day man thing woman life child world school state family student group country problem hand part
    place case week company system program question work number night point home water room mother area money story fact
    month lot right study book eye job word business issue side kind head house service friend father power hour game line
    end member law car city community name president team minute idea kid body information back parent face others level
    office door health person art war history party result change morning reason research girl guy moment air teacher force
    """,
)


@dataclass(frozen=True)
class Load:
    """One workload; lengths in tokens, rate in requests per second (None: `concurrency` requests always open)."""

    base_url: str
    model: str = ""
    api_key: str = ""
    endpoint: str = "completions"
    concurrency: int = 1
    rate: float | None = None
    num_requests: int = 16
    input_len: int = 128
    output_len: int = 64
    shared_prefix_len: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = True
    tokens_per_word: float = 1.0
    template_tokens: float = 0.0  # what the server adds to every prompt: the chat template, a BOS
    extra_body: dict[str, Any] = field(default_factory=dict)  # further fields of every request

    def num_words(self) -> int:
        return max(1, round((self.input_len - self.template_tokens) / self.tokens_per_word))


class HttpError(Exception):
    """The server's answer is no answer to our question."""


class Connections:
    """Keep-alive HTTP/1.1 connections to one server, opened as needed."""

    def __init__(self, base_url: str, api_key: str = "") -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise SystemExit(f"--base-url must look like http://127.0.0.1:8000, got {base_url!r}")
        self.host = url.hostname
        self.tls = url.scheme == "https"
        self.port = url.port or (443 if self.tls else 80)
        self.path = url.path.rstrip("/").removesuffix("/v1")
        self.head = f"Host: {url.netloc}\r\nAccept: */*\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self.idle:
            reader, writer = self.idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls or None, limit=2**20)

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


class Response:
    """Sends one request and yields the body as it arrives; use as `async with`."""

    def __init__(self, connections: Connections, method: str, path: str, payload: dict[str, Any] | None = None) -> None:
        self.connections = connections
        body = json.dumps(payload).encode() if payload is not None else b""
        head = f"{method} {connections.path}{path} HTTP/1.1\r\n{connections.head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.request = f"{head}\r\n".encode() + body
        self.headers: dict[str, str] = {}
        self.status = 0
        self.finished = False

    async def __aenter__(self) -> Response:
        was_idle = bool(self.connections.idle)
        self.reader, self.writer = await self.connections.open()
        try:
            head = await self.read_head()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if not was_idle or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise
            # The server closed a kept connection just when we took it: ask again on a new one, as every HTTP client does.
            self.connections.close()
            self.reader, self.writer = await self.connections.open()
            head = await self.read_head()
        self.status = int(head[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return self

    async def read_head(self) -> list[str]:
        """Sends the request; the lines of the answer's head."""
        try:
            self.writer.write(self.request)
            return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except BaseException:
            self.writer.close()
            raise

    async def __aexit__(self, *exc: object) -> None:
        if self.finished and self.headers.get("connection", "").lower() != "close":
            self.connections.idle.append((self.reader, self.writer))
        else:
            self.writer.close()

    async def read_part(self) -> bytes:
        """The next piece of the body; empty at its end."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            size = int((await self.reader.readline()).split(b";")[0], 16)
            data = (await self.reader.readexactly(size + 2))[:-2]
            self.finished = size == 0
            return data
        if "content-length" in self.headers:
            data = b"" if self.finished else await self.reader.readexactly(int(self.headers["content-length"]))
            self.finished = True
            return data
        return await self.reader.read(2**16)

    async def read_all(self) -> bytes:
        body = b""
        while part := await self.read_part():
            body += part
        return body


async def call(connections: Connections, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
    async with Response(connections, method, path, payload) as response:
        body = await response.read_all()
    if response.status != 200:
        raise HttpError(f"{method} {path}: HTTP {response.status} {body[:300].decode(errors='replace')}")
    return json.loads(body)


def words(count: int, *key: object) -> str:
    """`count` random words; the same for the same key."""
    return " ".join(random.Random(":".join(map(str, key))).choices(WORDS, k=count))


def make_payload(load: Load, index: int) -> dict[str, Any]:
    text = words(load.num_words(), load.seed, index)
    if load.shared_prefix_len:
        text = f"{words(round(load.shared_prefix_len / load.tokens_per_word), load.seed, 'shared')} {text}"
    payload: dict[str, Any] = {
        "model": load.model,
        "max_tokens": load.output_len,
        "temperature": load.temperature,
        "top_p": load.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload |= load.extra_body
    if load.ignore_eos:
        payload["ignore_eos"] = True
    if load.temperature > 0:
        payload["seed"] = load.seed * 1_000_003 + index
    if load.endpoint == "chat":
        return payload | {"messages": [{"role": "user", "content": text}]}
    return payload | {"prompt": text}


def path_of(endpoint: str) -> str:
    return "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"


def has_text(event: dict[str, Any]) -> bool:
    return any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in event.get("choices") or ())


async def read_stream(response: Response, sample: Sample) -> None:
    """Fills in the sample from a stream of server-sent events, each one line of JSON."""
    rest = b""
    done = False
    while part := await response.read_part():
        now = time.monotonic()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise HttpError(f"error in the stream: {event['error'].get('message', event['error'])}")
            if has_text(event):
                sample.chunk_times.append(now)
            if usage := event.get("usage"):
                sample.prompt_tokens = usage["prompt_tokens"]
                sample.output_tokens = usage["completion_tokens"]
                sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if not done:
        raise HttpError("the stream ended without [DONE]")
    if not sample.output_tokens:
        raise HttpError("the stream brought no usage")


async def send_one(connections: Connections, load: Load, index: int) -> Sample:
    sample = Sample(start=time.monotonic())
    try:
        async with Response(connections, "POST", path_of(load.endpoint), make_payload(load, index)) as response:
            if response.status != 200:
                body = (await response.read_all()).decode(errors="replace")
                raise HttpError(f"HTTP {response.status}: {body[:200]}")
            await read_stream(response, sample)
    except (OSError, EOFError, ValueError, LookupError, TypeError, HttpError, asyncio.LimitOverrunError) as error:
        sample.error = f"{type(error).__name__}: {error}" if not isinstance(error, HttpError) else str(error)
    sample.end = time.monotonic()
    return sample


async def probe(load: Load) -> Load:
    """The load with the model's name and the tokens a word takes, asked of the server."""
    connections = Connections(load.base_url, load.api_key)
    if not load.model:
        load = replace(load, model=(await call(connections, "GET", "/v1/models"))["data"][0]["id"])
    counts = []
    lengths = (64, 192)
    for length in lengths:
        probing = replace(
            load, seed=-1, input_len=length, tokens_per_word=1.0, template_tokens=0.0, shared_prefix_len=0, output_len=1
        )
        payload = make_payload(probing, length) | {"stream": False}
        del payload["stream_options"]
        answer = await call(connections, "POST", path_of(load.endpoint), payload)
        counts.append(answer["usage"]["prompt_tokens"])
    connections.close()
    tokens_per_word = (counts[1] - counts[0]) / (lengths[1] - lengths[0])
    return replace(load, tokens_per_word=tokens_per_word, template_tokens=counts[0] - lengths[0] * tokens_per_word)


def arrival_times(load: Load) -> list[float]:
    """Seconds from the start at which each request is sent, a Poisson process of `rate`; the same for the same seed."""
    assert load.rate is not None
    draw = random.Random(f"{load.seed}:arrivals")
    times = []
    now = 0.0
    for _ in range(load.num_requests):
        times.append(now)
        now += draw.expovariate(load.rate)
    return times


class Turn:
    """Who sends what: requests are numbered by one counter for all processes. Shared with the workers at their start."""

    def __init__(self, context: SpawnContext, num_processes: int) -> None:
        self.next_index = context.Value("q", 0)
        self.num_done = context.Value("q", 0)
        self.start_line = context.Barrier(num_processes)
        self.samples = context.Queue()

    def take(self) -> int:
        with self.next_index.get_lock():
            self.next_index.value += 1
            return int(self.next_index.value) - 1

    def finish(self, sample: Sample) -> None:
        with self.num_done.get_lock():
            self.num_done.value += 1
        self.samples.put(sample)


async def run_closed(load: Load, turn: Turn, num_streams: int) -> None:
    """`num_streams` streams, each sending its next request when the last is answered."""
    connections = Connections(load.base_url, load.api_key)

    async def stream() -> None:
        while (index := turn.take()) < load.num_requests:
            turn.finish(await send_one(connections, load, index))

    await asyncio.gather(*(stream() for _ in range(num_streams)))
    connections.close()


async def run_open(load: Load, turn: Turn, worker: int, num_processes: int) -> None:
    """Every `num_processes`-th request at its time of arrival, whatever became of the earlier ones."""
    connections = Connections(load.base_url, load.api_key)
    start = time.monotonic()

    async def arrive(index: int, at: float) -> None:
        await asyncio.sleep(start + at - time.monotonic())
        turn.finish(await send_one(connections, load, index))

    times = arrival_times(load)
    await asyncio.gather(*(arrive(index, times[index]) for index in range(worker, load.num_requests, num_processes)))
    connections.close()


def work(load: Load, turn: Turn, worker: int, num_processes: int) -> None:
    """A worker process's main."""
    turn.start_line.wait()
    try:
        if load.rate is not None:
            asyncio.run(run_open(load, turn, worker, num_processes))
        else:
            share = load.concurrency // num_processes + (worker < load.concurrency % num_processes)
            asyncio.run(run_closed(load, turn, share))
    except KeyboardInterrupt:
        sys.exit(130)


def gather(load: Load, num_processes: int, show_progress: bool = True) -> list[Sample]:
    """Runs the load in worker processes and returns a sample for every request."""
    context = multiprocessing.get_context("spawn")
    turn = Turn(context, num_processes)
    workers = [context.Process(target=work, args=(load, turn, i, num_processes), daemon=True) for i in range(num_processes)]
    for process in workers:
        process.start()
    samples: list[Sample] = []
    started = shown = time.monotonic()
    is_terminal = sys.stderr.isatty()
    while len(samples) < load.num_requests:
        try:
            samples.append(turn.samples.get(timeout=0.5))
        except queue.Empty:
            if any(process.exitcode for process in workers):
                raise SystemExit("a worker process of the load generator died; see above") from None
        now = time.monotonic()
        if show_progress and now - shown > (0.5 if is_terminal else 10):
            shown = now
            line = f"{turn.num_done.value}/{load.num_requests} requests after {now - started:.0f} s"
            print(f"\r{line} " if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
    if show_progress and is_terminal:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    for process in workers:
        process.join()
    return samples


def describe(load: Load) -> str:
    pace = f"{load.rate:g}/s Poisson" if load.rate is not None else f"{load.concurrency} at once"
    shared = f"{load.shared_prefix_len} shared + " if load.shared_prefix_len else ""
    sampled = f", temperature {load.temperature:g}, top_p {load.top_p:g}" if load.temperature > 0 else ""
    return f"{pace} × {load.num_requests}, {shared}{load.input_len} / {load.output_len}{sampled}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="default: the first of /v1/models")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=1, help="requests open at any time")
    pace.add_argument("--rate", type=float, help="requests per second, Poisson arrivals")
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens, about")
    parser.add_argument("--output-len", type=int, default=64, help="max_tokens")
    parser.add_argument("--shared-prefix-len", type=int, default=0, help="tokens before the prompt, the same for all requests")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals; a repeated one meets a warm prefix cache")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="further fields of every request")
    parser.add_argument("--processes", type=int, default=1, help="worker processes that send the requests")
    parser.add_argument("--warmup", type=int, default=0, help="requests sent first and not counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write workload and figures there")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser


def parse_load(argv: list[str] | None) -> tuple[Load, argparse.Namespace]:
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("concurrency", "num_requests", "input_len", "output_len", "processes", "rate"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    for name in ("shared_prefix_len", "warmup"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    return Load(**{name: value for name, value in vars(args).items() if name in Load.__dataclass_fields__}), args


def main(argv: list[str] | None = None) -> int:
    load, args = parse_load(argv)
    try:
        load = asyncio.run(probe(load))
    except (OSError, EOFError, HttpError) as error:
        raise SystemExit(f"{load.base_url} does not answer as an OpenAI-compatible server: {error}") from None
    most = load.num_requests if load.rate is not None else load.concurrency
    num_processes = min(args.processes, most)
    if args.warmup:
        gather(
            replace(load, seed=load.seed + 2**32, num_requests=args.warmup, rate=None),
            min(num_processes, load.concurrency),
            False,
        )
    figures = summarize(gather(load, num_processes))
    title = describe(load)
    if args.markdown:
        print(MARKDOWN_HEAD, format_markdown_row(title, figures), sep="\n")
    else:
        print(format_table(f"{load.model} at {load.base_url}: {title}", figures))
    if args.json:
        record = {"load": {name: value for name, value in asdict(load).items() if name != "api_key"}, "figures": figures}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if figures["num_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
