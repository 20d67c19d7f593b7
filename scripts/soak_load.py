"""What soak.py asks of a server: requests of every kind, some wrong, by clients some of which go away or read slowly."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.bench_http import Connections, HttpError, Response, call
from server.bench_load import words

REQUEST_LIMIT_S = 300.0
LEAVES_WITHIN_S = 2.0
PAUSE_S = 0.2
"""What a slow reader waits after every part."""

_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
_WRONG: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": ""},
    {"prompt": "a", "temperature": 9},
    {"prompt": [-1]},
    {"prompt": "a", "n": 1000},
    {"prompt": "a", "max_tokens": 10**9},
    {"prompt": "a", "structured_outputs": {"regex": "("}},
)

Body = dict[str, Any]


@dataclass
class Tally:
    """How requests ended. failures: the first few, in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, kind: str, what: str) -> None:
        self.outcomes["failed"] += 1
        if len(self.failures) < 20:
            self.failures.append(f"{kind}: {what}")


class Requests:
    """Bodies of every kind for a context of so many tokens."""

    def __init__(self, context: int) -> None:
        self._short, self._long = min(8, context // 16), min(300, context // 4)
        self._words = min(300, context // 16)  # of a long prompt; some tokenizers make many tokens of a word
        self.makers: dict[str, Callable[[random.Random], tuple[str, Body]]] = {
            "short": lambda rng: ("/v1/completions", {"prompt": self._text(rng, 4), "max_tokens": self._short}),
            "long": lambda rng: ("/v1/completions", {"prompt": self._text(rng, self._words), "max_tokens": self._long}),
            "several": lambda rng: (
                "/v1/completions",
                {"prompt": ["a", "b c"], "n": 2, "max_tokens": self._short, "logprobs": 2},
            ),
            "chat": lambda rng: ("/v1/chat/completions", self._chat(rng, max_completion_tokens=self._long)),
            "structured": lambda rng: ("/v1/chat/completions", self._structured(rng)),
            "tools": lambda rng: ("/v1/chat/completions", self._tools(rng)),
            "responses": lambda rng: ("/v1/responses", {"input": self._text(rng, 4), "max_output_tokens": self._short}),
            "embeddings": lambda rng: ("/v1/embeddings", {"input": [self._text(rng, 3), self._text(rng, 9)]}),
            "tokenize": lambda rng: ("/tokenize", {"prompt": self._text(rng, 50)}),
            "wrong": lambda rng: ("/v1/completions", dict(rng.choice(_WRONG))),
        }
        self.same: Body = {"prompt": "One, two, three,", "max_tokens": self._long, "temperature": 0, "ignore_eos": True}
        """Greedy, so that its text must be the same every time."""

    def _text(self, rng: random.Random, num_words: int) -> str:
        return words(num_words, rng.random())

    def _chat(self, rng: random.Random, **fields: Any) -> Body:
        return {"messages": [{"role": "user", "content": self._text(rng, 6)}], **fields}

    def _structured(self, rng: random.Random) -> Body:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}
        return self._chat(rng, response_format=form, max_completion_tokens=self._long)

    def _tools(self, rng: random.Random) -> Body:
        tools = [{"type": "function", "function": _WEATHER}]
        return self._chat(rng, tools=tools, tool_choice="required", max_completion_tokens=self._long)


class Load:
    """Clients that ask one thing after another. may_refuse: whether a 503 is in order, as while an engine is started again.
    compare: whether another text to the same greedy request is a failure."""

    def __init__(self, base_url: str, seed: int, *, may_refuse: bool, compare: bool) -> None:
        self.tally = Tally()
        self._rng = random.Random(seed)
        self._base_url = base_url
        self._may_refuse = may_refuse
        self._compare = compare
        self._text: str | None = None
        self._requests = Requests(0)
        self.kinds: list[str] = []

    async def prepare(self) -> list[str]:
        """Learns what the model can do; returns the kinds that it cannot. Raises HttpError, OSError without an answer."""
        connections = Connections(self._base_url)
        context = (await call(connections, "POST", "/tokenize", {"prompt": "a"}))["max_model_len"]
        self._requests = Requests(context)
        refused: list[str] = []
        for kind, make in self._requests.makers.items():
            path, body = make(self._rng)
            async with Response(connections, "POST", path, body) as response:
                await response.read_all()
            (refused if response.status != 200 and kind != "wrong" else self.kinds).append(kind)
        connections.close()
        return refused

    async def run(self, num_clients: int, seconds: float) -> None:
        """Until so much time has passed and every client has its last answer."""
        ends = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._client(random.Random(self._rng.random()), ends) for _ in range(num_clients)))

    async def _client(self, rng: random.Random, ends: float) -> None:
        connections = Connections(self._base_url)
        while asyncio.get_running_loop().time() < ends:
            kind = rng.choice((*self.kinds, "same", "same"))
            try:
                await asyncio.wait_for(self._ask(connections, kind, rng), REQUEST_LIMIT_S)
            except TimeoutError:
                self.tally.fail(kind, f"no end within {REQUEST_LIMIT_S:.0f} s")
            except (OSError, EOFError, ValueError, HttpError) as error:
                self.tally.fail(kind, f"the connection broke: {error!r}")
        connections.close()

    async def _ask(self, connections: Connections, kind: str, rng: random.Random) -> None:
        path, body = ("/v1/completions", dict(self._requests.same)) if kind == "same" else self._requests.makers[kind](rng)
        if path not in ("/tokenize", "/v1/embeddings") and rng.random() < 0.5:
            body["stream"] = True
        behaviour = rng.choice(("stay", "stay", "stay", "leave", "read slowly"))
        if behaviour == "leave":
            await self._ask_and_leave(connections, path, body, rng.random() * LEAVES_WITHIN_S)
            return
        parts = []
        async with Response(connections, "POST", path, body) as response:
            while part := await response.read_part():
                parts.append(part)
                if behaviour == "read slowly":
                    await asyncio.sleep(PAUSE_S)
        self.judge(kind, path, response, b"".join(parts))

    async def _ask_and_leave(self, connections: Connections, path: str, body: Body, after_s: float) -> None:
        async def ask() -> None:
            async with Response(connections, "POST", path, body) as response:
                await response.read_all()

        try:
            await asyncio.wait_for(ask(), after_s)
            self.tally.outcomes["ok"] += 1
        except TimeoutError:
            self.tally.outcomes["left"] += 1

    def judge(self, kind: str, path: str, response: Response, body: bytes) -> None:
        """Count an answer that has been read whole."""
        status = response.status
        if kind == "wrong" and status == 400:
            self.tally.outcomes["ok"] += 1
        elif status == 429 or (status == 503 and self._may_refuse):
            self.tally.outcomes["refused"] += 1
            if "retry-after" not in response.headers:
                self.tally.fail(kind, f"HTTP {status} without Retry-After")
        elif status != 200 or kind == "wrong":
            self.tally.fail(kind, f"HTTP {status} {body[:200].decode(errors='replace')}")
        elif problem := self._problem_of(kind, path, body, response.headers.get("content-type", "")):
            self.tally.fail(kind, problem)
        else:
            self.tally.outcomes["ok"] += 1

    def _problem_of(self, kind: str, path: str, body: bytes, content_type: str) -> str | None:
        """Of an answer with status 200."""
        if not content_type.startswith("text/event-stream"):
            text = json.loads(body)["choices"][0]["text"] if kind == "same" else ""
        else:
            data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
            last = data[-1] if data else ""
            is_whole = (
                '"response.completed"' in last or '"response.incomplete"' in last
                if path == "/v1/responses"
                else last == "[DONE]"
            )
            if not is_whole or any(one.startswith('{"error"') for one in data):
                return f"a stream that ended with {last[:200]}"
            text = "".join(json.loads(one)["choices"][0]["text"] for one in data[:-1]) if kind == "same" else ""
        if kind != "same":
            return None
        if self._text is None:
            self._text = text
        if text == self._text:
            return None
        self.tally.outcomes["differs"] += 1
        return "another text to the same greedy request" if self._compare else None
