"""What each parameter of /v1/completions does to the demo model's text: no test passes where its parameter is ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.test_server_with_demo_model import COUNT, Server, start_server

PROMPT = "The capital of France is"
IM_END = 2


class Completions:
    """Posts to one server; greedy unless told otherwise."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self._http.post(path, json={"prompt": PROMPT, "temperature": 0, "max_tokens": 8, **body})

    def answer(self, **body: Any) -> dict[str, Any]:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def choice(self, **body: Any) -> dict[str, Any]:
        choice: dict[str, Any] = self.answer(**body)["choices"][0]
        return choice

    def text(self, **body: Any) -> str:
        return str(self.choice(**body)["text"])

    def texts_of_stream(self, **body: Any) -> list[str]:
        lines = self.post(stream=True, **body).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        return [choice["text"] for chunk in chunks for choice in chunk["choices"]]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.choice(prompt=text, return_token_ids=True, max_tokens=1)["prompt_token_ids"]
        return ids


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server") / "log", "--dtype", "float32", "--max-model-len", "1024")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def api(server: Server) -> Completions:
    return Completions(server.url)


@pytest.fixture(scope="module")
def greedy(api: Completions) -> str:
    return api.text()


def test_max_tokens_and_its_default(api: Completions) -> None:
    assert api.answer(max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert api.answer(max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_what_leaves_only_the_best_token_is_greedy(api: Completions, greedy: str, narrow: dict[str, float]) -> None:
    assert api.text(temperature=2.0, seed=1, **narrow) == greedy
    assert api.text(temperature=2.0, seed=1) != greedy


def test_typical_p_of_almost_nothing_leaves_one_token(api: Completions) -> None:
    texts = {api.text(temperature=2.0, typical_p=1e-6, seed=seed) for seed in range(4)}
    assert len(texts) == 1 < len({api.text(temperature=2.0, seed=seed) for seed in range(4)})


def test_seed_and_n(api: Completions) -> None:
    texts = [choice["text"] for choice in api.answer(n=3, temperature=1.5, seed=5)["choices"]]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in api.answer(n=3, temperature=1.5, seed=5)["choices"]] == texts
    assert [choice["text"] for choice in api.answer(n=3, temperature=1.5, seed=6)["choices"]] != texts


def test_best_of_returns_what_has_the_highest_mean_logprob(api: Completions) -> None:
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    every = api.answer(n=4, logprobs=0, **options)["choices"]
    means = {choice["text"]: sum(values) / len(values) for choice in every if (values := choice["logprobs"]["token_logprobs"])}
    best = api.answer(n=2, best_of=4, **options)
    assert [choice["text"] for choice in best["choices"]] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    total = sum(len(choice["logprobs"]["tokens"]) for choice in every)
    assert best["usage"]["completion_tokens"] == total


def test_prompt_logprobs_are_those_of_generating_it(api: Completions) -> None:
    own = api.choice(logprobs=2, return_token_ids=True)
    ids = [*own["prompt_token_ids"], *own["token_ids"]]
    for extra in ({"max_tokens": 0}, {"max_tokens": 1}):
        echoed = api.choice(prompt=ids, echo=True, logprobs=2, **extra)["logprobs"]
        assert len(echoed["tokens"]) == len(ids) + extra["max_tokens"] and echoed["token_logprobs"][0] is None
        given = slice(len(own["prompt_token_ids"]), len(ids))
        assert echoed["token_logprobs"][given] == pytest.approx(own["logprobs"]["token_logprobs"], abs=2e-4)
        assert [list(top) for top in echoed["top_logprobs"][given]] == [list(top) for top in own["logprobs"]["top_logprobs"]]
    separate = api.choice(prompt=ids, prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]
    assert [entry[str(token_id)]["logprob"] for entry, token_id in zip(separate[1:], ids[1:], strict=True)] == pytest.approx(
        echoed["token_logprobs"][1 : len(ids)], abs=2e-4
    )
    assert all(entry[str(token_id)]["rank"] == 1 for entry, token_id in zip(separate[given], ids[given], strict=True))


def test_logprobs_in_the_legacy_shape(api: Completions) -> None:
    choice = api.choice(logprobs=3, echo=True)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and len(logprobs["top_logprobs"][-1]) == 3
    offsets = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    assert all(choice["text"][offset:].startswith(token) for token, offset in offsets)
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_stop_strings_over_token_borders_never_leak(api: Completions) -> None:
    text = api.text(max_tokens=24)
    stop = text[9:15]  # from the middle of a word into the next ones
    for options in ({}, {"include_stop_str_in_output": True}):
        choice = api.choice(max_tokens=24, stop=["never there"] * 15 + [stop], **options)
        assert choice["text"] == text[: text.index(stop) + (len(stop) if options else 0)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert "".join(api.texts_of_stream(max_tokens=24, stop=[stop], **options)) == choice["text"]


def test_logit_bias_and_stop_token_ids(api: Completions) -> None:
    (token_id,) = api.ids(" Rome")
    assert api.text(logit_bias={str(token_id): 100}, max_tokens=2) == " Rome Rome"
    choice = api.choice(logit_bias={str(token_id): 100}, stop_token_ids=[token_id])
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", token_id)


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 10.0}])
def test_penalties_break_a_repetition(api: Completions, penalty: dict[str, float]) -> None:
    prompt = "Say it again and again: tulip tulip tulip tulip"
    text = api.text(prompt=prompt, max_tokens=32)
    assert text.count("tulip") > api.text(prompt=prompt, max_tokens=32, **penalty).count("tulip")


