"""Pieces of Lark grammars as llguidance reads them (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).

A forced or strict call is written with ", " and ": " between its parts, as models see JSON in their templates, and without
other space, so an answer cannot run on in blanks. Properties come in the schema's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.parsers.base import FunctionTool, Vocabulary

# More calls than this in one answer are a model that has lost its way.
MAX_PARALLEL_CALLS = 16

ANY_TEXT = "ANY: /(?s:.*)/\n"

_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where one of these stands beside `properties`, closing the object could shut out what they ask for.
_OPENING_KEYWORDS = frozenset(
    {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "minProperties"}
)


def quoted(text: str) -> str:
    """A Lark string that stands for `text`."""
    return json.dumps(text, ensure_ascii=False)


def marker(vocabulary: Vocabulary, text: str) -> str:
    """A marker as the model writes it: one token where the tokenizer has it, else its text."""
    token_id = vocabulary.added_tokens.get(text)
    return quoted(text) if token_id is None else f"<[{token_id}]>"


def free_text(vocabulary: Vocabulary, opening: str, rest: str, *, parallel: bool, never: str | None = None) -> str:
    """The rule `start`: text in which the rule `rest` follows every marker `opening`. It defines ANY.

    parallel: this may happen several times, else once. never: a marker that the text has not.
    """
    times = MAX_PARALLEL_CALLS if parallel else 1
    excluded = quoted(opening) if never is None else f"({quoted(opening)} | {quoted(never)})"
    text = f"TEXT: ANY & ~(ANY {excluded} ANY)\n{ANY_TEXT}"
    if opening in vocabulary.added_tokens:
        return f"start: TEXT ({marker(vocabulary, opening)} {rest} TEXT){{0,{times}}}\n{text}"
    before = "ANY" if never is None else f"(ANY & ~(ANY {quoted(never)} ANY))"
    return f"start: (before {rest}){{0,{times}}} TEXT\nbefore[lazy]: BEFORE {quoted(opening)}\nBEFORE: {before}\n{text}"


def text_to(vocabulary: Vocabulary, rule: str, end: str) -> str:
    """The rule `rule`: text up to and with the first marker `end`. It needs ANY_TEXT."""
    if end in vocabulary.added_tokens:
        terminal = rule.upper()
        return f"{rule}: {terminal} {marker(vocabulary, end)}\n{terminal}: ANY & ~(ANY {quoted(end)} ANY)\n"
    return f"{rule}[lazy]: ANY {quoted(end)}\n"


def arguments_schema(tool: FunctionTool) -> dict[str, Any]:
    """What the arguments of a constrained call satisfy: the tool's own schema, closed where it leaves open what else may come.

    Keywords that the grammar library does not know are refused by it for a strict tool, and left out for others.
    """
    schema = dict(tool.schema()) or {"properties": {}}
    schema.setdefault("type", "object")
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and _may_close(schema, properties):
        schema["additionalProperties"] = False
    return with_options(schema, is_strict=tool.strict)


def with_options(schema: Mapping[str, Any], *, is_strict: bool) -> dict[str, Any]:
    """The schema, for the grammar library: how it is written, and whether unknown keywords are refused."""
    return {**schema, "x-guidance": {**_SEPARATORS, "lenient": not is_strict}}


def _may_close(schema: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
    required = schema.get("required", [])
    knows_required = isinstance(required, list) and all(isinstance(key, str) and key in properties for key in required)
    return knows_required and not _OPENING_KEYWORDS & schema.keys()


def calls(tools: Sequence[FunctionTool], write: Callable[[FunctionTool, str], str]) -> str:
    """Rules `call` and what it needs: one call of one of the tools.

    write: (tool, name of the rule for its arguments) -> a call of this tool, in Lark.
    """
    names = [f"arguments_{index}" for index in range(len(tools))]
    choices = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"call: {choices}"]
    for index, (tool, name) in enumerate(zip(tools, names, strict=True)):
        rules.append(f"call_{index}: {write(tool, name)}")
        rules.append(f"{name}: %json {json.dumps(arguments_schema(tool), ensure_ascii=False)}")
    return "\n".join(rules) + "\n"


def several(first: str, following: str, *, parallel: bool) -> str:
    """`first`; parallel: and up to MAX_PARALLEL_CALLS in all, each further one as `following`."""
    return f"{first} ({following}){{0,{MAX_PARALLEL_CALLS - 1}}}" if parallel else first


def nested(name: str, grammar: str) -> str:
    """A rule for a whole grammar inside another."""
    return f"{name}: %lark {{\n{grammar}\n}}\n"
