"""Logprobs in OpenAI's two shapes: the completions endpoint's parallel lists, and chat's list of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.messages import TokenLogprobs
from engine.tokenizer import Detokenizer, Tokenizer

# JSON has no -Infinity; OpenAI writes this instead.
LOWEST_LOGPROB = -9999.0


class LegacyLogprobs(msgspec.Struct):
    """Parallel lists by token. text_offset counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def extend(self, other: LegacyLogprobs) -> LegacyLogprobs:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset
        return self


class LegacyLogprobsBuilder:
    """Makes the parts of one choice's lists as tokens come in; remembers how far the text has got.

    text: a detokenizer for the tokens to come. It says where each one's text begins, which its own length does not: a token may
    be part of a character, or not shown.
    """

    def __init__(self, tokenizer: Tokenizer, text: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._push = text.push
        self._offset = 0

    def build(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> LegacyLogprobs:
        """logprobs: parallel to token_ids; None for a prompt's first token, of which nothing was predicted."""
        part = LegacyLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            token = token_string(self._tokenizer, token_id)
            part.tokens.append(token)
            part.text_offset.append(self._offset)
            self._offset += len(self._push(token_id))
            if entry is None:
                part.token_logprobs.append(None)
                part.top_logprobs.append(None)
                continue
            part.token_logprobs.append(_finite(entry.logprob))
            best: dict[str, float] = {}
            # Of tokens that read the same the best one is listed: whoever looks for the maximum is to find it.
            for top_id, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
                best.setdefault(token_string(self._tokenizer, top_id), _finite(value))
            # The chosen token is always listed, so there may be one more than was asked for.
            best.setdefault(token, _finite(entry.logprob))
            part.top_logprobs.append(best)
        return part


class PromptLogprob(msgspec.Struct):
    """vLLM's shape. rank: 1 is the best."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""By prompt token, None for the first one: token id -> its logprob, of the given token and then of the best ones."""


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], num_top: int
) -> PromptLogprobs:
    """entries: parallel to token_ids, with at least `num_top` best tokens each."""
    result: PromptLogprobs = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            result.append(None)
            continue
        found = {token_id: PromptLogprob(_finite(entry.logprob), entry.rank, token_string(tokenizer, token_id))}
        best = zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False)
        for rank, (top_id, value) in enumerate(best, 1):
            found.setdefault(top_id, PromptLogprob(_finite(value), rank, token_string(tokenizer, top_id)))
        result.append(found)
    return result


def with_best(entries: Sequence[TokenLogprobs | None], num_top: int) -> list[TokenLogprobs | None]:
    """The entries with no more than `num_top` of the best tokens each."""
    return [
        entry and TokenLogprobs(entry.logprob, entry.rank, entry.top_token_ids[:num_top], entry.top_logprobs[:num_top])
        for entry in entries
    ]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """logprobs: parallel to token_ids."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        top = [
            TopLogprob(token_string(tokenizer, top_id), _finite(value), list(tokenizer.token_bytes(top_id)))
            for top_id, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        ]
        text, raw = token_string(tokenizer, token_id), list(tokenizer.token_bytes(token_id))
        content.append(ChatTokenLogprob(text, _finite(entry.logprob), raw, top))
    return ChatLogprobs(content)


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; `bytes:\\xe2\\x82`, as OpenAI writes it, for a token that is part of a character."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
