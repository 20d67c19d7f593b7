"""Hermes 2 Pro and later, Qwen 2.5 and 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, each call in its own tags.

https://github.com/NousResearch/Hermes-Function-Calling describes the format. It is also the one in which tools are described
to a model whose chat template knows none.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.json_call import read_json_call
from server.parsers.tape import Reading, Tape, TapeParser, read_calls

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

_TOOL_BLOCK = """\
You may call one or more functions to help with the user's request. The functions are given in <tools></tools>, one a line:
<tools>
{tools}
</tools>

To call a function, answer with a JSON object of its name and its arguments in <tool_call></tool_call>, one for each call:
<tool_call>
{{"name": <function's name>, "arguments": <object of arguments>}}
</tool_call>"""


class HermesFormat:
    name = "hermes"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.shows_special_tokens = _OPEN in vocabulary.special
        self._dropped = vocabulary.special if self.shows_special_tokens else frozenset()

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        return TapeParser(lambda tape: read_calls(tape, {_OPEN: _read_call}, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        opening = lark.marker(self._vocabulary, _OPEN)
        return f"start: {lark.several('tagged', 'NEWLINE tagged', parallel=parallel)}\ntagged: {opening} body\n" + self._rules(
            tools
        )

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return lark.free_text(self._vocabulary, _OPEN, "body", parallel=parallel) + self._rules(tools)

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _rules(self, tools: Sequence[FunctionTool]) -> str:
        body = f'body: NEWLINE call NEWLINE {lark.marker(self._vocabulary, _CLOSE)}\nNEWLINE: "\\n"\n'
        return body + lark.calls(tools, write_json_call)


def write_json_call(tool: FunctionTool, arguments: str) -> str:
    """A call as a JSON object, in Lark."""
    opening = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
    return f'{lark.quoted(opening)} {arguments} "}}"'


def default_tool_block(tools: Sequence[FunctionTool]) -> str:
    """The system text that describes the tools where the chat template does not."""
    lines = [json.dumps({"type": "function", "function": _described(tool)}, ensure_ascii=False) for tool in tools]
    return _TOOL_BLOCK.format(tools="\n".join(lines))


def _described(tool: FunctionTool) -> dict[str, object]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _read_call(tape: Tape) -> Reading[None]:
    yield from read_json_call(tape)
    if (yield from tape.peek()):
        yield from tape.take_or_rest(_CLOSE)
