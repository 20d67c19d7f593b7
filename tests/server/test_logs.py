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
from server.request_record import RequestRecord
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


def ours(text: str) -> list[dict[str, Any]]:
    """The lines of a JSON log, without those of the test's HTTP client."""
    return [line for line in map(json.loads, text.splitlines()) if line["logger"].startswith("octavo")]


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


def test_prompts_in_json(api: Api, log: Callable[[], str]) -> None:
    logs.set_up_logging("info", log_format="json", log_prompts=True)
    api.config = ServerConfig(model="tiny", log_prompts=True)
    answer = api.request("POST", "/v1/completions", json={"prompt": f"{SECRET}\n1"}, headers={"X-Request-Id": "mine"})
    prompt, request = ours(log())
    assert (prompt["message"], prompt["prompt"], prompt["request_id"]) == ("prompt", f"{SECRET}\n1", "mine")
    assert (request["message"], request["request_id"]) == ("request", "mine")
    assert request["response_id"] == answer.json()["id"]


def test_the_line_of_an_embedding(api: Api, log: Callable[[], str]) -> None:
    logs.set_up_logging("info", log_format="json")
    api.request("POST", "/v1/embeddings", json={"input": ["ab", "c"]})
    (line,) = ours(log())
    found = {name: line[name] for name in ("status", "model", "prompt_tokens", "output_tokens", "queue_s", "prefill_s")}
    expected = {"status": 200, "model": "tiny", "prompt_tokens": 3, "output_tokens": 0, "queue_s": 0.25, "prefill_s": 0.5}
    assert found == expected and line["finish_reason"] == "stop"


def test_probes_are_told_of_at_debug(api: Api, log: Callable[[], str]) -> None:
    for level, num_lines in (("info", 0), ("debug", 2)):
        logs.set_up_logging(level)
        api.get("/health")
        api.get("/metrics")
        assert len(re.findall(r" GET /(?:health|metrics) 200, total ", log())) == num_lines


def test_choices_that_end_differently_are_told_apart() -> None:
    record = RequestRecord(finish_reasons=["stop", "length", "stop"])
    assert record.fields()["finish_reason"] == "length+stop"


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
