"""/v1/embeddings: every form of input, each field, vectors and their shapes, and what is refused."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine.client import Embedding
from engine.errors import ContextLengthExceeded, RequestFailed
from server.config import ServerConfig
from tests.metrics_text import metric
from tests.server.conftest import Api
from tests.server.fake_client import HIDDEN_SIZE, FakeEngineClient
from tests.server.test_lifetime import Connection, until


def embed(api: Api, input: Any = "ab", **body: Any) -> httpx.Response:
    return api.request("POST", "/v1/embeddings", json={"input": input, **body})


def vectors_of(response: httpx.Response) -> list[np.ndarray]:
    assert response.status_code == 200, response.text
    return [np.array(item["embedding"]) for item in response.json()["data"]]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def expected(token_ids: list[int], dimensions: int = HIDDEN_SIZE) -> np.ndarray:
    """The fake engine's vector of a prompt, cut and scaled."""
    vector = np.bincount(np.array(token_ids) % HIDDEN_SIZE, minlength=HIDDEN_SIZE)[:dimensions].astype(float)
    return vector / (np.linalg.norm(vector) or 1.0)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_plain_answer(api: Api) -> None:
    response = embed(api, "abc", model="tiny")
    ids = api.client.tokenizer.encode("abc")
    body = response.json()
    assert body["object"] == "list" and body["model"] == "tiny"
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    (item,) = body["data"]
    assert item["object"] == "embedding" and item["index"] == 0
    (vector,) = vectors_of(response)
    assert vector == pytest.approx(expected(ids), abs=1e-6) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert api.client.embedded == [(ids, {"pooling": "mean", "cache_salt": "", "priority": 0})]
    assert "X-Octavo-Ignored-Fields" not in response.headers


@pytest.mark.parametrize(
    ("input", "prompts"),
    [("AB", [[34, 35]]), (["A", "BC"], [[34], [35, 36]]), ([34, 35], [[34, 35]]), ([[34], [35, 36]], [[34], [35, 36]])],
)
def test_four_forms_of_input(api: Api, input: Any, prompts: list[list[int]]) -> None:
    offset = api.client.tokenizer.encode("A")[0] - 34
    shifted = [[token_id + offset for token_id in prompt] for prompt in prompts]
    if isinstance(input, list) and not isinstance(input[0], str):
        input = shifted if isinstance(input[0], list) else shifted[0]
    response = embed(api, input)
    assert [item["index"] for item in response.json()["data"]] == list(range(len(prompts)))
    for vector, prompt in zip(vectors_of(response), shifted, strict=True):
        assert vector == pytest.approx(expected(prompt), abs=1e-6)
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_base64_is_the_same_numbers(api: Api) -> None:
    texts = ["abc", "xyz"]
    floats = vectors_of(embed(api, texts, encoding_format="float"))
    items = embed(api, texts, encoding_format="base64").json()["data"]
    for item, numbers in zip(items, floats, strict=True):
        decoded = np.frombuffer(base64.b64decode(item["embedding"], validate=True), dtype="<f4")
        assert decoded.tolist() == numbers.tolist()


@pytest.mark.parametrize("dimensions", [1, 3, HIDDEN_SIZE])
def test_dimensions_cut_and_scale_again(api: Api, dimensions: int) -> None:
    text = "the quick brown fox"
    (vector,) = vectors_of(embed(api, text, dimensions=dimensions))
    assert vector == pytest.approx(expected(api.client.tokenizer.encode(text), dimensions), abs=1e-6)
    assert len(vector) == dimensions


def test_pooling_by_setting_and_by_field(api: Api) -> None:
    embed(api, pooling="last")
    api.config = ServerConfig(model="tiny", embedding_pooling="last")
    embed(api)
    embed(api, pooling="mean")
    assert [options["pooling"] for _, options in api.client.embedded] == ["last", "last", "mean"]


def test_priority_and_cache_salt_reach_the_engine(api: Api) -> None:
    embed(api, priority=-3, cache_salt="pepper")
    assert api.client.embedded[0][1] == {"pooling": "mean", "cache_salt": "pepper", "priority": -3}


