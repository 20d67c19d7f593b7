"""/v1/models and /v1/models/{id}, as OpenAI's SDK sees them, and the names a model answers to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from server.config import ServerConfig
from tests.server.conftest import Api

NAMES = ["small", "org/Small-1B", "a b+c%"]


@pytest.fixture
def named(api: Api) -> Api:
    api.config = ServerConfig(model="tiny", served_model_name=NAMES)
    return api


def with_sdk(api: Api, ask: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with api.client.http(api.config) as http:
            return await ask(openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0))

    return asyncio.run(run())


def test_the_list(named: Api) -> None:
    models = with_sdk(named, lambda client: client.models.list()).data
    assert [model.id for model in models] == NAMES
    for model in models:
        assert model.object == "model" and model.owned_by == "octavo" and model.created > 1.7e9
        assert model.max_model_len == 64 and model.root == "tiny" and model.parent is None
    assert named.get("/v1/models").json()["object"] == "list"


@pytest.mark.parametrize("name", NAMES)
def test_each_name_can_be_looked_up_and_used(named: Api, name: str) -> None:
    model = with_sdk(named, lambda client: client.models.retrieve(name))
    assert (model.id, model.max_model_len) == (name, 64)
    assert named.complete(prompt="a", model=name).json()["model"] == name
    assert named.chat(model=name).json()["model"] == name
    assert named.request("POST", "/v1/embeddings", json={"input": "a", "model": name}).json()["model"] == name


def test_without_names_the_model_is_its_own(api: Api) -> None:
    assert [card["id"] for card in api.get("/v1/models").json()["data"]] == ["tiny"]
    assert api.complete(prompt="a").json()["model"] == "tiny", "a request may leave the name out"


@pytest.mark.parametrize("name", ["tiny", "SMALL", "org", "small/", "small/x"])
def test_other_names_are_not_found(named: Api, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        with_sdk(named, lambda client: client.models.retrieve(name))
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    error = named.get(f"/v1/models/{name}").json()["error"]
    assert error["type"] == "invalid_request_error" and "org/Small-1B" in error["message"]
    assert named.complete(prompt="a", model=name).json()["error"]["code"] == "model_not_found"


def test_before_the_engine_is_ready(named: Api) -> None:
    named.client.state, named.client.ready = "starting", None
    assert with_sdk(named, lambda client: client.models.retrieve("small")).max_model_len is None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_methods_are_not_allowed(named: Api, method: str) -> None:
    response = named.request(method, "/v1/models/small")
    assert response.status_code == 405 and response.json()["error"]["code"] == "method_not_allowed"
