"""What the load generator asks, and how it reads one answer: prompts of random words, streamed, every chunk timed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field, replace
from typing import Any

from server.bench_http import Connections, HttpError, Response, call
from server.bench_report import Sample
from server.sse_client import EventParser

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
    timeout_s: float = 600.0  # of one request
    max_time_s: float | None = None  # after it no request is sent; those open may end

    def num_words(self) -> int:
        return max(1, round((self.input_len - self.template_tokens) / self.tokens_per_word))


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
    """Whether it brings text of the answer or of the reasoning before it."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            return True
    return False


async def read_stream(response: Response, sample: Sample) -> None:
    """Fills in the sample from the stream. Raises HttpError where it brings an error, or ends before it is whole."""
    parser = EventParser()
    done = False
    while part := await response.read_part():
        now = time.monotonic()
        for data in parser.push(part):
            done = _read_event(data, now, sample) or done
    for data in parser.finish():
        done = _read_event(data, time.monotonic(), sample) or done
    if not done:
        raise HttpError("the stream ended without [DONE]")
    if not sample.output_tokens:
        raise HttpError("the stream brought no usage")


def _read_event(data: bytes, now: float, sample: Sample) -> bool:
    """Whether this is the stream's last event."""
    if data == b"[DONE]":
        return True
    event = json.loads(data)
    if error := event.get("error"):
        raise HttpError(f"error in the stream: {error.get('message', error) if isinstance(error, dict) else error}")
    if has_text(event):
        sample.chunk_times.append(now)
    if usage := event.get("usage"):
        sample.prompt_tokens = usage["prompt_tokens"]
        sample.output_tokens = usage["completion_tokens"]
        sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return False


async def send_one(connections: Connections, load: Load, index: int) -> Sample:
    """One request, whatever becomes of it: what went wrong stands in the sample."""
    sample = Sample(start=time.monotonic())
    limit = asyncio.timeout(load.timeout_s)
    try:
        async with limit:
            await _send(connections, load, index, sample)
    except HttpError as error:
        sample.error = str(error)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, asyncio.LimitOverrunError) as error:
        sample.error = f"no end within {load.timeout_s:g} s" if limit.expired() else f"{type(error).__name__}: {error}"
    sample.end = time.monotonic()
    return sample


async def _send(connections: Connections, load: Load, index: int, sample: Sample) -> None:
    async with Response(connections, "POST", path_of(load.endpoint), make_payload(load, index)) as response:
        if response.status != 200:
            body = (await response.read_all()).decode(errors="replace")
            raise HttpError(f"HTTP {response.status}: {body[:200]}")
        await read_stream(response, sample)


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


def describe(load: Load) -> str:
    pace = f"{load.rate:g}/s Poisson" if load.rate is not None else f"{load.concurrency} at once"
    shared = f"{load.shared_prefix_len} shared + " if load.shared_prefix_len else ""
    sampled = f", temperature {load.temperature:g}, top_p {load.top_p:g}" if load.temperature > 0 else ""
    return f"{pace} × {load.num_requests}, {shared}{load.input_len} / {load.output_len}{sampled}"
