"""Seeded random talk with an HTTP server over a socket, good and bad; and what every answer to it must be.

`python -m tests.fuzz_wire SEED INDEX` prints one shot's bytes.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools

from tests.fuzz_bodies import ENDPOINTS, SECRET, BodyMaker

LIMIT_S = 120.0
READ_TIMEOUT_S = 2
"""For the server's --read-timeout-s: half of a request is given up after this."""

PATHS = (
    "/", "/health", "/health/live", "/health/ready", "/metrics", "/version", "/docs", "/openapi.json", "/v1/models",
    "/v1/models/tiny", "/v1/models/%00", "/v1/responses/resp_1", "/v1/responses/resp_1/input_items",
    "/v1/responses/resp_1/cancel", "/nothing", "/v1/responses/x/input_items?limit=-1&after=%ff&order=up", "/../../etc/passwd",
    "/static/../app.py", "//v1/models", "/v1/models?" + "a=" * 500, "/%2e%2e/%2e%2e", "/v1/completions/", "/V1/COMPLETIONS",
    "/admin/drain", "/admin/log_level", "/v1/\xe9".encode().decode("latin-1"), "*", "http://x/v1/models", "/" + SECRET,
)  # fmt: skip
METHODS = ("GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "BREW", "M-SEARCH")
HEADERS = (
    "Content-Type: text/plain", "Content-Type: application/json; charset=utf-16",
    "Content-Type: multipart/form-data; boundary=x", "Content-Encoding: gzip", "Transfer-Encoding: gzip",
    "Transfer-Encoding: identity", "Expect: 100-continue", "Expect: x", "Authorization: Bearer \xff\xfe",
    "Authorization: Basic x", "Authorization:", "X-Request-Id: a\tb", "X-Request-Id: " + "x" * 500, "Cookie: " + "x" * 4000,
    "Upgrade: websocket", "Upgrade: h2c", "Connection: upgrade", "Connection: close, keep-alive", "Origin: null",
    "Sec-Fetch-Site: cross-site", "Accept: text/event-stream", "Accept-Encoding: gzip", "Host: y", "X-Request-Timeout: NaN",
    "Range: bytes=0-1", "X-Empty:", ": x", "X-A: \x00", "X-A : x", " folded", "Content-Length: -1", "Content-Length: 1e3",
    "Content-Length: 99999999999999999999", "X-Stainless-Timeout: 600", "X-Request-Timeout: -1",
    "X-First-Token-Timeout: 0.001", "X-Request-Timeout: 1e-9", "Accept: \x7f", "X-Forwarded-For: 1.1.1.1",
)  # fmt: skip

Ending = Literal["read", "half_close", "leave", "reset"]


@dataclass(frozen=True)
class Shot:
    """What is sent over one connection. num_answers: how many must come; None: any number, but the connection must end.
    ending: what the client does after its last byte. leaves_after: answered bytes after which it goes away."""

    kind: str
    parts: tuple[bytes, ...]
    num_answers: int | None = None
    ending: Ending = "read"
    leaves_after: int = 0

    @property
    def may_time_out(self) -> bool:
        """Whether it may have asked for the answer in too short a time."""
        return b"timeout" in b"".join(self.parts).lower()


class ShotMaker:
    def __init__(self, seed: int, index: int) -> None:
        self._rng = random.Random(f"{seed}/{index}")
        self._bodies = BodyMaker(self._rng)

    def make(self) -> Shot:
        kinds: tuple[tuple[Callable[[], Shot], int], ...] = (
            (self._plain, 70),
            (self._chunked, 6),
            (self._broken_chunks, 3),
            (self._pipelined, 4),
            (self._odd_headers, 5),
            (self._other_paths, 4),
            (self._half_sent, 3),
            (self._gone, 4),
            (self._garbage, 1),
        )
        return self._rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]()

    def _plain(self) -> Shot:
        return Shot("plain", self._split(_post(*self._bodies.make())), 1)

    def _chunked(self) -> Shot:
        path, body = self._bodies.make()
        return Shot("chunked", self._split(_head(path, "Transfer-Encoding: chunked") + self._chunks(body)), 1)

    def _broken_chunks(self) -> Shot:
        path, body = self._bodies.make()
        head, data = _head(path, "Transfer-Encoding: chunked"), bytearray(self._chunks(body))
        for _ in range(self._rng.choice((1, 3))):
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        broken = self._rng.choice(
            (
                data,
                b"fffffffffffffffffff\r\n" + data,
                b"-1\r\n" + data,
                b"\r\n" + data,
                data[:-2],
                b"0\r\n\r\n0\r\n\r\n",
                data + data,
            )
        )
        return Shot("broken chunks", self._split(head + bytes(broken)), None, self._ending())

    def _pipelined(self) -> Shot:
        count = self._rng.randint(2, 4)
        return Shot("pipelined", self._split(b"".join(_post(*self._bodies.make()) for _ in range(count))), count)

    def _odd_headers(self) -> Shot:
        path, body = self._bodies.make()
        chosen = self._rng.sample(HEADERS, self._rng.choice((1, 2, 4)))
        length = [f"Content-Length: {len(body)}"] if self._rng.random() < 0.8 else []
        host = [] if self._rng.random() < 0.1 else ["Host: x"]
        version = self._rng.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""))
        lines = [f"POST {path} {version}", *host, *chosen, *length, "", ""]
        return Shot("odd headers", self._split("\r\n".join(lines).encode("latin-1") + body), None, self._ending())

    def _other_paths(self) -> Shot:
        method, path = self._rng.choice(METHODS), self._rng.choice((*PATHS, *ENDPOINTS))
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
        return Shot("other paths", (head.encode("latin-1") + b"{}",))

    def _half_sent(self) -> Shot:
        whole = _post(*self._bodies.make())
        return Shot("half sent", self._split(whole[: self._rng.randrange(len(whole))]), None, self._ending())

    def _gone(self) -> Shot:
        """A good request whose client goes away, at some time."""
        path, body = self._bodies.make_valid()
        if path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            body["stream"] = self._rng.random() < 0.7
            body[{"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")] = 60
            body.pop("max_completion_tokens", None)
        ending = self._rng.choice(("leave", "reset", "half_close"))
        return Shot("gone", (_post(path, json.dumps(body).encode()),), None, ending, self._rng.choice((0, 0, 1, 300, 2000)))

    def _garbage(self) -> Shot:
        length = self._rng.choice((1, 20, 3000, 200_000))
        tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        parts = self._rng.choice((self._rng.randbytes(length), tls, b"\r\n" * 50, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET"))
        return Shot("garbage", (parts,), None, self._ending())

    def _ending(self) -> Ending:
        return self._rng.choices(("read", "half_close", "leave", "reset"), (2, 2, 1, 1))[0]

    def _chunks(self, body: bytes) -> bytes:
        """The body in chunks of random sizes, some with extensions, perhaps with a trailer."""
        out = bytearray()
        while body:
            size = min(self._rng.choice((1, 7, 100, 10_000)), len(body)) if len(out) < 2000 else len(body)
            out += f"{size:x}{self._rng.choice(('', '', ';a=b'))}\r\n".encode() + body[:size] + b"\r\n"
            body = body[size:]
        return bytes(out) + b"0\r\n" + self._rng.choice((b"", b"", b"X-Trailer: y\r\n")) + b"\r\n"

    def _split(self, data: bytes) -> tuple[bytes, ...]:
        """As it may arrive: whole, or in two or three pieces."""
        if self._rng.random() < 0.8 or len(data) < 3:
            return (data,)
        cuts = sorted(self._rng.randrange(len(data)) for _ in range(self._rng.choice((1, 2))))
        return tuple(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True))


def _head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", ""]).encode()


def _post(path: str, body: bytes) -> bytes:
    return _head(path, f"Content-Length: {len(body)}") + body


@dataclass
class Answer:
    """One parsed answer; is_whole: up to its last byte."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False


class Answers:
    """Parses what comes back over a connection."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.num_bytes = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httptools.HttpParserError for what is no HTTP."""
        self.num_bytes += len(data)
        self._parser.feed_data(data)

    def num_whole(self) -> int:
        return sum(answer.is_whole and answer.status != 100 for answer in self.answers)

    def on_message_begin(self) -> None:
        self.answers.append(Answer())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answers[-1].headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answers[-1].status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.answers[-1].body += body

    def on_message_complete(self) -> None:
        self.answers[-1].is_whole = True


async def fire(port: int, shot: Shot) -> tuple[list[int], str | None]:
    """Sends a shot and reads all that comes back: the statuses, and what is wrong with that."""
    got = Answers()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.wait_for(_talk(shot, got, reader, writer), LIMIT_S)
        finally:
            if shot.ending == "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
    except TimeoutError:
        return [], f"no end within {LIMIT_S:.0f} s, after {got.num_bytes} bytes"
    except httptools.HttpParserError as error:
        return [], f"an answer that is no HTTP: {error}"
    answers = [answer for answer in got.answers if answer.status != 100]
    for answer in answers:
        if answer.is_whole and (problem := problem_of(answer, shot)):
            return [answer.status], f"{problem}: {answer.status} {answer.headers} {answer.body[:400]!r}"
    statuses = [answer.status for answer in answers]
    if shot.num_answers is not None and got.num_whole() != shot.num_answers and not _gave_up(answers):
        return statuses, f"{got.num_whole()} answers to {shot.num_answers} requests, {statuses}"
    return statuses, None


async def _talk(shot: Shot, got: Answers, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        for part in shot.parts:
            writer.write(part)
            await writer.drain()
        if shot.ending == "half_close":
            writer.write_eof()
        leaves = shot.ending in ("leave", "reset")
        while not (leaves and got.num_bytes >= shot.leaves_after) and got.num_whole() != shot.num_answers:
            data = await reader.read(2**16)
            if not data:
                return
            got.feed(data)
    except (ConnectionError, httptools.HttpParserUpgrade):
        pass  # the server does not have to read all that we send


def _gave_up(answers: list[Answer]) -> bool:
    """Whether the last answer says that no more will come: bounds below the application end the connection."""
    return bool(answers) and answers[-1].is_whole and answers[-1].headers.get("connection") == "close"


def problem_of(answer: Answer, shot: Shot) -> str | None:
    """What is wrong with an answer; None for a good one."""
    if answer.status >= 500 and not (answer.status == 504 and shot.may_time_out):
        return "an error of the server"
    kind = answer.headers.get("content-type", "")
    if answer.status >= 400:
        if not answer.body:  # to HEAD
            return None
        return _problem_of_error(answer, kind)
    if b"server_error" in answer.body or b"internal_error" in answer.body:
        return "an error of the server in an answer"
    try:
        if kind.startswith("text/event-stream"):
            return _problem_of_events(answer.body.decode())
        if kind.startswith("application/json"):
            strict_json(answer.body.decode())
    except ValueError as error:
        return f"no JSON ({error})"
    return None


def _problem_of_error(answer: Answer, kind: str) -> str | None:
    try:
        error = strict_json(answer.body.decode())["error"]
    except (ValueError, TypeError, KeyError):
        return "an error without OpenAI's error object"
    if kind != "application/json" or set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "an error that is not OpenAI's"
    return "an error that repeats the input" if SECRET.encode() in answer.body else None


def _problem_of_events(text: str) -> str | None:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    data = [line.removeprefix("data: ") for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    if not data or len(data) != len(blocks):
        return "a stream of other things than events"
    last = data[-1]
    for one in data:
        if one != "[DONE]":
            strict_json(one)
    if last == "[DONE]" or '"type":"response.' in last or '"type":"error"' in last:
        return None
    return "a stream without an end"


def strict_json(text: str) -> Any:
    """Raises ValueError, also for NaN and infinities."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


if __name__ == "__main__":
    shot = ShotMaker(int(sys.argv[1]), int(sys.argv[2])).make()
    print(shot.kind, shot.ending, f"{shot.num_answers} answers")
    sys.stdout.buffer.write(b"\n--- part ---\n".join(shot.parts))
