"""What completions, chat and responses have in common in a request: the sampling fields, and how they become SamplingParams."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.messages import EngineReady
from engine.sampling_params import MAX_BAD_WORDS, MAX_LOGPROBS, MAX_SEED, SamplingParams, StructuredSpec
from engine.tokenizer import Tokenizer
from server.api.body import RequestBody, WrongType, json_type
from server.api.structured import StructuredFields
from server.api.time_limits import TimeLimits

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
DRAWN_SEED_BITS = 53

# Bounds that every engine integer fits in; the meaningful ranges are SamplingParams' own.
Integer = Annotated[int, Field(ge=-(2**63), le=MAX_SEED)]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]

# OpenAI's names and vLLM's, in their order of the ladder below.
_WITH_MODEL_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class StreamOptions(RequestBody):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the whole request's usage so far in every chunk."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingRequest(TimeLimits):
    """How tokens are chosen and shown: what every endpoint that generates takes. A default here only says what a field means
    when the model has no default of its own."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        # vLLM's
        "kv_transfer_params": (),
        "length_penalty": (1, 1.0),
        "logits_processors": ([],),
        "prompt_embeds": (),
        "return_tokens_as_token_ids": (False,),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        # llama.cpp's
        "dry_multiplier": (0, 0.0),
        "dynatemp_range": (0, 0.0),
        "grammar": ("",),
        "json_schema": (),
        "lora": ([],),
        "mirostat": (0,),
        "n_predict": (),
        "n_probs": (0,),
        "repeat_penalty": (1, 1.0),
        "samplers": (),
        "timings_per_token": (False,),
        "top_n_sigma": (-1, -1.0),
        "xtc_probability": (0, 0.0),
    }
    INSTEAD: ClassVar[dict[str, str]] = {
        "grammar": "structured_outputs.grammar",
        "json_schema": "response_format",
        "n_predict": "max_tokens",
        "n_probs": "logprobs",
        "repeat_penalty": "repetition_penalty",
        "return_tokens_as_token_ids": "return_token_ids",
        "timings_per_token": "explain",
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {
            "cache_prompt",
            "id_slot",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    model: str | None = None
    min_tokens: Integer = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    allowed_token_ids: list[Integer] | None = None
    bad_words: list[BadWord] = Field(default=[], max_length=MAX_BAD_WORDS // 2)
    seed: Integer | None = None
    stop: StopStrings = ()
    stop_token_ids: list[Integer] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = False
    truncate_prompt_tokens: Integer | None = None
    priority: Priority = 0
    cache_salt: str = Field(default="", max_length=256)
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    explain: bool = False
    stream: bool = False

    def stop_strings(self) -> list[str]:
        """`stop` as a list. Raises InvalidRequest."""
        given = [self.stop] if isinstance(self.stop, str) else list(self.stop) if isinstance(self.stop, list | tuple) else None
        if given is None:
            raise WrongType(f"stop must be a string or an array of strings, got {json_type(self.stop)}.", param="stop")
        if len(given) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(given)}.", param="stop")
        for index, item in enumerate(given):
            if not isinstance(item, str) or not item:
                got = "an empty one" if item == "" else json_type(item)
                raise InvalidRequest(f"stop[{index}] must be a string that is not empty, got {got}.", param="stop")
        return given

    def structured_field(self) -> str | None:
        """The field that says what the answer must look like; None where none does."""
        return None

    def draw_seed(self) -> int:
        """The seed given, else a random one; that has no more bits than a JavaScript client can read and send back."""
        return secrets.randbits(DRAWN_SEED_BITS) if self.seed is None else self.seed & MAX_SEED

    def sampling_params(
        self,
        ready: EngineReady,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        structured: StructuredSpec | None = None,
    ) -> SamplingParams:
        """Each field from the request, else from the model's generation config, else OpenAI's. Raises InvalidRequest."""
        chosen = self._with_model_defaults(ready.generation_defaults)
        sampling = SamplingParams(
            seed=self.draw_seed(),
            n=n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            typical_p=self.typical_p,
            logit_bias=self._parse_logit_bias(),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(_bad_word_ids(self.bad_words, tokenizer)),
            structured=structured,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **chosen,
        )
        for name, ids in sampling.token_ids().items():
            check_vocabulary(ids, ready.vocab_size, name)
        return sampling

    def _with_model_defaults(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for name, fallback in _WITH_MODEL_DEFAULTS.items():
            default = defaults.get(name)
            chosen[name] = getattr(self, name) if name in self.model_fields_set else fallback if default is None else default
        if chosen["top_k"] == -1:  # vLLM's way to say off
            chosen["top_k"] = 0
        return chosen

    def _parse_logit_bias(self) -> dict[int, float]:
        for key in self.logit_bias:
            if not re.fullmatch(r"[0-9]{1,10}", key):
                raise InvalidRequest("logit_bias must map token ids, as decimal strings, to numbers.", param="logit_bias")
        biases = {int(key): bias for key, bias in self.logit_bias.items()}
        if len(biases) < len(self.logit_bias):
            raise InvalidRequest("logit_bias names a token id twice, once with zeros before it.", param="logit_bias")
        return biases


class GenerationRequest(StructuredFields, SamplingRequest):
    """What completions and chat take beyond that."""

    n: Integer = 1
    max_tokens: Integer | None = None
    prompt_logprobs: Integer | None = None
    return_token_ids: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage. Raises InvalidRequest when `stream_options` comes without `stream`."""
        if self.stream_options is None:
            return self.explain
        if not self.stream:
            raise InvalidRequest("stream_options is allowed only with stream: true.", param="stream_options")
        return self.stream_options.include_usage or self.explain

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def answer_id(prefix: str, request_id: str | None) -> str:
    """`<prefix>-<the id given, or a random one>`."""
    return f"{prefix}-{request_id or secrets.token_hex(12)}"


def check_logprobs(value: int | None, param: str) -> None:
    """Raises InvalidRequest for a number of logprobs that the engine does not give."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(f"{param} must be between 0 and {MAX_LOGPROBS}, got {value}.", param=param)


def _bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Every way to write each word: at the beginning of a text and after a space, which are other tokens.

    What ends in a token that is itself a bad word needs no mention.
    """
    texts = dict.fromkeys(text for word in words for text in (word, f" {word.lstrip()}" if word.strip() else word))
    sequences = dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    single = {ids[0] for ids in sequences if len(ids) == 1}
    return [ids for ids in sequences if len(ids) == 1 or ids[-1] not in single]


def check_vocabulary(token_ids: list[int], vocab_size: int, param: str, hint: str = "") -> None:
    """Raises InvalidRequest for an id that the model has no token for. hint: what the message ends with."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        message = f"{param} holds token id {wrong}; ids are 0 to {vocab_size - 1}."
        raise InvalidRequest(f"{message} {hint}".rstrip(), param=param)


def truncate_prompt(
    token_ids: list[int], keep: int | None, asked: int | None, default: int | None, ready: EngineReady
) -> list[int]:
    """The last `keep` tokens; with -1 as many as leave room for the output asked for. Raises InvalidRequest.

    asked, default: as for `output_limit`.
    """
    if keep is None:
        return token_ids
    if keep == -1:
        wanted = asked if asked is not None else default or 1
        keep = max(1, ready.max_model_len - max(wanted, 0))
    elif keep < 1:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be at least 1, or -1 for as many as fit, got {keep}.", param="truncate_prompt_tokens"
        )
    return token_ids[-keep:]


def output_limit(
    num_prompt_tokens: int, asked: int | None, default: int | None, ready: EngineReady, param: str, prompt_param: str
) -> int:
    """Tokens to generate: what was asked for, else `default` or all that is left of the context, whichever is less.

    param, prompt_param: the fields that the limit and the prompt come from.

    Raises ContextLengthExceeded with the context, the prompt and the tokens asked for; InvalidRequest for a negative number.
    """
    context = ready.max_model_len
    left = context - num_prompt_tokens
    if asked is not None and asked < 0:
        raise InvalidRequest(f"{param} must be at least 0, got {asked}.", param=param)
    # Clients know a full context by these words: "maximum context length is" and "prompt is too long".
    if left < (0 if asked == 0 else 1):
        raise ContextLengthExceeded(
            f"The prompt is too long: this model's maximum context length is {context} tokens, and the prompt has "
            f"{num_prompt_tokens}. Shorten the prompt.",
            param=prompt_param,
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens, but the prompt has {num_prompt_tokens} tokens and "
            f"{asked} of output were asked for, {num_prompt_tokens + asked} in all. Shorten the prompt or lower {param}.",
            param=param,
        )
    return asked
