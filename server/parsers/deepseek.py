"""DeepSeek V3, R1 and V3.1: calls between tokens of their own.

V3 and R1 write `function`, a separator, the name and the arguments in a fenced block; V3.1 writes the name, the separator and
the arguments. The models' chat templates show both. One parser reads both; the two formats differ in what they force.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.tape import Broken, Reading, Tape, TapeParser, read_calls


def _token(words: str) -> str:
    """The tokens are written with a full-width bar and a lower block for a space."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


_CALLS, _CALLS_END = _token("tool calls begin"), _token("tool calls end")
_CALL, _SEPARATOR, _CALL_END = _token("tool call begin"), _token("tool sep"), _token("tool call end")
_MARKERS = frozenset({_CALLS, _CALLS_END, _CALL, _SEPARATOR, _CALL_END})
_KIND, _FENCE, _FENCE_END = "function", "```json", "```"


class DeepSeekV3Format:
    name = "deepseek_v3"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.shows_special_tokens = _CALL in vocabulary.special
        self._dropped = vocabulary.special | _MARKERS

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        return TapeParser(lambda tape: read_calls(tape, {_CALL: _read_call}, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return f"start: {self._marker(_CALLS)} body\n" + self._rules(tools, parallel=parallel)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        rules = self._rules(tools, parallel=parallel)
        return lark.free_text(self._vocabulary, _CALLS, "body", parallel=False, never=_CALL) + rules

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _marker(self, text: str) -> str:
        return lark.marker(self._vocabulary, text)

    def _rules(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        call = f"{self._marker(_CALL)} call {self._marker(_CALL_END)}"
        calls = lark.several(call, f"{self._between()} {call}", parallel=parallel)
        return f"body: {calls} {self._marker(_CALLS_END)}\n" + lark.calls(tools, self._write_call)

    def _between(self) -> str:
        return r'"\n"'

    def _write_call(self, tool: FunctionTool, arguments: str) -> str:
        name, end = lark.quoted(f"{tool.name}\n{_FENCE}\n"), lark.quoted(f"\n{_FENCE_END}")
        return f"{lark.quoted(_KIND)} {self._marker(_SEPARATOR)} {name} {arguments} {end}"


class DeepSeekV31Format(DeepSeekV3Format):
    name = "deepseek_v31"

    def _between(self) -> str:
        return ""

    def _write_call(self, tool: FunctionTool, arguments: str) -> str:
        return f"{lark.quoted(tool.name)} {self._marker(_SEPARATOR)} {arguments}"


def _read_call(tape: Tape) -> Reading[None]:
    name = yield from tape.read_name()
    yield from tape.expect(_SEPARATOR)
    first = yield from tape.peek()
    if first != "{":
        if name != _KIND:
            raise Broken
        name = yield from tape.read_name()
        yield from _skip_fence(tape, _FENCE)
    yield from tape.read_arguments(name)
    yield from _skip_fence(tape, _FENCE_END)


def _skip_fence(tape: Tape, fence: str) -> Reading[None]:
    if (yield from tape.peek()) == fence[0]:
        yield from tape.expect(fence)