@pytest.mark.parametrize(("given", "asked"), [({}, True), ({"add_special_tokens": False}, False)])
def test_add_special_tokens(api: Api, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool], asked: bool) -> None:
    seen = []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        seen.append(add_special_tokens)
        return [1]

    monkeypatch.setattr(api.client.tokenizer, "encode", encode)
    assert embed(api, "a", **given).is_success and seen == [asked]


def test_truncate_prompt_tokens_keeps_the_last(api: Api) -> None:
    ids = api.client.tokenizer.encode("abcdef")
    assert embed(api, "abcdef", truncate_prompt_tokens=2).json()["usage"]["prompt_tokens"] == 2
    embed(api, ["a" * 100, "b"], truncate_prompt_tokens=-1)
    prompts = [prompt for prompt, _ in api.client.embedded]
    assert prompts[0] == ids[-2:] and [len(prompt) for prompt in prompts[1:]] == [64, 1]


def test_explain(api: Api) -> None:
    api.client.num_cached_tokens = 2
    usage = embed(api, ["a", "b"], explain=True).json()["usage"]
    explanation = usage["octavo"]
    assert {name: explanation[name] for name in ("queue_s", "prefill_s", "cached_tokens")} == {
        "queue_s": 0.25, "prefill_s": 0.5, "cached_tokens": 4,
    }  # fmt: skip
    assert 0 < explanation["total_s"] < 60
    assert "octavo" not in embed(api, explain=False).json()["usage"]


def test_names_of_the_model(api: Api) -> None:
    api.config = ServerConfig(model="tiny", served_model_name=["one", "two"])
    assert embed(api).json()["model"] == "one" and embed(api, model="two").json()["model"] == "two"
    assert error_of(embed(api, model="tiny"), 404)["code"] == "model_not_found"


def test_fields_without_effect_and_unknown_ones(api: Api) -> None:
    assert embed(api, user="me", nonsense=1).headers["X-Octavo-Ignored-Fields"] == "user, nonsense"
    api.config = ServerConfig(model="tiny", strict=True)
    assert embed(api, user="me").headers["X-Octavo-Ignored-Fields"] == "user"
    error = error_of(embed(api, dimension=3))
    assert error["param"] == "dimension" and "dimensions" in error["message"]


def test_null_is_not_given(api: Api) -> None:
    nothing = dict.fromkeys(("model", "encoding_format", "dimensions", "pooling", "truncate_prompt_tokens", "user", "explain"))
    assert embed(api, **nothing).json() == embed(api).json()


def test_the_sdk_reads_it(api: Api) -> None:
    """It asks for base64, and turns that into numbers by itself."""

    async def ask() -> Any:
        async with api.client.http(api.config) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
            return await client.embeddings.create(model="tiny", input=["abc", "d"], dimensions=4)

    answer = asyncio.run(ask())
    for item, text in zip(answer.data, ("abc", "d"), strict=True):
        assert item.embedding == pytest.approx(expected(api.client.tokenizer.encode(text), 4), abs=1e-6)
    assert answer.usage.prompt_tokens == 4


# -- vectors that are none --------------------------------------------------------------------------------------------


def test_zeros_stay_zeros(api: Api) -> None:
    """Of a vector cut before its first number that is none, say."""
    ids = [4]  # the fake's vector has its one in place 4
    assert vectors_of(embed(api, ids, dimensions=3))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_no_answer(api: Api, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    async def broken(prompt_token_ids: list[int], **_options: Any) -> Embedding:
        return Embedding(np.array([1.0, bad], dtype="<f4").tobytes(), 1, 0, 0.0, 0.0)

    monkeypatch.setattr(api.client, "embed", broken)
    error = error_of(embed(api), 500)
    assert error["code"] == "request_failed" and "finite" in error["message"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[1], [1.0]]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [257]}, "input"),
        ({"input": [[5], [10**30]]}, "input"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "dimensions": 2.0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "priority": "high"}, "priority"),
        ({"input": "a", "cache_salt": "x" * 300}, "cache_salt"),
        ({"input": "a", "explain": 1}, "explain"),
        ({"input": "a", "model": 5}, "model"),
    ],
)
def test_what_is_refused(api: Api, body: dict[str, Any], param: str) -> None:
    error = error_of(api.request("POST", "/v1/embeddings", json=body))
    assert error["param"] == param and error["type"] == "invalid_request_error", error
    assert not api.client.embedded, "refused before anything is computed"


