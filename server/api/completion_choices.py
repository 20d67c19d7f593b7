"""The choices of /v1/completions, made of what the engine sends: echo, logprobs, token ids; and the best of several."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.messages import TokenLogprobs
from engine.request_stream import ChoiceDelta
from engine.tokenizer import Tokenizer
from server.api.generation import Prompt
from server.api.logprobs import LegacyLogprobs, LegacyLogprobsBuilder, PromptLogprobs, prompt_logprobs, with_best


class CompletionChoice(msgspec.Struct, omit_defaults=True):
    """prompt_logprobs, prompt_token_ids and token_ids stand there only when asked for; streamed, the prompt's come first."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None

    @property
    def says_nothing(self) -> bool:
        of_prompt = self.prompt_token_ids or self.prompt_logprobs
        return not (self.text or self.finish_reason or self.logprobs or self.token_ids or of_prompt)

    def extend(self, later: CompletionChoice) -> None:
        """Take in what comes next of the choice, except for its text."""
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs.extend(later.logprobs)
        if self.token_ids is not None and later.token_ids is not None:
            self.token_ids += later.token_ids


class ChoiceBuilder:
    """Turns the engine's deltas into parts of choices. A choice's index counts prompts first: prompt × choices + choice.

    num_logprobs, num_prompt_logprobs: best tokens to list, None for no logprobs at all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        echo: bool,
        skip_special_tokens: bool,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        return_token_ids: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echo = echo
        self._skip_special_tokens = skip_special_tokens
        self._num_logprobs = num_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._return_token_ids = return_token_ids
        self._num_choices = prompts[0].sampling.n
        self._logprobs: dict[int, LegacyLogprobsBuilder | None] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}

    def index(self, prompt_index: int, delta: ChoiceDelta) -> int:
        return prompt_index * self._num_choices + delta.choice_index

    def part(self, prompt_index: int, delta: ChoiceDelta) -> CompletionChoice:
        """What a delta adds to its choice; to the first one of a choice belongs what is told of the prompt."""
        index = self.index(prompt_index, delta)
        choice = CompletionChoice(index, delta.text, None, delta.finish_reason, delta.stop_reason)
        if self._return_token_ids:
            choice.token_ids = [*delta.token_ids]
        if index not in self._logprobs:
            self._logprobs[index] = self._logprobs_builder(self._prompts[prompt_index])
            self._begin(choice, prompt_index, delta)
        builder = self._logprobs[index]
        if delta.logprobs is not None and builder is not None:
            own = builder.build(delta.token_ids, delta.logprobs)
            choice.logprobs = own if choice.logprobs is None else choice.logprobs.extend(own)
        return choice

    def _logprobs_builder(self, prompt: Prompt) -> LegacyLogprobsBuilder | None:
        if self._num_logprobs is None:
            return None
        before = () if self._echo else prompt.token_ids
        text = self._tokenizer.detokenizer(before, skip_special_tokens=self._skip_special_tokens)
        return LegacyLogprobsBuilder(self._tokenizer, text)

    def _begin(self, choice: CompletionChoice, prompt_index: int, delta: ChoiceDelta) -> None:
        """Adds what is told of the prompt to a choice's first part."""
        prompt = self._prompts[prompt_index]
        # The engine sends them once, with the first choice's first event; all choices show the same.
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = delta.prompt_logprobs
        entries = self._prompt_logprobs.get(prompt_index)
        if self._return_token_ids:
            choice.prompt_token_ids = prompt.token_ids
        if self._echo:
            choice.text = self._prompt_text(prompt) + choice.text
            builder = self._logprobs[choice.index]
            if entries is not None and self._num_logprobs is not None and builder is not None:
                choice.logprobs = builder.build(prompt.token_ids, with_best(entries, self._num_logprobs))
        if entries is not None and self._num_prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, prompt.token_ids, entries, self._num_prompt_logprobs)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._skip_special_tokens)


class WholeChoices:
    """Gathers the parts of every choice, and picks the best ones where more were generated than asked for."""

    def __init__(self, builder: ChoiceBuilder) -> None:
        self._builder = builder
        self._choices: dict[int, CompletionChoice] = {}
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[float]] = {}

    def add(self, prompt_index: int, delta: ChoiceDelta) -> None:
        part = self._builder.part(prompt_index, delta)
        self._texts.setdefault(part.index, []).append(part.text)
        self._logprobs.setdefault(part.index, []).extend(entry.logprob for entry in delta.logprobs or ())
        if part.index in self._choices:
            self._choices[part.index].extend(part)
        else:
            self._choices[part.index] = part

    def best(self, num_generated: int, num_wanted: int) -> list[CompletionChoice]:
        """Of each prompt's `num_generated` choices the `num_wanted` with the highest mean logprob, the best one first; in the
        order of generation where all are wanted."""
        ordered = [self._choices[index] for index in sorted(self._choices)]
        for choice in ordered:
            choice.text = "".join(self._texts[choice.index])
        if num_wanted == num_generated:
            return ordered
        chosen: list[CompletionChoice] = []
        for start in range(0, len(ordered), num_generated):
            own = sorted(ordered[start : start + num_generated], key=self._mean_logprob, reverse=True)
            chosen += own[:num_wanted]
        for index, choice in enumerate(chosen):
            choice.index = index
        return chosen

    def _mean_logprob(self, choice: CompletionChoice) -> float:
        logprobs = self._logprobs[choice.index]
        return sum(logprobs) / max(len(logprobs), 1)
