"""Every parameter of /v1/completions beyond the oldest ones: each test fails where its parameter is ignored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.messages import TokenLogprobs
from engine.request_stream import ChoiceDelta
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from server.api.completion_choices import ChoiceBuilder, WholeChoices
from server.api.completions import CompletionRequest
from server.api.generation import Prompt
from server.api.prompts import FILL_IN_THE_MIDDLE, FillInTheMiddle
from server.config import ServerConfig
from tests.server.conftest import Api, events
from tests.server.fake_client import CONTEXT, byte_tokenizer
from tests.server.test_bad_input import error_of

IGNORED = "X-Octavo-Ignored-Fields"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("typical_p", 0.4, 0.4),
        ("allowed_token_ids", [5, 7], (5, 7)),
        ("min_tokens", 3, 3),
        ("prompt_logprobs", 2, 2),
        ("seed", 9, 9),
    ],
)
def test_fields_of_the_sampling_parameters(api: Api, field: str, value: object, expected: object) -> None:
    api.complete(prompt="a")
    api.complete(prompt="a", **{field: value})
    without, with_it = (getattr(sampling, field) for sampling in api.client.sampling)
    assert with_it == expected != without


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
        ("spaces_between_special_tokens", True),
        ("cache_salt", "mine"),
        ("priority", -3),
    ],
)
def test_fields_of_the_engine_client(api: Api, field: str, value: object) -> None:
    api.complete(prompt="a")
    api.complete(prompt=["a", "b"], **{field: value})
    assert [options[field] for options in api.client.options[1:]] == [value, value]
    assert api.client.options[0][field] != value


def test_bad_words_are_banned_with_and_without_a_space_before_them(api: Api) -> None:
    encode = api.client.tokenizer.encode
    api.complete(prompt="a", bad_words=["cat", " dog", "x", "box"])
    # "box" and " x" end in "x", which is banned by itself.
    expected = [encode("cat"), encode(" cat"), encode(" dog"), encode("x")]
    assert [list(ids) for ids in api.client.sampling[0].bad_words] == expected


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
        ),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice"),
    ],
)
def test_structured_output(api: Api, body: dict[str, Any], kind: str) -> None:
    assert api.complete(prompt=["a", "b"], **body).is_success
    assert [sampling.structured and sampling.structured.kind for sampling in api.client.sampling] == [kind, kind]
    assert api.complete(prompt="a", response_format={"type": "text"}).is_success
    assert api.client.sampling[-1].structured is None


def test_best_of_returns_n_and_counts_all(api: Api) -> None:
    body = api.complete(prompt=["a", "b"], best_of=3, n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [sampling.n for sampling in api.client.sampling] == [3, 3]
    assert body["usage"]["completion_tokens"] == 2 * 3 * 11
    # Its logprobs are wanted for the choice, and are shown only on request.
    assert all(sampling.logprobs == 0 for sampling in api.client.sampling)
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert api.complete(prompt="a", best_of=2, logprobs=1).json()["choices"][0]["logprobs"]["tokens"]
    assert len(events(api.complete(prompt="a", best_of=2, n=2, stream=True))) > 2  # nothing to choose


def test_the_best_ones_have_the_highest_mean_logprob() -> None:
    tokenizer, sampling = byte_tokenizer(), SamplingParams(n=4)
    builder = ChoiceBuilder(
        tokenizer,
        [Prompt([1], None, sampling)] * 2,
        echo=False,
        skip_special_tokens=True,
        num_logprobs=None,
        num_prompt_logprobs=None,
        return_token_ids=False,
    )
    choices = WholeChoices(builder)
    # By the sum, the short "b" would win in the first prompt; by the mean, the long "d" does.
    logprobs = {0: {"a": [-3.0], "b": [-2.0], "c": [-4.0, -4.0], "d": [-1.0] * 3}, 1: {text: [-1.0] for text in "efgh"}}
    for prompt_index, texts in logprobs.items():
        for index, (text, values) in enumerate(texts.items()):
            for value in values:
                delta = ChoiceDelta(index, text, [1], [TokenLogprobs(value, 1, [], [])], "stop")
                choices.add(prompt_index, delta)
    best = choices.best(num_generated=4, num_wanted=2)
    assert [(choice.index, choice.text) for choice in best] == [(0, "ddd"), (1, "b"), (2, "e"), (3, "f")]


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs_without_echo(api: Api, stream: bool) -> None:
    response = api.complete(prompt="xyz", prompt_logprobs=2, max_tokens=2, stream=stream)
    first = (events(response) if stream else [response.json()])[0]["choices"][0]
    nothing, second, third = first["prompt_logprobs"]
    ids = {char: str(api.client.tokenizer.encode(char)[0]) for char in "xyz"}
    assert nothing is None and first["logprobs"] is None and not first["text"].startswith("xyz")
    assert second[ids["y"]] == {"logprob": -0.5, "rank": 1, "decoded_token": "y"} and list(third) == [ids["z"], "65", "66"]
    assert third["65"]["logprob"] == -0.25 and third["66"] == {"logprob": -9999.0, "rank": 2, "decoded_token": "c"}


def test_echo_and_prompt_logprobs_each_list_as_many_as_they_were_asked_for(api: Api) -> None:
    choice = api.complete(prompt="xyz", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1).json()["choices"][0]
    assert api.client.sampling[0].prompt_logprobs == 3 and api.client.sampling[0].logprobs == 1
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2 and len(choice["prompt_logprobs"][1]) == 4
    alone = api.complete(prompt="abc", prompt_logprobs=0, max_tokens=0).json()["choices"][0]
    assert alone["text"] == "" and len(alone["prompt_logprobs"]) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_return_token_ids(api: Api, stream: bool) -> None:
    encode = api.client.tokenizer.encode
    response = api.complete(prompt=["ab", "c"], n=2, return_token_ids=True, stream=stream)
    parts = [choice for chunk in (events(response) if stream else [response.json()]) for choice in chunk["choices"]]
    prompts, outputs = dict[int, list[int]](), dict[int, list[int]]()
    for part in parts:
        assert part["index"] in prompts or "prompt_token_ids" in part
        prompts.setdefault(part["index"], part.get("prompt_token_ids"))
        outputs.setdefault(part["index"], []).extend(part["token_ids"])
    assert prompts == {0: encode("ab"), 1: encode("ab"), 2: encode("c"), 3: encode("c")}
    assert outputs == dict.fromkeys(range(4), encode("Hello world"))
    assert "token_ids" not in api.complete(prompt="ab").json()["choices"][0]


def test_truncate_prompt_tokens_keeps_the_end(api: Api) -> None:
    encode = api.client.tokenizer.encode
    choice = api.complete(prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1).json()["choices"][0]
    assert choice["text"] == "efH"
    api.complete(prompt="abc", truncate_prompt_tokens=5)
    api.complete(prompt="x" * CONTEXT + "y", truncate_prompt_tokens=-1, max_tokens=4)
    api.complete(prompt=encode("x" * CONTEXT), truncate_prompt_tokens=-1)
    assert api.client.prompts == [encode("ef"), encode("abc"), encode("x" * (CONTEXT - 5) + "y"), encode("x" * (CONTEXT - 16))]
    error = error_of(api.complete(prompt="x" * 99, truncate_prompt_tokens=80), 400)
    assert error["code"] == "context_length_exceeded"


def marked_tokenizer(marks: list[str], bos: str | None = None) -> Tokenizer:
    """byte_tokenizer with marks behind <eos>, and a token that is put in front of every text."""
    backend = byte_tokenizer()._backend
    copy = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    copy.pre_tokenizer, copy.decoder = backend.pre_tokenizer, decoders.ByteLevel()
    copy.add_special_tokens(["<eos>", *marks, *([bos] if bos else [])])
    if bos:
        copy.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, copy.token_to_id(bos))]
        )
    return Tokenizer(copy, special_tokens={}, eos_token_ids=frozenset({256}), chat_templates={})


def use_tokenizer(api: Api, tokenizer: Tokenizer) -> None:
    assert api.client.ready is not None
    api.client.tokenizer = tokenizer
    api.client.ready = msgspec.structs.replace(api.client.ready, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("form", FILL_IN_THE_MIDDLE, ids=lambda form: form.prefix)
@pytest.mark.parametrize("bos", [None, "<bos>"])
def test_suffix_where_the_tokenizer_has_the_marks(api: Api, form: FillInTheMiddle, bos: str | None) -> None:
    tokenizer = marked_tokenizer([mark for mark in form if mark], bos)
    use_tokenizer(api, tokenizer)
    prefix, suffix, middle = (mark and tokenizer.token_id(mark) for mark in form)
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "cd"))
    begin = [tokenizer.token_id(bos)] if bos else []
    expected = [*begin, prefix, *before, suffix, *after, middle] if middle else [*begin, suffix, *after, prefix, *before]
    assert api.complete(prompt="ab", suffix="cd").is_success
    assert api.complete(prompt=["ab", ""], suffix="cd", add_special_tokens=False).is_success
    assert api.client.prompts[:2] == [expected, expected[len(begin) :]]
    assert api.client.prompts[2] == [token_id for token_id in expected[len(begin) :] if token_id not in before]


def test_suffix_is_refused_where_it_is_not_possible(api: Api) -> None:
    assert "no tokens for filling in the middle" in error_of(api.complete(prompt="a", suffix="b"), 400)["message"]
    assert api.complete(prompt="a", suffix="").is_success
    use_tokenizer(api, marked_tokenizer(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]))
    for options, param in (
        ({"prompt": [1, 2]}, "suffix"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ):
        assert error_of(api.complete(suffix="b", **options), 400)["param"] == param


def test_add_special_tokens(api: Api) -> None:
    tokenizer = marked_tokenizer([], "<bos>")
    use_tokenizer(api, tokenizer)
    api.complete(prompt="a")
    api.complete(prompt="a", add_special_tokens=False)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert api.client.prompts == [[tokenizer.token_id("<bos>"), *plain], plain]


def test_an_empty_prompt_is_one_where_the_tokenizer_begins_texts(api: Api) -> None:
    """So a base model writes from the beginning of a document."""
    use_tokenizer(api, tokenizer := marked_tokenizer([], "<bos>"))
    choice = api.complete(prompt="", echo=True).json()["choices"][0]
    assert api.client.prompts == [[tokenizer.token_id("<bos>")]] and choice["text"]
    assert api.complete(prompt=["", "a"]).is_success
    for options in ({"prompt": "", "add_special_tokens": False}, {"prompt": [[]]}):
        assert error_of(api.complete(**options), 400)["code"] == "empty_prompt"
    use_tokenizer(api, marked_tokenizer([]))
    assert error_of(api.complete(prompt=""), 400)["code"] == "empty_prompt"


@pytest.mark.parametrize("stream", [True, False])
def test_request_id_names_the_answer(api: Api, stream: bool) -> None:
    response = api.complete(prompt="a", request_id="my-1", stream=stream)
    assert (events(response) if stream else [response.json()])[0]["id"] == "cmpl-my-1"
    assert api.complete(prompt="a").json()["id"] != api.complete(prompt="a").json()["id"]


@pytest.mark.parametrize("stream", [True, False])
def test_explain(api: Api, stream: bool) -> None:
    api.client.num_cached_tokens, api.client.num_preemptions = 4, 2
    response = api.complete(prompt="abcdef", explain=True, n=2, seed=11, stream=stream)
    chunks = events(response) if stream else [response.json()]
    octavo = chunks[-1]["usage"]["octavo"]
    assert octavo.pop("total_s") >= octavo.pop("ttft_s") > 0
    assert octavo == {"queue_s": 0.25, "prefill_s": 0.5, "cached_tokens": 4, "preemptions": 4, "seed": 11}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "octavo" not in api.complete(prompt="abcdef").json()["usage"]


def test_the_seed_that_was_drawn_is_told_and_repeats_the_answer(api: Api) -> None:
    seed = api.complete(prompt="a", explain=True).json()["usage"]["octavo"]["seed"]
    assert seed == api.client.sampling[0].seed < 2**53  # as far as JavaScript can count
    seeds = api.complete(prompt=["a", "b"], explain=True).json()["usage"]["octavo"]["seed"]
    assert seeds == [sampling.seed for sampling in api.client.sampling[1:]] and len(set(seeds)) == 2
    assert api.complete(prompt=["a", "b"], explain=True, seed=-1).json()["usage"]["octavo"]["seed"] == 2**64 - 1


def test_usage_in_every_chunk(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(api.complete(prompt="ab", max_tokens=4, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    alone = events(api.complete(prompt="a", max_tokens=4, stream=True, stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in alone] == [1, 2, 3, 4]


def test_fields_without_effect_are_listed_and_never_refused(api: Api) -> None:
    body = {"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": False}}
    fields = {
        "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    }  # fmt: skip
    for strict in (False, True):
        api.config = ServerConfig(model="tiny", strict=strict)
        response = api.complete(**body, **fields)
        assert response.status_code == 200
        assert set(response.headers[IGNORED].split(", ")) == {*fields, "stream_options.include_obfuscation"}
        assert IGNORED not in api.complete(prompt="a", **dict.fromkeys(fields)).headers
    document = CompletionRequest.model_json_schema()["properties"]
    assert all("without effect" in document[name]["description"] for name in fields)


def test_what_is_refused_by_name_says_what_to_use(api: Api) -> None:
    assert api.complete(prompt="a", use_beam_search=False, repeat_penalty=1.0, mirostat=0).status_code == 200
    for field, instead in {**CompletionRequest.INSTEAD, "mirostat": ""}.items():
        error = error_of(api.complete(prompt="a", **{field: "other"}), 400)
        assert (error["param"], error["code"]) == (field, "unsupported_parameter") and instead in error["message"]


def test_null_means_not_given(api: Api) -> None:
    names = [*CompletionRequest.model_fields, *CompletionRequest.UNSUPPORTED, "unheard_of"]
    nulls: dict[str, Any] = {name: None for name in names if name != "prompt"}
    response = api.complete(prompt="a", **nulls)
    assert response.status_code == 200 and IGNORED not in response.headers
    api.complete(prompt="a")
    first, second = (msgspec.structs.replace(sampling, seed=0) for sampling in api.client.sampling)
    assert first == second and api.client.options[0] == api.client.options[1]
    nested = {"include_usage": None, "continuous_usage_stats": None}
    assert all("usage" not in chunk for chunk in events(api.complete(prompt="a", stream=True, stream_options=nested)))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_lm_evals_local_completions_asks_and_reads(api: Api, max_tokens: int) -> None:
    encode = api.client.tokenizer.encode
    contexts, whole = ["The cat", "A"], ["The cat sat", "A dog"]
    body = {
        "model": "tiny", "prompt": [encode(text) for text in whole], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    choices = sorted(api.complete(**body).json()["choices"], key=lambda choice: choice["index"])
    for choice, context, text in zip(choices, contexts, whole, strict=True):
        logprobs, start, end = choice["logprobs"], len(encode(context)), len(encode(text))
        for name in ("token_logprobs", "top_logprobs", "tokens", "text_offset"):
            assert len(logprobs[name]) == end + max_tokens
        continuation = logprobs["token_logprobs"][start:end]
        assert sum(continuation) == -0.5 * (end - start)
        assert all(max(top.values()) >= own for own, top in zip(continuation, logprobs["top_logprobs"][start:end], strict=True))
        assert "".join(logprobs["tokens"][start:end]) == text[len(context) :]


@pytest.mark.parametrize("stream", [True, False])
def test_text_offsets_count_the_characters_that_are_shown(api: Api, stream: bool) -> None:
    use_tokenizer(api, marked_tokenizer([], "<bos>"))
    api.client.script = api.client.tokenizer.encode("xé!", add_special_tokens=False)
    response = api.complete(prompt="é", echo=True, logprobs=0, max_tokens=4, stream=stream)
    parts = [chunk["choices"][0]["logprobs"] for chunk in (events(response) if stream else [response.json()])]
    tokens, offsets = ([item for part in parts for item in part[name]] for name in ("tokens", "text_offset"))
    assert (tokens[0], tokens[1][:5], tokens[3], tokens[-1]) == ("<bos>", "bytes", "x", "!")
    assert offsets == [0, 0, 0, 1, 2, 2, 3]


def test_a_first_chunk_without_text_still_tells_of_the_prompt(api: Api) -> None:
    api.client.script = api.client.tokenizer.encode("é")
    api.client.tokenizer.decode = lambda *_, **__: ""  # type: ignore[method-assign]
    first, last = events(api.complete(prompt="ab", prompt_logprobs=0, max_tokens=2, stream=True))
    assert len(first["choices"][0]["prompt_logprobs"]) == 2 and "prompt_logprobs" not in last["choices"][0]


def test_of_tokens_that_read_the_same_the_best_one_is_listed() -> None:
    tokenizer = marked_tokenizer([])
    special = tokenizer.token_id("<eos>")
    assert special is not None
    twin = TokenLogprobs(-3.0, 2, [special], [-0.1])
    builder = ChoiceBuilder(
        tokenizer,
        [Prompt([1], None, SamplingParams())],
        echo=False,
        skip_special_tokens=True,
        num_logprobs=1,
        num_prompt_logprobs=None,
        return_token_ids=False,
    )
    logprobs = builder.part(0, ChoiceDelta(0, "", [special], [twin])).logprobs
    assert logprobs is not None and logprobs.token_logprobs == [-3.0] and logprobs.top_logprobs == [{"<eos>": -0.1}]
