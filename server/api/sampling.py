"""What completions and chat have in common in a request: the sampling fields, and how they become SamplingParams."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema, field_validator

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.messages import EngineReady
from engine.sampling_params import MAX_SEED, SamplingParams
from server.api.body import RequestBody, json_type, without_nulls

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024

# Bounds that every engine integer fits in; the meaningful ranges are SamplingParams' own.
Integer = Annotated[int, Field(ge=-(2**63), le=MAX_SEED)]
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
    include_usage: bool = False


class GenerationRequest(RequestBody):
    """Fields of both endpoints. A default here only says what a field means when the model has no default of its own."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "logits_processors": ([],),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
        "prompt_logprobs": (),
        "prompt_embeds": (),
        "use_beam_search": (False,),
        "truncate_prompt_tokens": (),
    }

    model: str | None = None
    n: Integer = 1
    max_tokens: Integer | None = None
    min_tokens: Integer = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    seed: Integer | None = None
    stop: StopStrings = ()
    stop_token_ids: list[Integer] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = Field(default="", max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    @field_validator("stream_options", mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return without_nulls(value) if isinstance(value, dict) else value

    @property
    def include_usage(self) -> bool:
        """Raises InvalidRequest when `stream_options` comes without `stream`."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidRequest("stream_options is allowed only with stream: true.", param="stream_options")
        return self.stream_options.include_usage

    def stop_strings(self) -> list[str]:
        """`stop` as a list. Raises InvalidRequest."""
        given = [self.stop] if isinstance(self.stop, str) else list(self.stop) if isinstance(self.stop, list | tuple) else None
        if given is None:
            raise InvalidRequest(f"stop must be a string or an array of strings, got {json_type(self.stop)}.", param="stop")
        if len(given) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(given)}.", param="stop")
        for index, item in enumerate(given):
            if not isinstance(item, str) or not item:
                got = "an empty one" if item == "" else json_type(item)
                raise InvalidRequest(f"stop[{index}] must be a string that is not empty, got {got}.", param="stop")
        return given

    def sampling_params(
        self, ready: EngineReady, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Each field from the request, else from the model's generation config, else OpenAI's. Raises InvalidRequest."""
        chosen = self._with_model_defaults(ready.generation_defaults)
        sampling = SamplingParams(
            seed=secrets.randbits(64) if self.seed is None else self.seed & MAX_SEED,
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logit_bias=self._parse_logit_bias(),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **chosen,
        )
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            check_vocabulary(list(ids), ready.vocab_size, name)
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
        return {int(key): bias for key, bias in self.logit_bias.items()}


def check_vocabulary(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for an id that the model has no token for."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{param} holds token id {wrong}; ids are 0 to {vocab_size - 1}.", param=param)


def output_limit(num_prompt_tokens: int, asked: int | None, default: int | None, ready: EngineReady, param: str) -> int:
    """Tokens to generate: what was asked for, else `default` or all that is left of the context, whichever is less.

    Raises ContextLengthExceeded with the context, the prompt and the tokens asked for; InvalidRequest for a negative number.
    """
    context = ready.max_model_len
    left = context - num_prompt_tokens
    if asked is not None and asked < 0:
        raise InvalidRequest(f"{param} must be at least 0, got {asked}.", param=param)
    if asked is None and left >= 1:
        return left if default is None else min(default, left)
    if asked is None or asked > left:
        wanted = "at least 1 token" if asked is None else f"{asked} tokens"
        raise ContextLengthExceeded(
            f"The model's context is {context} tokens, but the prompt has {num_prompt_tokens} tokens and {wanted} of output "
            f"were asked for, {num_prompt_tokens + (asked or 1)} in all. Shorten the prompt or lower {param}.",
            param=param,
        )
    return asked
