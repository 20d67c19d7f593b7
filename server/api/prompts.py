"""The prompts of a completion request, in their four forms, as token ids; and fill-in-the-middle for those with a suffix."""

from __future__ import annotations

from typing import NamedTuple

from engine.errors import InvalidRequest
from engine.messages import EngineReady
from engine.tokenizer import Tokenizer
from server.api.body import WrongType, json_type
from server.api.sampling import check_vocabulary
from server.api.text_threads import in_thread_if_long

MAX_PROMPTS = 2048
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class PromptTokens(NamedTuple):
    """text is None where the caller gave token ids."""

    token_ids: list[int]
    text: str | None


class FillInTheMiddle(NamedTuple):
    """How a family of models writes a gap: marks by their names in the vocabulary. middle: None where the prefix comes last."""

    prefix: str
    suffix: str
    middle: str | None


FILL_IN_THE_MIDDLE = (
    FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    FillInTheMiddle("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, Stable Code
    FillInTheMiddle("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillInTheMiddle("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    FillInTheMiddle("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
    FillInTheMiddle("[PREFIX]", "[SUFFIX]", None),  # Codestral
)


async def read_prompts(
    given: object,
    tokenizer: Tokenizer,
    ready: EngineReady,
    *,
    add_special_tokens: bool,
    suffix: str = "",
    may_be_empty: bool = False,
    param: str = "prompt",
    hint: str = "",
) -> list[PromptTokens]:
    """Every prompt of the field `param`. A text that is long in all is tokenized in a thread. Raises InvalidRequest.

    may_be_empty: an empty text will do where the tokenizer begins each with a token of its own. hint: what is added to the
    error about ids outside the vocabulary.
    """
    single = isinstance(given, str) or (isinstance(given, list) and bool(given) and not isinstance(given[0], str | list))
    prompts = [given] if single else given
    if not isinstance(prompts, list) or not prompts:
        refusal, got = (InvalidRequest, "an empty array") if prompts == [] else (WrongType, json_type(given))
        raise refusal(f"{param} must be a string, token ids, or an array of either, got {got}.", param=param)
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"{param} may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}.", param=param)
    names = [param] if single else [f"{param}[{index}]" for index in range(len(prompts))]
    for prompt, name in zip(prompts, names, strict=True):
        _check_prompt(prompt, name, param, first=prompts[0], suffix=suffix, may_be_empty=may_be_empty)

    def encode(text: str) -> list[int]:
        if suffix:
            return _fill_in_the_middle(tokenizer, text, suffix, add_special_tokens=add_special_tokens)
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    if isinstance(prompts[0], str):
        num_chars = sum(len(prompt) + len(suffix) for prompt in prompts)
        encoded = await in_thread_if_long(num_chars, lambda: [PromptTokens(encode(text), text) for text in prompts])
    else:
        encoded = [PromptTokens(token_ids, None) for token_ids in prompts]
    for tokens, name in zip(encoded, names, strict=True):
        if not tokens.token_ids:
            raise InvalidRequest(f"{name} is empty; give at least one token.", param=param, code="empty_prompt")
        check_vocabulary(tokens.token_ids, ready.vocab_size, param, hint)
    return encoded


def _check_prompt(prompt: object, name: str, param: str, *, first: object, suffix: str, may_be_empty: bool) -> None:
    if type(prompt) is not type(first):
        raise WrongType(f"{name} is {json_type(prompt)}, {param}[0] {json_type(first)}: use one.", param=param)
    if isinstance(prompt, str):
        if not (prompt or suffix or may_be_empty):
            raise InvalidRequest(f"{name} is empty; give at least one token.", param=param, code="empty_prompt")
        return
    if not isinstance(prompt, list):
        raise WrongType(f"{name} must be a string or an array of token ids, got {json_type(prompt)}.", param=param)
    if suffix:
        raise InvalidRequest("suffix needs the prompt as text, got token ids.", param="suffix")
    wrong = next((json_type(item) for item in prompt if type(item) is not int), None)
    if wrong is not None:
        raise WrongType(f"{name} must hold integers only, got {wrong} among them.", param=param)


def _fill_in_the_middle(tokenizer: Tokenizer, prefix: str, suffix: str, *, add_special_tokens: bool) -> list[int]:
    """The ids that ask for what stands between the two. Raises InvalidRequest where the model has no marks for that."""
    form, marks = _marks(tokenizer)
    before = tokenizer.encode(prefix, add_special_tokens=False) if prefix else []
    after = tokenizer.encode(suffix, add_special_tokens=False)
    begin: list[int] = []
    if add_special_tokens:
        # What the tokenizer puts in front of a text goes in front of the first mark.
        begin = tokenizer.encode(suffix, add_special_tokens=True)
        begin = begin[: len(begin) - len(after)] if begin[-len(after) :] == after else []
    if form.middle is None:
        return [*begin, marks[1], *after, marks[0], *before]
    return [*begin, marks[0], *before, marks[1], *after, marks[2]]


def _marks(tokenizer: Tokenizer) -> tuple[FillInTheMiddle, list[int]]:
    for form in FILL_IN_THE_MIDDLE:
        ids = [tokenizer.token_id(mark) for mark in form if mark is not None]
        found = [token_id for token_id in ids if token_id is not None]
        if len(found) == len(ids):
            return form, found
    raise InvalidRequest(
        "suffix is not possible with this model: its tokenizer has no tokens for filling in the middle.",
        param="suffix",
        code="unsupported_parameter",
    )
