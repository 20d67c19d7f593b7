"""What models say in each tool format, and what it means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from server.parsers.base import CallArguments, CallStart, Content, FunctionTool, OutputParser, Part, Reasoning


def deepseek_token(words: str) -> str:
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


BEGIN, END = deepseek_token("tool calls begin"), deepseek_token("tool calls end")
CALL, SEP, CALL_END = deepseek_token("tool call begin"), deepseek_token("tool sep"), deepseek_token("tool call end")

# The special tokens of each family, and with them an end that a model may say in the wrong place.
STRAY = "<|stray|>"
SPECIAL_TOKENS = {
    "hermes": [],
    "llama3_json": ["<|python_tag|>", STRAY],
    "mistral": ["[TOOL_CALLS]", STRAY],
    "mistral_args": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", STRAY],
    "deepseek_v3": [],
    "deepseek_v31": [BEGIN, END, CALL, SEP, CALL_END, STRAY],
    "qwen3_coder": [],
    "pythonic": [],
    "harmony": ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>", STRAY],
}
# Added tokens that are shown also where special tokens are not.
ADDED_TOKENS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "deepseek_v3": [BEGIN, END, CALL, SEP, CALL_END],
    "qwen3_coder": ["<tool_call>", "</tool_call>"],
}

TOOLS = [
    FunctionTool(
        "weather",
        "The weather of a city.",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
                "near": {"type": ["string", "null"]},
                "at": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
        },
    ),
    FunctionTool("now"),
]


class ParsedCall(msgspec.Struct):
    name: str
    arguments: str = ""


class ParsedMessage(msgspec.Struct):
    """The parts of a message, joined."""

    content: str
    reasoning: str
    calls: list[ParsedCall]

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, name):
                    self.calls.append(ParsedCall(name))
                case CallArguments(_, text):
                    self.calls[-1].arguments += text


class Sample(NamedTuple):
    format: str
    text: str
    content: str
    calls: list[tuple[str, str]]
    reasoning: str = ""

    @property
    def message(self) -> ParsedMessage:
        return ParsedMessage(self.content, self.reasoning, [ParsedCall(*call) for call in self.calls])


def parse(parser: OutputParser, pieces: Iterable[str]) -> ParsedMessage:
    message = ParsedMessage("", "", [])
    for piece in pieces:
        message.add(parser.push(piece))
    message.add(parser.finish())
    return message


PARIS = '{"city": "Paris", "days": 2}'
# Every kind of escape, brackets in strings, nesting, space.
HARD = r'{"city": "a\"}]\\\/\u00e9 </tool_call", "at": [ -1.5e+3,0 , 2], "x": {"y": [{}, null, true]}, "é": "日本 🙂"}'

_HERMES = {
    "one call": ('<tool_call>\n{"name": "weather", "arguments": ' + PARIS + "}\n</tool_call>", "", [("weather", PARIS)]),
    "text before, between and after": (
        'Let me see.\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call> And\n'
        '<tool_call>{"name": "weather", "arguments": ' + HARD + "}</tool_call>\nDone. ",
        "Let me see.\n\nAnd\nDone. ",
        [("now", "{}"), ("weather", HARD)],
    ),
    "arguments first": (
        '<tool_call>{"arguments": ' + HARD + ', "type": "function", "name": "weather", "id": [1]}</tool_call>',
        "",
        [("weather", HARD)],
    ),
    "no arguments": ('<tool_call>\n{ "name" : "now" }\n</tool_call>', "", [("now", "{}")]),
    "parameters": ('<tool_call>{"name": "now", "parameters": {"a":1}}</tool_call>', "", [("now", '{"a":1}')]),
    "unknown function": ('<tool_call>{"name": "what?", "arguments": {}}</tool_call>', "", [("what?", "{}")]),
    "no closing tag": ('<tool_call>{"name": "now", "arguments": {}}\n', "", [("now", "{}")]),
    "no closing tag between": (
        '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "now", "arguments": {"a": 1}}',
        "",
        [("now", "{}"), ("now", '{"a": 1}')],
    ),
    "line break in a string": (
        '<tool_call>{"name": "now", "arguments": {"a": "1\n2\x01"}}',
        "",
        [("now", r'{"a": "1\n2\u0001"}')],
    ),
    "broken before the name": ('<tool_call>{"nome": "now"} x</tool_call>', '<tool_call>{"nome": "now"} x</tool_call>', []),
    "broken, then a call": (
        '<tool_call>oh <tool_call>{"name": "now"}</tool_call>',
        "<tool_call>oh",
        [("now", "{}")],
    ),
    "broken in the arguments": (
        '<tool_call>{"name": "now", "arguments": {"a": 1, oops}}</tool_call>',
        "oops}}</tool_call>",
        [("now", '{"a": 1, ')],
    ),
    "arguments that are no object": (
        '<tool_call>{"name": "now", "arguments": "a"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "a"}</tool_call>',
        [],
    ),
    "name that is no text": ('<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    "name that cannot be sent": ('<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
    "cut in the tag": ("Hm <tool_ca", "Hm <tool_ca", []),
    "cut before the name": ('Hm <tool_call>\n{"name": "no', 'Hm <tool_call>\n{"name": "no', []),
    "cut in the arguments": ('<tool_call>{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')]),
    "cut in the end tag": ('<tool_call>{"name": "now"}\n</tool_ca', "", [("now", "{}")]),
    "an end tag that is none": ('<tool_call>{"name": "now"}</tool_cat>', "</tool_cat>", [("now", "{}")]),
    "no call": ("a < b <tool> {} \n", "a < b <tool> {} \n", []),
    "nothing": ("", "", []),
    "space": (" \n", " \n", []),
}
_LLAMA = {
    "one call": ('{"name": "weather", "parameters": ' + PARIS + "}", "", [("weather", PARIS)]),
    "tag": ('<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', "", [("now", "{}")]),
    "several": (
        '\n{"name": "now", "parameters": {}}; {"name": "weather", "parameters": ' + HARD + '};<|python_tag|>{"name": "now"}',
        "",
        [("now", "{}"), ("weather", HARD), ("now", "{}")],
    ),
    "a line each": (
        '{"name": "now", "parameters": {}}\n{"name": "now", "parameters": {"a": 1}}',
        "",
        [("now", "{}"), ("now", '{"a": 1}')],
    ),
    "text before, between and after": (
        'I call:\n  {"name": "now", "parameters": {}} and <|python_tag|>{"name": "now", "arguments": {}}.\nSo.',
        "I call:\n  and .\nSo.",
        [("now", "{}"), ("now", "{}")],
    ),
    "in the middle of a line": ('see {"name": "now", "parameters": {}}', 'see {"name": "now", "parameters": {}}', []),
    "other JSON": ('{"city": {"name": "now", "parameters": 1}}', '{"city": {"name": "now", "parameters": 1}}', []),
    "no parameters": ('{"name": "Bob"} is it', '{"name": "Bob"} is it', []),
    "code": ('<|python_tag|>print("now")', 'print("now")', []),
    "separator, then text": ('{"name": "now", "parameters": {}}; and', "; and", [("now", "{}")]),
    "separator, then no call": ('{"name": "now", "parameters": {}}; {"a": 1}', '; {"a": 1}', [("now", "{}")]),
    "broken": ('{"name": "now", "parameters": {"a": tru }}', "}}", [("now", '{"a": tru')]),
    "stray token": (f'a{STRAY}b\n{{"name": "now", "parameters": {{}}}}{STRAY}', "ab", [("now", "{}")]),
    "cut": ('{"name": "now", "para', '{"name": "now", "para', []),
}
_MISTRAL_LIST = {
    "list": (
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "weather", "arguments": ' + HARD + ', "id": "abc"}]',
        "",
        [("now", "{}"), ("weather", HARD)],
    ),
    "text before and after": (
        'Well.\n[TOOL_CALLS][{"name": "weather", "arguments": ' + PARIS + "}] \nSo [1]",
        "Well.\nSo [1]",
        [("weather", PARIS)],
    ),
    "one object": ('[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [("now", "{}")]),
    "second is broken": (
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"nome": 1}]',
        ', {"nome": 1}]',
        [("now", "{}")],
    ),
    "list is broken": ('[TOOL_CALLS] [1, {"name": "now"}]', ' [1, {"name": "now"}]', []),
    "list has no end": ('[TOOL_CALLS][{"name": "now", "arguments": {}}', "", [("now", "{}")]),
    "stray token": (f"a [TOOL_CALLS]{STRAY} b{STRAY}", "a  b", []),
}
_MISTRAL_NAMED = {
    "named": ("[TOOL_CALLS]weather[ARGS]" + PARIS, "", [("weather", PARIS)]),
    "named without a marker": ("[TOOL_CALLS]weather" + PARIS, "", [("weather", PARIS)]),
    "named, with an id": ("[TOOL_CALLS]weather[CALL_ID]aB3dE5fG7[ARGS]" + PARIS, "", [("weather", PARIS)]),
    "several named": (
        "I see [TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]weather[ARGS]" + HARD + " there",
        "I see there",
        [("now", "{}"), ("weather", HARD)],
    ),
    "no arguments": ("[TOOL_CALLS]now [1]", "now [1]", []),
    "cut in the arguments": ('[TOOL_CALLS]now[ARGS]{"a', "", [("now", '{"a')]),
    "cut in the name": ("[TOOL_CALLS]no", "no", []),
    "no name": ("a [TOOL_CALLS] b", "a  b", []),
}


def _deepseek_v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def _deepseek_v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


_DEEPSEEK_V3 = {
    "one call": (f"{BEGIN}{_deepseek_v3('weather', PARIS)}{END}", "", [("weather", PARIS)]),
    "text before, several": (
        f"Let me see.\n{BEGIN}{_deepseek_v3('weather', HARD)}\n{_deepseek_v3('now', '{}')}{END}\n",
        "Let me see.",
        [("weather", HARD), ("now", "{}")],
    ),
    "no fence": (f"{BEGIN}{CALL}function{SEP}now\n{{}}{CALL_END}{END}", "", [("now", "{}")]),
    "broken": (
        f"{BEGIN}{CALL}function{SEP}now\n```json\n{{1}}\n```{CALL_END}{END}",
        "1}\n```",
        [("now", "{")],
    ),
    "no call": (f"{BEGIN}{CALL}some words{CALL_END}{END}", "some words", []),
    "cut": (f"{BEGIN}{CALL}function{SEP}no", "functionno", []),
    "no markers": ("a <\uff5ctool\u2581b", "a <\uff5ctool\u2581b", []),
}
_DEEPSEEK_V31 = {
    "one call": (f"{BEGIN}{_deepseek_v31('weather', PARIS)}{END}", "", [("weather", PARIS)]),
    "text before, several, text after": (
        f"Let me see. {BEGIN}{_deepseek_v31('weather', HARD)}{_deepseek_v31('function', '{}')}{END} Done",
        "Let me see. Done",
        [("weather", HARD), ("function", "{}")],
    ),
    "no call": (f"a{BEGIN}{CALL}now{CALL_END}{END}", "anow", []),
    "stray token": (f"a{SEP}b{STRAY}c", "abc", []),
}


def _qwen_call(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


_QWEN_CODER = {
    "one call": (
        _qwen_call("weather", city='a "b"\n\n<c>\n', days="2", unit="C", near="null", at="[1, 2.5]"),
        "",
        [("weather", r'{"city": "a \"b\"\n\n<c>\n", "days": 2, "unit": "C", "near": null, "at": [1, 2.5]}')],
    ),
    "types": (
        _qwen_call("weather", city="5", days="two", unit="1", near="5", at="None", else_="7"),
        "",
        [("weather", '{"city": "5", "days": "two", "unit": "1", "near": "5", "at": null, "else_": "7"}')],
    ),
    "text before, several": (
        "Well.\n" + _qwen_call("now") + "\n" + _qwen_call("what", a="é") + "\n",
        "Well.",
        [("now", "{}"), ("what", '{"a": "é"}')],
    ),
    "no outer tag": ("<function=now>\n</function>", "", [("now", "{}")]),
    "no inner end tags": (
        "<function=weather><parameter=city>a<parameter=days>5</function>",
        "",
        [("weather", '{"city": "a", "days": 5}')],
    ),
    "broken": ("<tool_call>\n<function=weather>\n<parameter=city>a</parameter> b", "b", [("weather", '{"city": "a"')]),
    "cut in a key": ("<tool_call>\n<function=weather>\n<parameter=ci", "", [("weather", "{")]),
    "no function": ("<tool_call>\nwhat\n</tool_call>", "<tool_call>\nwhat\n</tool_call>", []),
    "cut in a value": ("<function=weather><parameter=city>Par", "", [("weather", '{"city": "Par')]),
    "cut in a number": ("<function=weather><parameter=days>12", "", [("weather", '{"days": ')]),
    "cut in the end tag": ("<tool_call><function=now></function>\n</tool_", "", [("now", "{}")]),
    "cut in the next parameter's tag": (
        "<function=weather><parameter=city>a</parameter>\n<para",
        "",
        [("weather", '{"city": "a"')],
    ),
    "cut in the function's end": ("<function=weather><parameter=city>a</parameter></fun", "", [("weather", '{"city": "a"')]),
}

_PYTHONIC = {
    "one call": ('[weather(city="Paris", days=2)]', "", [("weather", PARIS)]),
    "several": (
        "\n[now(), weather( city = 'a\"\\'\\n\\d\\u00e9\\x41]', at=[-1.5e+3, (0,), ], "
        "x={'y': [{}, None, True], \"z\": false,},)]",
        "",
        [
            ("now", "{}"),
            ("weather", '{"city": "a\\"\'\\n\\\\déA]", "at": [-1.5e+3, [0]], "x": {"y": [{}, null, true], "z": false}}'),
        ],
    ),
    "text before and after": ("I call:\n [now()] \nDone [1].", "I call:\n Done [1].", [("now", "{}")]),
    "markers": ("<|python_start|>[now()]<|python_end|>", "", [("now", "{}")]),
    "in the middle of a line": ("see [now()]", "see [now()]", []),
    "links and lists": ("[now](http://x)\n[1] a\n[x]\n[f(a)]\n[]", "[now](http://x)\n[1] a\n[x]\n[f(a)]\n[]", []),
    "second is broken": ("[now(), then]", ", then]", [("now", "{}")]),
    "broken in a value": ("[now(a=1, b=two)]", ")]", [("now", '{"a": 1, ')]),
    "no number": ("[now(a=01)]", ")]", [("now", "{")]),
    "too deep": ("[now(a=" + "[" * 40, "[" * 7, [("now", "{")]),
    "half a character": ('[now(a="\\ud83d\\ude42 \\ud83d")]', "", [("now", '{"a": "🙂 \ufffd"}')]),
    "no character": ('[now(a="\\U00110000")]', '")]', [("now", "{")]),
    "cut": ('[now(a="b', "", [("now", "{")]),
}

_FUNCTION_CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
_HARMONY = {
    "answer": ("<|channel|>final<|message|>Hello!<|return|>", "Hello!", []),
    "thoughts and an answer": (
        "<|channel|>analysis<|message|>Hm. <|end|><|start|>assistant<|channel|>final<|message|> Yes \n",
        "Yes \n",
        [],
        "Hm.",
    ),
    "thoughts and a call": (
        f"<|channel|>analysis<|message|>I call.<|end|><|start|>assistant{_FUNCTION_CALL}{HARD}<|call|>",
        "",
        [("weather", HARD)],
        "I call.",
    ),
    "recipient in the role": (
        f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{PARIS}<|call|>",
        "",
        [("weather", PARIS)],
    ),
    "recipient at the beginning": (f" to=functions.weather<|channel|>commentary<|message|>{PARIS}", "", [("weather", PARIS)]),
    "call out of the thoughts": (f"<|channel|>analysis to=functions.weather<|message|>{PARIS}", "", [("weather", PARIS)]),
    "preamble, then a call": (
        f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{_FUNCTION_CALL}{PARIS}<|call|>",
        "I look.",
        [("weather", PARIS)],
    ),
    "several": (
        f"{_FUNCTION_CALL}{PARIS}<|call|><|start|>assistant{_FUNCTION_CALL}{{}}<|call|>",
        "",
        [("weather", PARIS), ("weather", "{}")],
    ),
    "several thoughts and texts": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
        "<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d",
        "b\n\nd",
        [],
        "a\n\nc",
    ),
    "other tool": ('<|channel|>commentary to=browser.search<|message|>{"a":1}', "", [("browser.search", '{"a":1}')]),
    "arguments that are no object": (f"{_FUNCTION_CALL}print(1)<|call|>", "print(1)", []),
    "broken in the arguments": (f"{_FUNCTION_CALL}{{]}}<|call|>", "]}", [("weather", "{")]),
    "no channel": ("<|message|>Hi<|end|>", "Hi", []),
    "no format": ("the answer: 5", "the answer: 5", []),
    "no message": ("<|channel|>final and <|end|>", "final and ", []),
    "stray tokens": (f"<|channel|>final<|message|>a{STRAY}b<|constrain|>c", "abc", []),
    "cut in the header": ("<|channel|>analysis<|mess", "analysis<|mess", []),
    "cut in the thoughts": ("<|channel|>analysis<|message|>Hm ", "", [], "Hm "),
}

_BY_FORMAT = {
    "hermes": _HERMES,
    "llama3_json": _LLAMA,
    "mistral": _MISTRAL_LIST | _MISTRAL_NAMED,
    "mistral_args": _MISTRAL_LIST | _MISTRAL_NAMED,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v31": _DEEPSEEK_V31,
    "qwen3_coder": _QWEN_CODER,
    "harmony": _HARMONY,
    "pythonic": _PYTHONIC,
}
SAMPLES = {f"{name}-{what}": Sample(name, *row) for name, rows in _BY_FORMAT.items() for what, row in rows.items()}
