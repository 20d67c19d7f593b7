"""Text while tokens arrive: whole characters only, no part of a stop string, and in the end exactly the decoded text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from tests.tokenizers_in_the_manner_of import BUILDERS

GENERATIVE = ("llama3", "gemma", "mistral", "qwen3")
# Multi-byte characters, combining marks, joiners, a word that is one token, spaces: what breaks over token borders.
PIECES = ["a", " ", "\n", "é", "e\u0301", "世", "界", "🙂", "👩\u200d👧", "🇫🇷", " Paris", " stop", "\u00a0", "<", ">"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=12)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(build(tmp_path_factory.mktemp(name))) for name, build in BUILDERS.items()}


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [single[bytes([byte])] for byte in data]


def chunked(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize("name", list(BUILDERS))
@settings(max_examples=80, deadline=None)
@given(text=TEXTS, prompt=st.sampled_from(["", "Hello", "the capital of", "🙂"]), split_bytes=st.booleans())
def test_parts_join_to_the_decoded_text(
    tokenizers: dict[str, Tokenizer], name: str, text: str, prompt: str, split_bytes: bool
) -> None:
    tokenizer = tokenizers[name]
    prompt_ids = tokenizer.encode(prompt)
    if split_bytes and name in GENERATIVE:
        ids = byte_ids(tokenizer, text.encode())  # a border inside every character
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(prompt_ids)
    parts = [detokenizer.append([token_id]).text for token_id in ids]
    if name in GENERATIVE and "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)
    prompt_text = tokenizer.decode(prompt_ids)
    assert prompt_text + "".join(parts) + detokenizer.finish() == tokenizer.decode(prompt_ids + ids)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_special_and_unknown_tokens_in_the_middle(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    words = tokenizer.encode("the capital", add_special_tokens=False)
    for extra in (min(tokenizer.eos_token_ids), tokenizer.vocab_size + 3):
        ids = [*words, extra, *words]
        for skip in (True, False):
            detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
            text = "".join(detokenizer.append([token_id]).text for token_id in ids) + detokenizer.finish()
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_spaces_between_special_tokens_are_put_there_on_request_only(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    words = tokenizer.encode("the capital", add_special_tokens=False)
    eos = min(tokenizer.eos_token_ids)
    mark = tokenizer.token_text(eos)
    ids = [*words, eos, eos, eos, *words, eos]

    def text(*, skip: bool, spaces: bool) -> str:
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        return "".join(detokenizer.append([token_id]).text for token_id in ids) + detokenizer.finish()

    assert text(skip=True, spaces=True) == text(skip=True, spaces=False)
    exact = text(skip=False, spaces=False)
    assert f"{mark} {mark} {mark}" not in exact or name not in GENERATIVE
    assert text(skip=False, spaces=True).count(f"{mark} ") >= 2
    assert len(text(skip=False, spaces=True)) == len(exact) + 2


@pytest.mark.parametrize("name", GENERATIVE)
def test_first_token_keeps_its_space_after_a_prompt(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    prompt = tokenizer.encode("France is")
    ids = tokenizer.encode("France is Paris")[len(prompt) :]
    text = "".join(tokenizer.detokenizer(prompt).append([token_id]).text for token_id in ids)
    assert text == " Paris"


def test_dummy_prefix_goes_only_at_the_very_beginning(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["mistral"]
    bos, *ids = tokenizer.encode("Paris")
    assert tokenizer.detokenizer([bos]).append(ids).text == tokenizer.decode([bos, *ids]) == "Paris"
    assert tokenizer.detokenizer([bos, *ids]).append(ids).text == " Paris"


@pytest.mark.parametrize("name", GENERATIVE)
def test_invalid_bytes_do_not_hold_back_what_follows(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = byte_ids(tokenizer, b"a\xff\xe4\xb8b\xf0\x9f")
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.append([token_id]).text for token_id in ids]
    assert parts == ["a", "\ufffd", "", "", "\ufffdb", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_prompt_that_ends_inside_a_character(tokenizers: dict[str, Tokenizer]) -> None:
    for name in GENERATIVE:
        first, *rest = byte_ids(tokenizers[name], "世".encode())
        assert tokenizers[name].detokenizer([first]).append(rest).text == "世"


class WrittenOut:
    """A text source whose tokens are the pieces of a list."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def find_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop string) of the match that ends first, then starts first."""
    matches = [(i + len(s), i, s) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    return min(matches, default=None)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=15),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 20), max_size=15),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_against_an_offline_search(
    pieces: list[str], stops: list[str], cuts: list[int], include: bool, min_tokens: int
) -> None:
    detokenizer = Detokenizer(WrittenOut(pieces), stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    sent, num_tokens, stop = "", 0, None
    for chunk in chunked(list(range(len(pieces))), cuts):
        delta = detokenizer.append(chunk)
        sent, num_tokens, stop = sent + delta.text, num_tokens + delta.num_tokens, delta.stop
        assert stop is not None or num_tokens == chunk[-1] + 1 if chunk else True
        if stop is not None:
            break
        # No more is held back than could begin a stop string.
        seen = "".join(pieces[:num_tokens])
        held = seen[len(sent) :]
        searched = "".join(pieces[min_tokens:num_tokens])
        longest = max((n for s in stops for n in range(len(s)) if searched.endswith(s[:n])), default=0)
        assert (seen.startswith(sent), len(held)) == (True, 0 if include else longest)
    free, text = "".join(pieces[:min_tokens]), "".join(pieces[min_tokens:])
    match = find_stop(text, stops)
    if match is None:
        assert (sent + detokenizer.finish(), stop) == (free + text, None)
        return
    end, start, string = match
    assert (sent, stop) == (free + (text[:end] if include else text[:start]), string)
    assert len("".join(pieces[min_tokens : num_tokens - 1])) < end <= len("".join(pieces[min_tokens:num_tokens]))
    assert detokenizer.finish() == ""
    assert detokenizer.append([0]) == ("", 0, string)


@pytest.mark.parametrize("name", GENERATIVE)
@settings(max_examples=50, deadline=None)
@given(text=TEXTS, stop=st.sampled_from(["🙂", "世界", " Paris", "Paris stop", "\u200d👧", "e\u0301"]))
def test_stop_strings_over_real_tokens(tokenizers: dict[str, Tokenizer], name: str, text: str, stop: str) -> None:
    tokenizer = tokenizers[name]
    prompt_ids = tokenizer.encode("Hello")
    ids = byte_ids(tokenizer, text.encode())
    detokenizer = tokenizer.detokenizer(prompt_ids, stop=[stop])
    sent = ""
    for token_id in ids:
        delta = detokenizer.append([token_id])
        sent += delta.text
        assert stop not in sent
        if delta.stop is not None:
            break
    assert sent + detokenizer.finish() == text.partition(stop)[0]


def test_stop_refuses_what_can_never_match(tokenizers: dict[str, Tokenizer]) -> None:
    for stop, words in (("", "empty"), ("\ud800", "surrogate")):
        with pytest.raises(InvalidRequest, match=words) as caught:
            tokenizers["llama3"].detokenizer(stop=[stop])
        assert caught.value.param == "stop"
