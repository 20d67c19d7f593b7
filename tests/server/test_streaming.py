"""Streams whose clients are fast, slow, stuck or gone: one event a token for those that keep up, the same answer for all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import pytest

from engine.client import EngineClient
from engine.errors import RequestFailed
from engine.messages import AddRequest, RequestOutput, TokenLogprobs
from engine.request_stream import Choice, RequestStream
from engine.sampling_params import SamplingParams
from server import sse
from server.app import create_app
from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient

PATHS = ("/v1/completions", "/v1/chat/completions")


class LiveClient(FakeEngineClient):
    """Real RequestStreams, fed by `say`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[RequestStream] = []
        self.aborted: list[str] = []

    async def generate(self, prompt_token_ids: list[int], sampling: SamplingParams, **_: Any) -> Any:
        choices = [Choice(self.tokenizer.detokenizer(prompt_token_ids)) for _ in range(sampling.n)]
        self.sampling.append(sampling)
        message = AddRequest(request_id=str(len(self.live)), prompt_token_ids=prompt_token_ids, sampling=sampling)
        self.live.append(RequestStream(message, choices, frozenset({256}), self.aborted.append))
        return self.live[-1]

    def say(self, stream: int, text: str, *, choice: int = 0, finish: str | None = None, deliver: bool = True) -> None:
        """The engine's outputs of these characters, a token each."""
        live, num_top = self.live[stream], self.sampling[stream].logprobs
        for index, token_id in enumerate(self.tokenizer.encode(text)):
            live.take(
                RequestOutput(
                    request_id=live.request_id,
                    choice_index=choice,
                    first_token_index=len(live._choices[choice].token_ids),
                    token_ids=[token_id],
                    logprobs=None if num_top is None else [TokenLogprobs(-0.5, 1, [token_id], [-0.5])],
                    finish_reason=finish if index == len(text) - 1 else None,
                )
            )
            if deliver:
                live.deliver()


class Connection:
    """A request over bare ASGI. `open`: cleared, sending waits, as with a full write buffer."""

    def __init__(self, client: FakeEngineClient, path: str, **body: Any) -> None:
        app = create_app(cast(EngineClient, client), ServerConfig(model="tiny"))
        text = {"prompt": "a"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "a"}]}
        content = json.dumps({**text, "stream": True, "stream_options": {"include_usage": True}, **body}).encode()
        self._request = [{"type": "http.request", "body": content, "more_body": False}]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path, "raw_path": b"",
            "root_path": "", "scheme": "http", "query_string": b"", "headers": [], "client": ("x", 1), "server": ("y", 2),
        }  # fmt: skip
        self.gone, self.open = asyncio.Event(), asyncio.Event()
        self.open.set()
        self.chunks: list[bytes] = []
        self.num_sending = 0
        self.over = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._request:
            return self._request.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.num_sending += 1
        assert self.num_sending == 1, "two sends at a time"
        if not self.open.is_set():
            await self.open.wait()
        if message["type"] == "http.response.body":
            self.chunks.append(message["body"])
        self.num_sending -= 1

    def events(self) -> list[Any]:
        """The events so far, without [DONE]."""
        blocks = b"".join(self.chunks).decode().split("\n\n")
        return [json.loads(block[6:]) for block in blocks if block.startswith("data: {")]


def joined(events: list[Any]) -> dict[int, Any]:
    """Choice -> its text, its tokens with their logprobs, and its finish reason, whatever the events they came in."""
    result: dict[int, Any] = {}
    for event in events:
        for choice in event["choices"]:
            text, tokens, _ = result.get(choice["index"], ("", [], None))
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if logprobs := choice["logprobs"]:
                if "content" in logprobs:
                    tokens = tokens + [(entry["token"], entry["logprob"]) for entry in logprobs["content"]]
                else:
                    offsets = logprobs["text_offset"]
                    tokens = tokens + list(zip(logprobs["tokens"], logprobs["token_logprobs"], offsets, strict=True))
            result[choice["index"]] = (text, tokens, choice["finish_reason"])
    return result


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def begin(client: LiveClient, path: str, **body: Any) -> Connection:
    connection = Connection(client, path, **body)
    while not connection.num_sending and not (client.live and client.live[-1]._waiter):
        await asyncio.sleep(0)
    await settle()
    return connection


