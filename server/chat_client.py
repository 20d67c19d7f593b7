"""A chat's client of an OpenAI-compatible server, over http.client alone so that a terminal chat starts at once."""

from __future__ import annotations

import difflib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from server.sse_client import EventParser

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0
"""A long prompt may keep a server busy for minutes before its first word; more is taken for a dead one."""
STARTING_POLL_S = 0.5
STARTING_TIMEOUT_S = 1800.0
MAX_ATTEMPTS = 3  # of a request that meets a server which is starting
MAX_ERROR_BYTES = 2**16


class ChatError(Exception):
    """What went wrong, in a sentence for the user."""


class ChatServer:
    """One server. `notify` is told what is worth waiting for. Every request has a connection of its own.

    Raises ChatError for a URL that is none; all methods raise it for whatever the server does or does not answer.
    """

    def __init__(self, url: str, api_key: str = "", notify: Callable[[str], None] = print) -> None:
        self.url = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(self.url)
            self._port = parts.port
        except ValueError:
            raise ChatError(f"{url} is no URL; it must look like {DEFAULT_URL}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{url} is no URL; it must look like {DEFAULT_URL}")
        self._host = parts.hostname
        self._is_tls = parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._has_key = bool(api_key)
        self._notify = notify
        self.is_octavo = False
        """Known once `models` was asked: whether requests may have fields of our own."""

    def models(self) -> list[str]:
        """The names that requests may give."""
        with self._exchange("GET", "/v1/models") as response:
            if response.status == 404:
                raise ChatError(f"{self.url} has no /v1/models: is it an OpenAI-compatible server?")
            if response.status != 200:
                raise self._refusal(response)
            answer = _parse_json(self._read_all(response))
        try:
            cards = answer["data"]
            self.is_octavo = any(card.get("owned_by") == "octavo" for card in cards)
            return [card["id"] for card in cards]
        except (TypeError, LookupError, AttributeError):
            raise ChatError(f"{self.url} does not answer as an OpenAI-compatible server") from None

    def choose_model(self, name: str | None) -> str:
        """`name` if it is served, without one the first."""
        names = self.models()
        if not names:
            raise ChatError(f"the server at {self.url} serves no model")
        if name is None or name in names:
            return name or names[0]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ChatError(f"the server does not serve {name}{hint}; it serves {', '.join(names[:10])}")

    def wait_until_ready(self) -> None:
        """Returns at once where the server does not say that it is starting."""
        said = ""
        deadline = time.monotonic() + STARTING_TIMEOUT_S
        while True:
            with self._exchange("GET", "/health") as response:
                if response.status != 503:
                    return
                health = _parse_json(self._read_all(response))
            detail = _detail_of(health)
            if isinstance(health, dict) and health.get("status") in ("failed", "stopping"):
                raise ChatError(f"the server cannot answer: {detail}")
            if detail != said:
                self._notify(f"The server is not ready yet. {detail.removesuffix('; try again soon.')}".rstrip())
                said = detail
            if time.monotonic() > deadline:
                raise ChatError(f"the server was not ready after {STARTING_TIMEOUT_S / 60:.0f} minutes")
            time.sleep(STARTING_POLL_S)

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of an answer. A server that is starting is waited for. Close the generator to stop the answer."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            with self._exchange("POST", "/v1/chat/completions", body) as response:
                if response.status == 200:
                    yield from self._chunks(response)
                    return
                if response.status != 503 or attempt == MAX_ATTEMPTS:
                    raise self._refusal(response)
            self.wait_until_ready()

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        parser = EventParser()
        is_whole = False
        while part := self._read(response):
            for data in parser.push(part):
                if data.strip() == b"[DONE]":
                    return
                chunk = _parse_chunk(data)
                is_whole = is_whole or any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
                yield chunk
        if not is_whole and parser.finish() != [b"[DONE]"]:
            raise ChatError("the server ended its answer before it was whole")

    @contextmanager
    def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """The response to one request; leaving the block closes the connection, which ends an answer that is still coming."""
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        # Text from a terminal may hold what is no Unicode; a question mark is better than no answer.
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        try:
            try:
                connection.connect()
            except OSError as error:
                raise self._no_connection(error) from None
            try:
                connection.sock.settimeout(SILENCE_TIMEOUT_S)
                connection.request(method, self._path + path, content, self._headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise ChatError(f"what listens at {self.url} does not answer as an HTTP server ({_reason(error)})") from None
            with response:
                yield response
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(2**16)
        except TimeoutError:
            raise ChatError(f"the server said nothing for {SILENCE_TIMEOUT_S:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the connection broke in the middle of the answer ({_reason(error)})") from None

    def _read_all(self, response: http.client.HTTPResponse, limit: int = 2**24) -> bytes:
        content = b""
        while len(content) < limit and (part := self._read(response)):
            content += part
        return content

    def _no_connection(self, error: OSError) -> ChatError:
        if isinstance(error, ssl.SSLError):
            return ChatError(f"{self.url} cannot be reached over HTTPS: {_reason(error)}")
        if isinstance(error, socket.gaierror):
            return ChatError(f"there is no host {self._host}")
        sentence = f"no server answers at {self.url} ({_reason(error)})"
        if self._host in ("127.0.0.1", "localhost", "::1"):
            port = f" --port {self._port}" if self._port not in (None, 8000) else ""
            sentence += f". Start one with: octavo serve{port}; or say where it is with --url"
        return ChatError(sentence)

    def _refusal(self, response: http.client.HTTPResponse) -> ChatError:
        """What a status other than 200 means."""
        status = response.status
        detail = _detail_of(_parse_json(self._read_all(response, MAX_ERROR_BYTES)))
        if status in (401, 403):
            if self._has_key:
                return ChatError(f"the server does not take this API key: {detail}")
            return ChatError("the server wants an API key: give it with --api-key or in OCTAVO_API_KEY")
        if status == 429:
            after = response.headers.get("Retry-After")
            return ChatError(f"the server has too much to do: {detail}" + (f" (try again in {after} s)" if after else ""))
        if status == 503:
            return ChatError(f"the server cannot answer now: {detail}")
        return ChatError(detail or f"the server answered with HTTP status {status}")


def _parse_json(content: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _parse_chunk(data: bytes) -> dict[str, Any]:
    chunk = _parse_json(data)
    if not isinstance(chunk, dict):
        raise ChatError("the server sent an event that is no JSON object")
    if chunk.get("error"):
        raise ChatError(_detail_of(chunk) or "the server met an error")
    return chunk


def _detail_of(answer: Any) -> str:
    """The sentence in an error body, ours or another server's; empty where there is none."""
    for _ in range(2):
        if isinstance(answer, dict):
            answer = answer.get("error") or answer.get("detail") or answer.get("message")
    return answer if isinstance(answer, str) else ""


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).lower()
