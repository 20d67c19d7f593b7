"""/v1/completions: every shape of prompt and answer."""

from __future__ import annotations

import pytest

from server.config import ServerConfig
from tests.server.conftest import Api, events


def test_a_plain_answer(api: Api) -> None:
    api.client.num_cached_tokens = 1
    response = api.complete(prompt="hi", model="tiny", user="me")
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 11,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert response.headers["X-Octavo-Ignored-Fields"] == "user"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("AB", [[34, 35]]), (["A", "BC"], [[34], [35, 36]]), ([34, 35], [[34, 35]]), ([[34], [35, 36]], [[34], [35, 36]])],
)
def test_prompts_as_text_and_as_token_ids(api: Api, prompt: object, expected: list[list[int]]) -> None:
    ids = api.client.tokenizer.encode("ABC")
    assert [token_id - ids[0] + 34 for token_id in ids] == [34, 35, 36]
    shifted = [[token_id - 34 + ids[0] for token_id in row] for row in expected]
    if isinstance(prompt, list) and not isinstance(prompt[0], str):
        prompt = shifted if isinstance(prompt[0], list) else shifted[0]
    assert api.complete(prompt=prompt).status_code == 200
    assert sorted(api.client.prompts) == shifted


def test_choices_count_prompts_first(api: Api) -> None:
    body = api.complete(prompt=["a", "bc"], n=2, max_tokens=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in body["choices"]} == {"He"}
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 8
    assert all(stream.aborted for stream in api.client.streams)  # harmless for what has finished


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream(api: Api, include_usage: bool) -> None:
    response = api.complete(prompt=["a", "b"], n=2, max_tokens=3, stream=True, stream_options={"include_usage": include_usage})
    chunks = events(response)
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    texts: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(4), "Hel")
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count("length") == 4


@pytest.mark.parametrize("stream", [True, False])
def test_echo_with_logprobs(api: Api, stream: bool) -> None:
    response = api.complete(prompt="ab", echo=True, logprobs=2, max_tokens=2, stream=stream)
    parts = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    assert "".join(part["text"] for part in parts) == "abHe"
    merged = {key: [item for part in parts for item in part["logprobs"][key]] for key in parts[0]["logprobs"]}
    assert merged["tokens"] == ["a", "b", "H", "e"]
    assert merged["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert merged["text_offset"] == [0, 1, 2, 3]
    assert merged["top_logprobs"][0] is None
    assert len(merged["top_logprobs"][2]) == 3 and min(merged["top_logprobs"][2].values()) == -9999.0


def test_every_choice_echoes_the_prompt_with_its_logprobs(api: Api) -> None:
    body = api.complete(prompt=["ab", "cd"], echo=True, logprobs=0, max_tokens=1, n=2).json()
    assert [choice["logprobs"]["tokens"] for choice in body["choices"]] == [["a", "b", "H"]] * 2 + [["c", "d", "H"]] * 2


def test_echo_alone_computes_the_prompt_only(api: Api) -> None:
    choice = api.complete(prompt="ab", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "ab" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}]
    assert api.client.sampling[0].prompt_logprobs == 0


def test_a_token_that_is_part_of_a_character_is_shown_by_its_bytes(api: Api) -> None:
    ids = api.client.tokenizer.encode("é")
    choice = api.complete(prompt=ids, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "é" and choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_sampling_fields_reach_the_engine(api: Api) -> None:
    sent = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.3, "min_tokens": 2, "max_tokens": 5, "ignore_eos": True, "seed": 42, "n": 2, "logprobs": 3,
    }  # fmt: skip
    assert api.complete(prompt="a", **sent, logit_bias={"65": -100, "66": 1.5}, stop_token_ids=[3], stop=["x", "y"]).is_success
    (sampling,) = api.client.sampling
    assert {name: getattr(sampling, name) for name in sent} == sent
    assert sampling.logit_bias == {65: -100.0, 66: 1.5} and sampling.stop_token_ids == (3,)
    assert api.client.stops == [["x", "y"]]


def test_defaults_request_then_model_then_openai(api: Api) -> None:
    assert api.client.ready is not None
    api.client.ready.generation_defaults.update(temperature=0.6, top_k=50, top_p=None)
    api.complete(prompt="a", temperature=None)
    api.complete(prompt="a", temperature=0, top_k=-1, seed=-1)
    first, second = api.client.sampling
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.6, 50, 1.0, 16)
    assert (second.temperature, second.top_k, second.seed) == (0.0, 0, 2**64 - 1)
    api.complete(prompt="a")
    assert api.client.sampling[2].seed != first.seed


def test_unknown_fields_are_listed_or_refused(api: Api) -> None:
    options = {"prompt": "a", "foo": 1, "x\ny\u00e9": 2, "stream_options": {"bar": 1}, "stream": True}
    response = api.complete(**options)
    assert sorted(response.headers["X-Octavo-Ignored-Fields"].split(", ")) == ["foo", "stream_options.bar", "x?y?"]
    many = api.complete(prompt="a", **{f"f{index}": 1 for index in range(100)})
    assert many.headers["X-Octavo-Ignored-Fields"].endswith("+68 more")
    api.config = ServerConfig(model="tiny", strict=True)
    refused = api.complete(prompt="a", temprature=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unknown_field"
    assert "did you mean temperature?" in refused.json()["error"]["message"]


def test_names_and_aliases(api: Api) -> None:
    api.config = ServerConfig(model="tiny", served_model_name=["first", "second"])
    assert api.complete(prompt="a").json()["model"] == "first"
    assert api.complete(prompt="a", model="second").json()["model"] == "second"
    assert api.complete(prompt="a", model="tiny").status_code == 404
