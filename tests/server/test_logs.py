"""What clients write comes into the log only where that is asked for: not in its lines, not by errors, at no level."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.errors import InvalidRequest, RequestFailed
from server import logs
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.served import ask, served

SECRET = "tulipbulb"
BODIES: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": SECRET}),
    ("/v1/completions", {"prompt": [SECRET, SECRET], "suffix": SECRET}),
    ("/v1/completions", {"prompt": "a", "stop": SECRET, "user": SECRET, SECRET: SECRET}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
    ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}], "chat_template": "{{ messages[0].x.y }}"}),
    ("/v1/responses", {"input": SECRET, "instructions": SECRET}),
    ("/v1/embeddings", {"input": SECRET}),
    ("/tokenize", {"prompt": SECRET}),
    ("/v1/completions", {"prompt": {SECRET: SECRET}}),
    ("/v1/completions", {"prompt": "a", "model": SECRET}),
]  # fmt: skip


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What has been written to the log since it was last asked for. The test sets it up."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield lambda: capsys.readouterr().err
    root.handlers[:], root.level = before[0], before[1]


def send_all(api: Api) -> None:
    for path, body in BODIES:
        for stream in (False, True):
            asked = {**body, "stream": stream} if path.startswith("/v1/") and "embeddings" not in path else body
            assert api.request("POST", path, json=asked).status_code < 600


def test_prompts_are_not_logged(api: Api, log: Callable[[], str]) -> None:
    logs.set_up_logging("debug")
    api.config = ServerConfig(model="tiny", api_key=["k"])
    send_all(api)  # refused
    api.config = ServerConfig(model="tiny")
    send_all(api)
    for error in (
        RuntimeError(SECRET),
        KeyError(SECRET),
        RequestFailed("no"),
        UnicodeEncodeError("utf-8", SECRET, 0, 1, SECRET),
    ):
        api.client.fail_after, api.client.stream_error = 1, error
        send_all(api)
    api.client.fail_after, api.client.refusal = None, InvalidRequest("no")
    send_all(api)
    text = log()
    assert "prompt tokens" in text and "builtins.RuntimeError" in text and "fake_client.py" in text
    assert SECRET not in text and SECRET[1:] not in text


def test_prompts_are_logged_where_that_is_asked_for(api: Api, log: Callable[[], str]) -> None:
    logs.set_up_logging("info", log_prompts=True)
    api.config = ServerConfig(model="tiny", log_prompts=True)
    api.complete(prompt=[f"{SECRET}\n1", "b"])
    api.chat(f"{SECRET} 2")
    api.request("POST", "/v1/embeddings", json={"input": f"{SECRET} 3"})
    lines = log().splitlines()
    for expected in (
        f"prompt: '{SECRET}\\n1'",
        "prompt: 'b'",
        f"prompt: 'u:{SECRET} 2;a:'",
        f"prompt: '{SECRET} 3'",
    ):
        assert [line for line in lines if re.fullmatch(rf".* INFO +{re.escape(expected)} \[[0-9a-f]{{32}}\]", line)], expected


def test_a_bug_over_http_is_logged_by_its_place(log: Callable[[], str]) -> None:
    """uvicorn writes the traceback of what nobody caught."""

    async def scenario() -> None:
        client = FakeEngineClient()
        client.refusal = ValueError(SECRET)  # type: ignore[assignment]
        body = json.dumps({"prompt": SECRET}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        async with served(client, api_key=["k"]) as (_, port):
            answer = await ask(port, head.replace("Host: x", "Host: x\r\nAuthorization: Bearer k").encode() + body)
            assert answer.status == 500 and SECRET.encode() not in answer.body
            assert answer.error["code"] == "internal_error" and answer.headers["x-request-id"]

    logs.set_up_logging("debug")
    asyncio.run(scenario())
    text = log()
    assert "builtins.ValueError" in text and "fake_client.py" in text and SECRET not in text
    assert "POST /v1/completions 500, key key1" in text and text.count("builtins.ValueError") == 1
    assert len(set(re.findall(r"(?:internal error|internal_error) \[(\w+)\]$", text, re.MULTILINE))) == 1


def test_causes_are_named_without_their_messages(log: Callable[[], str]) -> None:
    logs.set_up_logging("info")
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise KeyError(SECRET) from error
    except KeyError:
        logging.getLogger("octavo").exception("it failed")
    text = log()
    assert text.index("builtins.ValueError") < text.index("builtins.KeyError") and "it failed" in text
    assert f"{SECRET}\n" not in text and f"'{SECRET}'" not in text