def text_events(connection: Connection) -> int:
    """Events with text, and so not the one of the role, the usage or the end."""
    return sum(
        bool(choice["text"] if "text" in choice else choice["delta"].get("content"))
        for event in connection.events()
        for choice in event["choices"]
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_a_stream_that_falls_behind_gets_the_same_answer_in_fewer_events(path: str, with_logprobs: bool) -> None:
    async def scenario() -> None:
        wanted: dict[str, Any] = {"max_tokens": 40, "n": 2}
        if with_logprobs:
            wanted |= {"logprobs": 1} if path == PATHS[0] else {"logprobs": True, "top_logprobs": 1}
        client = LiveClient()
        fast, slow = [await begin(client, path, **wanted) for _ in range(2)]
        slow.open.clear()
        for part in ("Hel", "lo ", "world"):
            for stream in range(2):
                client.say(stream, part)
                client.say(stream, part.upper(), choice=1)
            await settle()
        for stream in range(2):
            client.say(stream, "!", finish="stop")
            client.say(stream, "?", choice=1, finish="length")
        await fast.over
        assert text_events(fast) == 2 * 12
        assert not slow.over.done()
        slow.open.set()
        await slow.over
        # One that was on its way when the client stopped reading, then all that came in meanwhile.
        assert text_events(slow) == 1 + 2
        assert joined(slow.events()) == joined(fast.events())
        assert {key: value[0] for key, value in joined(slow.events()).items()} == {0: "Hello world!", 1: "HELLO WORLD?"}
        usage = [event["usage"] for event in (*fast.events(), *slow.events()) if event["usage"] is not None]
        assert len(usage) == 2 and usage[0] == usage[1] and usage[0]["completion_tokens"] == 24
        assert slow.chunks[-2:] == fast.chunks[-2:] == [sse.DONE, b""]

    run(scenario)


def test_steps_that_came_in_together_are_one_event() -> None:
    async def scenario() -> None:
        client = LiveClient()
        connection = await begin(client, PATHS[0])
        client.say(0, "abc", deliver=False)
        client.live[0].deliver()
        client.say(0, "d")
        assert [event["choices"][0]["text"] for event in connection.events()] == ["abc", "d"]
        connection.gone.set()
        await connection.over

    run(scenario)


def test_an_event_of_a_stream_that_keeps_up_is_sent_at_once() -> None:
    async def scenario() -> None:
        client = LiveClient()
        connection = await begin(client, PATHS[0])
        for number in range(1, 6):
            client.say(0, "x")
            assert text_events(connection) == number  # without a turn of the event loop
        client.say(0, "y", finish="length")
        await connection.over
        assert joined(connection.events())[0][0] == "xxxxxy"

    run(scenario)


def test_a_client_that_reads_nothing_holds_up_nobody_and_takes_little_memory() -> None:
    async def scenario() -> None:
        client = LiveClient()
        stuck, other = [await begin(client, PATHS[0], max_tokens=60) for _ in range(2)]
        stuck.open.clear()
        for number in range(1, 51):
            client.say(0, "x")
            client.say(1, "x")
            await asyncio.sleep(0)
            assert text_events(other) == number
        assert len(client.live[0]._news) == 1  # one delta for what has come since
        stuck.gone.set()
        await stuck.over
        assert client.aborted == ["0"]
        client.say(1, "y", finish="stop")
        await other.over

    run(scenario)


def test_a_client_that_goes_away_during_a_send_is_accounted_for_once() -> None:
    async def scenario() -> None:
        client = LiveClient()
        connection = await begin(client, PATHS[1])
        connection.open.clear()
        client.say(0, "a")
        await settle()
        assert connection.num_sending == 1
        connection.gone.set()
        await connection.over
        assert client.aborted == ["0"]
        client.live[0].deliver()  # what is on its way from the engine meets a closed stream
        client.say(0, "b")

    run(scenario)


@pytest.mark.parametrize("path", PATHS)
def test_an_error_comes_after_what_has_arrived(path: str) -> None:
    async def scenario() -> None:
        client = LiveClient()
        connection = await begin(client, path)
        client.say(0, "ab", deliver=False)
        client.live[0].fail(RequestFailed("the engine gave up"))
        client.live[0].deliver()
        await connection.over
        *_, last = events = connection.events()
        assert joined(events[:-1])[0][0] == "ab" and last["error"]["message"] == "the engine gave up"
        assert connection.chunks[-2:] == [sse.DONE, b""]

    run(scenario)


def test_a_failing_shortcut_ends_its_own_stream_only() -> None:
    async def scenario() -> None:
        client = LiveClient()
        broken, other = [await begin(client, PATHS[0]) for _ in range(2)]

        def fail(_: object) -> Awaitable[None] | None:
            raise RuntimeError("tulip")

        client.live[0].shortcut = fail
        client.say(0, "a")
        client.say(1, "b", finish="stop")
        await asyncio.gather(broken.over, other.over)
        assert broken.events()[-1]["error"]["code"] == "internal_error"
        assert joined(other.events())[0][0] == "b"

    run(scenario)


def test_comments_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_INTERVAL_S", 0.02)

    async def scenario() -> None:
        client = LiveClient()
        connection = await begin(client, PATHS[0])
        while len(connection.chunks) < 2:
            await asyncio.sleep(0.005)
        assert connection.chunks == [b": waiting\n\n"] * len(connection.chunks)
        connection.open.clear()
        await asyncio.sleep(0.1)
        assert connection.num_sending == 1  # no second one behind it
        client.say(0, "a")
        client.say(0, "b", finish="stop")
        await settle()
        connection.open.set()
        await connection.over
        assert connection.chunks[-6] == b": waiting\n\n"
        assert [event["choices"][0]["text"] for event in connection.events() if event["choices"]] == ["a", "b"]

    run(scenario)
