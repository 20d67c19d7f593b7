"""Structured output: what a choice may say next, given what it has said.

llguidance (https://github.com/guidance-ai/llguidance) reads the grammar and knows, after every token, which tokens may follow.
A grammar is compiled once and copied for every choice; the copy is the choice's matcher, and follows the tokens that the
scheduler takes. `MaskMaker` asks the matchers of a step for their masks, while the device is busy with that step.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequest, RequestFailed
from engine.request import TokenMatcher
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.step import HostMasks
from engine.tokenizer import Tokenizer

Words = npt.NDArray[np.int32]
"""A bit a token, 32 tokens a word, the lowest bit first."""

# These bound what a matcher may grow to, and the work for one mask: at half a second, where a grammar is very ambiguous. So
# a choice has a credit of processor time, too, which every token renews: far more than grammars that are in use take.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, step_max_items=20_000, verbose_errors=False)
_CREDIT_S = 0.25
_CREDIT_PER_TOKEN_S = 0.005
_MAX_REASON_CHARS = 160
_SPECIAL_MARK = b"\xff"  # no text begins with it; the library's own way to keep special tokens apart


class GrammarTokenizer:
    """llguidance's view of a model's tokens: the bytes that each adds to a text. Immutable, shared by all grammars.

    eos_token_ids: allowed where a grammar is complete. Tokens of the form <...>, and those that are special, are not text: a
    grammar must name them.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        size = min(vocab_size, tokenizer.vocab_size)
        self.eos_token_ids = frozenset(token_id for token_id in eos_token_ids if token_id < size)
        added = tokenizer.added_tokens
        markers = tokenizer.special_tokens | {text for text in added if re.fullmatch(r"<.+>", text)}
        tokens = _Tokens(tokenizer, size, [added[text] for text in markers], min(self.eos_token_ids, default=None))
        eos = sorted(self.eos_token_ids)
        self.library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=eos or None)
        tokens.library = self.library
        # Without an EOS token the library adds one of its own at the end.
        self.num_words = -(-self.library.vocab_size // 32)
        known = np.array([bool(data) for data in tokens.tokens[:size]])
        known[eos] = True
        self.known = self.pack(np.flatnonzero(known))
        self.eos = self.pack(eos)

    @classmethod
    def load(cls, folder: Path, *, vocab_size: int, eos_token_ids: Collection[int]) -> GrammarTokenizer:
        """Of a model's folder. Raises ModelLoadError."""
        return cls(Tokenizer.load(folder), vocab_size=vocab_size, eos_token_ids=eos_token_ids)

    def pack(self, token_ids: Sequence[int] | npt.NDArray[np.int64]) -> Words:
        """Tokens as bits."""
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[np.asarray(token_ids, dtype=np.int64)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def compile(self, spec: StructuredSpec) -> Grammar:
        """Takes long for large grammars, and lets other threads run meanwhile. Raises InvalidRequest."""
        try:
            matcher = llguidance.LLMatcher(self.library, _source(spec), log_level=0, limits=_LIMITS)
        except ValueError as error:  # what the library finds before it begins
            raise InvalidRequest(_refusal(spec, str(error))) from None
        matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(_refusal(spec, matcher.get_error()))
        return Grammar(self, spec, matcher)


class _Tokens:
    """A tokenizer in the form that TokenizerWrapper takes."""

    bos_token_id = None
    library: llguidance.LLTokenizer

    def __init__(self, tokenizer: Tokenizer, size: int, special_ids: list[int], eos_token_id: int | None) -> None:
        self._tokenizer = tokenizer
        special = frozenset(token_id for token_id in special_ids if token_id < size)
        marks = (_SPECIAL_MARK if token_id in special else b"" for token_id in range(size))
        self.tokens = [mark + tokenizer.token_bytes(token_id) for token_id, mark in enumerate(marks)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        """The tokens a model expects a text to have; the library asks where the grammar leaves no choice of text.

        Where the tokenizer puts a space before every text it is asked for what follows a line break instead.
        """
        wanted = text.encode()
        for first in ("", "\n"):
            ids = self._tokenizer.encode(first + text, add_special_tokens=False)
            while ids and b"".join(self.tokens[token_id] for token_id in ids if token_id < len(self.tokens)) != wanted:
                ids = ids[1:] if first else []
            if ids:
                return ids
        return list(self.library.greedy_tokenize(text))


class Grammar:
    """A compiled grammar, as it is before the first token."""

    def __init__(self, tokenizer: GrammarTokenizer, spec: StructuredSpec, matcher: llguidance.LLMatcher) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._matcher = matcher

    def start(self, sampling: SamplingParams) -> Matcher:
        """The matcher of a new choice."""
        state = _State(self._tokenizer, self._matcher.deep_copy(), ends_late=sampling.ignore_eos)
        return Matcher(state, _BadWords(sampling.bad_words))

    def try_out(self) -> None:
        """Do once what choices do with a grammar, and let go of it. Raises InvalidRequest where that is too much already."""
        copy = self._matcher.deep_copy()
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(copy.compute_bitmask(), dtype=np.uint8), bitorder="little"))
        copy.consume_token(int(allowed[0]))
        copy.compute_bitmask()
        if copy.is_error():
            raise InvalidRequest(_refusal(self._spec, copy.get_error()))


class _State:
    """Where a choice is in its grammar. ends_late: it goes on for as long as the grammar has anything to say."""

    def __init__(self, tokenizer: GrammarTokenizer, matcher: llguidance.LLMatcher, *, ends_late: bool) -> None:
        self.tokenizer = tokenizer
        self.matcher = matcher
        self._ends_late = ends_late
        self._credit_s = _CREDIT_S

    def accept(self, token_id: int) -> bool:
        started_s = time.thread_time()
        self.matcher.consume_token(token_id)
        self._credit_s = min(_CREDIT_S, self._credit_s + _CREDIT_PER_TOKEN_S) - (time.thread_time() - started_s)
        self.check()
        if self.matcher.is_stopped():
            return True
        # A model without an EOS token cannot say that it has finished.
        return not self.tokenizer.eos_token_ids and self.matcher.is_accepting() and not self._may_go_on()

    def fill(self, address: int, num_bytes: int) -> None:
        """Write the library's mask, of tokens and of ids that are none. `finish` and `check` are to follow."""
        started_s = time.thread_time()
        self.matcher.unsafe_compute_mask_ptr(address, num_bytes)
        self._credit_s -= time.thread_time() - started_s

    def _may_go_on(self) -> bool:
        words = np.frombuffer(self.matcher.deep_copy().compute_bitmask(), dtype=np.int32)
        return bool((words & self.tokenizer.known).any())

    def finish(self, words: Words) -> None:
        """Make what the library says what the sampler is told. Raises RequestFailed."""
        self.check()
        if self._ends_late and (words & ~self.tokenizer.eos).any():
            words &= ~self.tokenizer.eos

    def check(self) -> None:
        if self.matcher.is_error():
            raise RequestFailed(f"the answer's grammar cannot be followed further: {_reason(self.matcher.get_error())}")
        if self._credit_s < 0:
            raise RequestFailed("the answer's grammar cannot be followed further: it is too ambiguous, and takes too much time")


class _BadWords:
    """Words of several tokens: the last may not be sampled where the others stand before it in the output."""

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        self._by_token: dict[int, list[tuple[int, ...]]] = defaultdict(list)  # by the last but one
        for word in words:
            if len(word) > 1:
                self._by_token[word[-2]].append(word)
        longest = max((len(word) for words in self._by_token.values() for word in words), default=1)
        self._output: deque[int] = deque(maxlen=longest - 1)

    def accept(self, token_id: int) -> None:
        self._output.append(token_id)

    def banned(self) -> list[int]:
        if not self._output or self._output[-1] not in self._by_token:
            return []
        output = tuple(self._output)
        return [word[-1] for word in self._by_token[output[-1]] if output[1 - len(word) :] == word[:-1]]


class Matcher(TokenMatcher):
    """Follows the tokens of one choice."""

    def __init__(self, state: _State | None, bad_words: _BadWords) -> None:
        self.state = state
        self._bad_words = bad_words

    @classmethod
    def of_bad_words(cls, sampling: SamplingParams) -> Matcher:
        """For a choice whose text is free otherwise."""
        return cls(None, _BadWords(sampling.bad_words))

    def accept(self, token_id: int) -> bool:
        self._bad_words.accept(token_id)
        return self.state is not None and self.state.accept(token_id)

    def banned(self) -> list[int]:
        """Tokens that would complete a bad word."""
        return self._bad_words.banned()


@dataclass(slots=True)
class MaskedRows:
    """masks: None where no row is restricted in this step. errors: of rows whose grammar cannot go on, by row."""

    masks: HostMasks | None = None
    errors: dict[int, RequestFailed] = field(default_factory=dict)


class MaskMaker:
    """Makes the masks of a step. num_threads: that share its rows; with 1 it is the caller's."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, "masks") if num_threads > 1 else None

    def make(self, matchers: Mapping[int, Matcher]) -> MaskedRows:
        """By row of the step. Other threads run meanwhile, but no other may use these matchers."""
        result = MaskedRows()
        states = {row: matcher.state for row, matcher in matchers.items() if matcher.state is not None}
        allowed = self._allowed(states, result.errors)
        banned = {row: ids for row, matcher in matchers.items() if (ids := matcher.banned()) and row not in result.errors}
        if allowed or banned:
            result.masks = HostMasks(allowed, banned)
        return result

    def _allowed(self, states: Mapping[int, _State], errors: dict[int, RequestFailed]) -> dict[int, Words]:
        allowed: dict[int, Words] = {}
        if not states:
            return allowed
        tokenizer = next(iter(states.values())).tokenizer
        words = np.empty((len(states), tokenizer.num_words), dtype=np.int32)
        self._fill(list(states.values()), words)
        words &= tokenizer.known
        for (row, state), row_words in zip(states.items(), words, strict=True):
            try:
                state.finish(row_words)
                allowed[row] = row_words
            except RequestFailed as error:
                errors[row] = error
        return allowed

    def _fill(self, states: list[_State], words: Words) -> None:
        def fill(first: int) -> None:
            for index in range(first, len(states), step):
                states[index].fill(words[index].ctypes.data, words.shape[1] * words.itemsize)

        step = min(self._num_threads, len(states))
        if self._threads is not None and step > 1:
            list(self._threads.map(fill, range(step)))
        else:
            fill(0)

    def close(self) -> None:
        """End its threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _source(spec: StructuredSpec) -> str:
    """The library's own form of a grammar."""
    match spec.kind:
        case "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(spec.text)
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(spec.text)
        case "choice":
            # One terminal: as so many alternatives of a rule, each would cost in every step.
            words = " | ".join(json.dumps(word, ensure_ascii=False) for word in json.loads(spec.text))
            return llguidance.LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
    return llguidance.LLMatcher.grammar_from_lark(spec.text)


def _refusal(spec: StructuredSpec, error: str) -> str:
    names = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice", "lark": "grammar"}
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", error)
    where = f" (line {place[1]}, column {place[2]})" if place and spec.kind == "lark" else ""
    return f"the {names[spec.kind]} cannot be used: {_reason(error)}{where}"


def _reason(error: str) -> str:
    """The library's explanation, without what it quotes of the input."""
    if "NoExtensionBias" in error:
        return "nothing can satisfy it"
    line = next(iter(re.findall(r"(?m)^error: (.*)$", error)), error.partition("\n")[0])
    line = re.sub(r"^(?:at )?\d+\(\d+\): ", "", line).partition(";")[0]
    line = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|/(?:[^/\\\s]|\\.)+/", "...", line)
    return re.sub(r"[^ -~]", "?", line)[:_MAX_REASON_CHARS].strip()