def test_allowed_token_ids(api: Completions) -> None:
    allowed = api.ids(" Rome") + api.ids(" London")
    ids = api.choice(allowed_token_ids=allowed, temperature=2.0, seed=3, return_token_ids=True)["token_ids"]
    assert set(ids) <= set(allowed)


@pytest.mark.parametrize(("prompt", "word"), [(PROMPT, "Paris"), (COUNT, "seven, eight")])
def test_bad_words(api: Completions, prompt: str, word: str) -> None:
    assert word in api.text(prompt=prompt, max_tokens=16)
    assert word not in api.text(prompt=prompt, max_tokens=16, bad_words=[word])


def test_min_tokens_and_ignore_eos(api: Completions) -> None:
    ends = {"logit_bias": {str(IM_END): 100}}
    assert api.answer(**ends)["usage"]["completion_tokens"] == 1
    assert api.answer(**ends, min_tokens=4)["usage"]["completion_tokens"] == 5
    assert api.answer(**ends, ignore_eos=True)["usage"]["completion_tokens"] == 8


def test_special_tokens_in_the_text(api: Completions) -> None:
    options = {"logit_bias": {str(IM_END): 100}, "ignore_eos": True, "max_tokens": 3}
    assert api.text(**options) == ""
    mark = "<|im_end|>"
    assert api.text(**options, skip_special_tokens=False) == mark * 3
    spaced = {**options, "skip_special_tokens": False, "spaces_between_special_tokens": True}
    assert api.text(**spaced) == "".join(api.texts_of_stream(**spaced)) == " ".join([mark] * 3)


def test_truncate_prompt_tokens(api: Completions) -> None:
    answer = api.answer(truncate_prompt_tokens=2, return_token_ids=True)
    assert answer["usage"]["prompt_tokens"] == 2 and answer["choices"][0]["prompt_token_ids"] == api.ids(PROMPT)[-2:]
    long = api.answer(prompt="word " * 3000, truncate_prompt_tokens=-1)
    assert long["usage"]["total_tokens"] == 1024


def test_cache_salt_shares_nothing(api: Completions) -> None:
    prompt = "Once upon a time there was a tester who counted cached pages one by one. " * 5
    cached = [
        api.answer(prompt=prompt, cache_salt=salt, explain=True)["usage"]["octavo"]["cached_tokens"] for salt in ("a", "a", "b")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_suffix_is_refused_by_a_model_without_marks(api: Completions) -> None:
    assert api.post(suffix="b").json()["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("constraint", "matches"),
    [
        ({"structured_outputs": {"choice": ["Berlin", "Rome"]}}, lambda text: text in ("Berlin", "Rome")),
        ({"structured_outputs": {"regex": "[0-9]{3}-[0-9]{2}"}}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_structured_output(api: Completions, constraint: dict[str, Any], matches: Any) -> None:
    choice = api.choice(max_tokens=200, **constraint)
    assert choice["finish_reason"] == "stop" and matches(choice["text"])


def test_explanation(api: Completions) -> None:
    octavo = api.answer(explain=True, seed=3)["usage"]["octavo"]
    assert octavo["queue_s"] >= 0 and 0 < octavo["prefill_s"] <= octavo["ttft_s"] <= octavo["total_s"]
    assert (octavo["seed"], octavo["preemptions"]) == (3, 0)
