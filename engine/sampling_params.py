"""SamplingParams: every knob of token selection, with its range. Values are checked here once, for every endpoint."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.errors import InvalidRequest

MAX_N = 128
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_BAD_WORDS = 1024


class StructuredSpec(msgspec.Struct, frozen=True):
    """What an answer must look like. text: of "json_schema" the schema, as JSON; of "choice" a JSON array of strings; of
    "regex" the expression; of "lark" a grammar in llguidance's form of Lark."""

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen.

    n: choices. seed: 64-bit; drawn by the frontend where the user gave none, so that a replay repeats it.
    max_tokens: tokens to generate per choice; 0 only computes the prompt. min_tokens: stop tokens are masked until then.
    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: probability mass and floor relative to the best token.
    typical_p: mass of the tokens whose surprise is closest to the expected one (locally typical sampling); 1 is off.
    repetition_penalty counts prompt and output, presence_penalty and frequency_penalty the output only.
    logit_bias: token id -> added to the logit. stop_token_ids end a choice; with `ignore_eos` the model's own do not.
    allowed_token_ids: nothing else is sampled. bad_words: sequences of token ids, of which the last one is not sampled where
    the others stand before it. structured: the grammar that every choice follows.
    logprobs: None is off, k returns the chosen token's logprob and the k best. prompt_logprobs: the same for the prompt.
    Logprobs are of the model's raw distribution, before penalties and temperature.
    """

    seed: int = 0
    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    structured: StructuredSpec | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_range("seed", self.seed, 0, MAX_SEED)
        self._check_range("n", self.n, 1, MAX_N)
        self._check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        self._check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._check_range("temperature", self.temperature, 0.0, 2.0)
        self._check_range("top_k", self.top_k, 0, 2**31 - 1)
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise InvalidRequest(f"{name} must be above 0 and at most 1, got {value}", param=name)
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._check_range(name, value, 0, MAX_LOGPROBS)
        for token_id, bias in self.logit_bias.items():
            self._check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must name at least one token", param="allowed_token_ids")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequest(
                f"bad_words may hold at most {MAX_BAD_WORDS} sequences, got {len(self.bad_words)}", param="bad_words"
            )
        if not all(self.bad_words):
            raise InvalidRequest("bad_words may not hold an empty word", param="bad_words")

    @staticmethod
    def _check_range(param: str, value: float, low: float, high: float) -> None:
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidRequest(f"{param} must be between {low} and {high}, got {value}", param=param)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_matcher(self) -> bool:
        """Whether the allowed tokens depend on the tokens before, so that the host must know those before it can sample."""
        return self.structured is not None or any(len(word) > 1 for word in self.bad_words)

    def token_ids(self) -> dict[str, list[int]]:
        """Every token id the caller named, by parameter, for checking against the vocabulary."""
        return {
            "logit_bias": list(self.logit_bias),
            "stop_token_ids": list(self.stop_token_ids),
            "allowed_token_ids": list(self.allowed_token_ids or ()),
            "bad_words": [token_id for word in self.bad_words for token_id in word],
        }


def choice_seed(seed: int, choice_index: int) -> int:
    """The 64-bit seed of one of `n` choices: splitmix64 (Steele et al., OOPSLA 2014) of the request's seed and the index."""
    z = (seed + (choice_index + 1) * 0x9E3779B97F4A7C15) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return z ^ (z >> 31)
