"""Thoughts between <think> and </think>, as DeepSeek R1 and Qwen 3 write them, or Mistral's [THINK] and [/THINK].

There is one section of thoughts. Its opening marker may stand in the prompt already, where the chat template writes it; what
stands before it is content; thoughts that never end are all thoughts. An end without a beginning is dropped.
"""

from __future__ import annotations

from server.parsers import lark
from server.parsers.base import Content, OutputParser, Reasoning, Vocabulary
from server.parsers.markers import Markers
from server.parsers.tape import Kind, Reading, Tape, TapeParser, read_to_marker


class ThinkFormat:
    name = "think"
    opening, closing = "<think>", "</think>"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.shows_special_tokens = self.opening in vocabulary.special
        self._dropped = vocabulary.special if self.shows_special_tokens else frozenset()

    def starts_open(self, prompt_text: str) -> bool:
        return prompt_text.rstrip().endswith(self.opening)

    def parser(self, *, is_open: bool, before_tools: bool = False) -> OutputParser:
        return TapeParser(lambda tape: self._read(tape, is_open, before_tools))

    def grammar(self, answer: str, *, is_open: bool, is_call: bool = False) -> str:
        first = "section" if is_open else f"({lark.marker(self._vocabulary, self.opening)} section)?"
        rules = f'start: {first} answer\nsection: thoughts LINE_BREAKS\nLINE_BREAKS: "\\n"{{0,2}}\n'
        thoughts = lark.text_to(self._vocabulary, "thoughts", self.closing)
        return rules + thoughts + lark.ANY_TEXT + lark.nested("answer", answer)

    def _read(self, tape: Tape, is_open: bool, before_tools: bool) -> Reading[None]:
        dropped = frozenset() if before_tools else self._dropped
        around = dropped.union((self.opening, self.closing))
        if not is_open and not (yield from self._read_to(tape, self.opening, around, Content)):
            return
        if (yield from tape.peek()) == self.opening[0]:
            yield from tape.take(self.opening)  # once more, after the template's
        if not (yield from self._read_to(tape, self.closing, self._dropped.union((self.closing,)), Reasoning)):
            return
        tape.pass_marker()
        yield from self._read_to(tape, None, dropped, Content)

    @staticmethod
    def _read_to(tape: Tape, marker: str | None, markers: frozenset[str], kind: Kind) -> Reading[bool]:
        """Text up to `marker`; False where the end comes first. The other markers are dropped."""
        known = Markers.of(markers)
        found = yield from read_to_marker(tape, known, kind)
        while found is not None and found != marker:
            found = yield from read_to_marker(tape, known, kind)
        return found is not None


class AlwaysThinkFormat(ThinkFormat):
    """For models that always think, where neither the chat template nor they are sure to write the opening marker."""

    name = "deepseek_r1"

    def starts_open(self, prompt_text: str) -> bool:
        return not prompt_text.rstrip().endswith(self.closing)


class MistralThinkFormat(ThinkFormat):
    name = "mistral"
    opening, closing = "[THINK]", "[/THINK]"