def test_ids_of_another_tokenizer_name_langchain_s_setting(api: Api) -> None:
    message = error_of(embed(api, [[5, 100_000]]))["message"]
    assert "100000" in message and "0 to 256" in message and "check_embedding_ctx_length=False" in message


def test_past_the_context(api: Api) -> None:
    error = error_of(embed(api, ["a", "b" * 65]))
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert "64" in error["message"] and "input[1] has 65" in error["message"] and not api.client.embedded
    assert "input has 65" in error_of(embed(api, "b" * 65))["message"]
    assert embed(api, "b" * 64).is_success


def test_before_the_engine_is_ready(api: Api) -> None:
    api.client.state, api.client.ready = "starting", None
    assert error_of(embed(api), 503)["code"] == "engine_unavailable"


def test_the_engine_s_refusal(api: Api) -> None:
    api.client.refusal, api.client.refuse_after = ContextLengthExceeded("The pages fit 5 tokens.", param="prompt"), 1
    error = error_of(embed(api, ["a", "b", "c"]))
    assert error["param"] == "input" and error["code"] == "context_length_exceeded" and "5 tokens" in error["message"]
    api.client.refusal, api.client.refuse_after = RequestFailed("Out of memory."), 0
    assert error_of(embed(api), 500)["code"] == "request_failed"


# -- lifetime ---------------------------------------------------------------------------------------------------------


class SlowClient(FakeEngineClient):
    """Embeds nothing until it is told which; counts what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = 0
        self.broken = asyncio.Event()

    async def embed(self, prompt_token_ids: list[int], **_options: Any) -> Embedding:  # type: ignore[override]
        self.open += 1
        try:
            await self.broken.wait()
            if len(prompt_token_ids) == 1:
                raise RequestFailed("It broke.")
            await asyncio.Event().wait()
            raise AssertionError
        finally:
            self.open -= 1


@pytest.mark.parametrize("ends_by", ["disconnect", "error"])
def test_all_inputs_at_once_and_none_left_over(ends_by: str) -> None:
    async def scenario() -> None:
        client = SlowClient()
        connection = Connection(client, "/v1/embeddings", {"input": ["aa", "b", "cc"]})
        await until(lambda: client.open == 3)
        (connection.gone if ends_by == "disconnect" else client.broken).set()
        await connection.over
        assert client.open == 0
        status = (await connection.sent.get())["status"]
        assert status == (499 if ends_by == "disconnect" else 500)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_metrics_count_inputs() -> None:
    async def scenario() -> str:
        client = FakeEngineClient()
        async with client.http() as http:
            await http.post("/v1/embeddings", json={"input": ["ab", "c"]})
            client.refusal = RequestFailed("no")
            await http.post("/v1/embeddings", json={"input": "d"})
            return (await http.get("/metrics")).text

    text = asyncio.run(scenario())
    assert metric(text, "octavo_request_success_total", finished_reason="stop") == 2
    assert metric(text, "octavo_request_success_total", finished_reason="error") == 1
    assert metric(text, "octavo_request_prompt_tokens_sum") == 3
    assert metric(text, "octavo_request_prompt_tokens_count") == 1
    assert metric(text, "octavo_request_queue_time_seconds_sum") == 2 * 0.25
    assert metric(text, "octavo_request_prefill_time_seconds_sum") == 2 * 0.5
    assert metric(text, "octavo_api_key_prompt_tokens_total") == 4
