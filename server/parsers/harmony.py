"""gpt-oss: messages with a channel each; analysis is reasoning, a recipient makes a call, the rest is content.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

https://developers.openai.com/cookbook/articles/openai-harmony describes the format. The prompt ends in <|start|>assistant. A
turn holds one call. Tools that the models know besides functions (browser, python) are called by their full names.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from server.parsers import lark
from server.parsers.base import Content, FunctionTool, OutputParser, Reasoning, Vocabulary
from server.parsers.markers import Markers
from server.parsers.tape import Broken, Reading, Tape, TapeParser, read_attempt, read_to_marker

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_MARKERS = frozenset({_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN})
_MAX_MESSAGES = 16  # before the last one of a constrained turn
_RECIPIENT, _FUNCTIONS = "to=", "functions."


class HarmonyFormat:
    name = "harmony"
    shows_special_tokens = True
    splits_reasoning = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._markers = Markers(_MARKERS | vocabulary.special)

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        return TapeParser(lambda tape: _read_turn(tape, self._markers, with_calls=True))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return "start: call\n" + self._calls(tools)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str | None:
        """A turn of messages, the last of which may be a call. None where the tokenizer lacks the format's tokens."""
        if not _MARKERS - {_RETURN, _CALL} <= self._vocabulary.added_tokens.keys():
            return None
        channel, message, end, start = map(self._marker, (_CHANNEL, _MESSAGE, _END, _START))
        before = f'({channel} ("analysis" | "commentary") {message} ANY {end} {start} "assistant"){{0,{_MAX_MESSAGES}}}'
        return f'start: {before} ({channel} "final" {message} ANY | call)\n{lark.ANY_TEXT}' + self._calls(tools)

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _marker(self, text: str) -> str:
        return lark.marker(self._vocabulary, text)

    def _calls(self, tools: Sequence[FunctionTool]) -> str:
        channel, constrain, message = map(self._marker, (_CHANNEL, _CONSTRAIN, _MESSAGE))

        def write(tool: FunctionTool, arguments: str) -> str:
            header = lark.quoted(f"commentary {_RECIPIENT}{_FUNCTIONS}{tool.name} ")
            return f'{channel} {header} {constrain} "json" {message} {arguments}'

        return lark.calls(tools, write)


class HarmonyReasoningFormat:
    """Reasoning and content alone: a message to a tool is content."""

    name = "harmony"
    shows_special_tokens = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._markers = Markers(_MARKERS | vocabulary.special)

    def starts_open(self, prompt_text: str) -> bool:
        return prompt_text.endswith(f"{_CHANNEL}analysis{_MESSAGE}")

    def parser(self, *, is_open: bool, before_tools: bool = False) -> OutputParser:
        return TapeParser(lambda tape: _read_turn(tape, self._markers, with_calls=False, is_open=is_open))

    def grammar(self, answer: str, *, is_open: bool, is_call: bool = False) -> str:
        start, channel, message = (lark.marker(self._vocabulary, text) for text in (_START, _CHANNEL, _MESSAGE))
        thoughts = f'thoughts {start} "assistant"'
        analysis = thoughts if is_open else f'({channel} "analysis" {message} {thoughts})?'
        final = "" if is_call else f'{channel} "final" {message}'
        rules = f"start: {analysis} {final} answer\n" + lark.text_to(self._vocabulary, "thoughts", _END)
        return rules + lark.ANY_TEXT + lark.nested("answer", answer)


def _read_turn(tape: Tape, markers: Markers, *, with_calls: bool, is_open: bool = False) -> Reading[None]:
    if is_open:
        marker = yield from read_to_marker(tape, markers, Reasoning)
    else:
        marker = yield from _read_message(tape, markers, with_calls)
    while marker is not None:
        if marker in (_START, _CHANNEL):
            tape.position -= len(marker)
            marker = yield from _read_message(tape, markers, with_calls)
        else:
            marker = yield from read_to_marker(tape, markers)


def _read_message(tape: Tape, markers: Markers, with_calls: bool) -> Reading[str | None]:
    """One message from its header on; returns the marker that ends it. Text that is no header is content."""
    tape.attempt()
    try:
        channel, recipient = yield from _read_header(tape)
    except Broken:
        tape.end_attempt(is_broken=True)
        yield from tape.take(_START)
        yield from tape.take(_CHANNEL)
        return (yield from read_to_marker(tape, markers))
    tape.end_attempt(is_broken=False)
    kind = Reasoning if channel == "analysis" and not recipient else Content
    tape.begin_paragraph(kind)
    if recipient and with_calls:
        name = recipient.removeprefix(_FUNCTIONS)
        yield from read_attempt(tape, lambda tape: tape.read_arguments(name), "")
    return (yield from read_to_marker(tape, markers, kind))


def _read_header(tape: Tape) -> Reading[tuple[str, str]]:
    """Channel and recipient, each "" where not given. Raises Broken."""
    channel = ""
    if (yield from tape.peek()) == "<" and (yield from tape.take(_START)):
        yield from tape.peek()
        yield from tape.read_name()  # the role
    recipient = yield from _read_recipient(tape)
    if (yield from tape.peek()) == "<" and (yield from tape.take(_CHANNEL)):
        yield from tape.peek()
        channel = yield from tape.read_name()
        recipient = (yield from _read_recipient(tape)) or recipient
    if (yield from tape.peek()) == "<":
        yield from tape.take(_CONSTRAIN)
    if (yield from tape.peek()) != "<":
        yield from tape.read_name()  # the content's type
        yield from tape.peek()
    yield from tape.expect(_MESSAGE)
    return channel, recipient


def _read_recipient(tape: Tape) -> Reading[str]:
    if (yield from tape.peek()) != _RECIPIENT[0] or not (yield from tape.take(_RECIPIENT)):
        return ""
    return (yield from tape.read_name())
