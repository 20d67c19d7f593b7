"""Seeded random request bodies: by the OpenAPI document, from its examples, of its field names, and broken as text."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

from server.openapi import OPERATIONS, schemas
from server.openapi_examples import REQUESTS
from tests.random_schemas import SchemaMaker

SECRET = "tulip-bulb"
"""In many bodies as a value; no error may repeat it."""
CONTEXT = 256
"""Of the server, in tokens; its tokenizer makes one of an x."""

SCHEMAS = schemas(OPERATIONS.values())
ENDPOINTS = {
    name.removeprefix("POST "): (operation.request.__name__, [*REQUESTS[operation.id].values()])
    for name, operation in OPERATIONS.items()
    if operation.request is not None
}
FIELD_NAMES = sorted(
    {
        name
        for cls in [operation.request for operation in OPERATIONS.values() if operation.request is not None]
        for schema in [cls.model_json_schema(), *cls.model_json_schema().get("$defs", {}).values()]
        for name in schema.get("properties", {})
    }
)
_CHAT_PROPERTIES = SCHEMAS["ChatRequest"]["properties"]
_LIMITS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}

WORDS = (
    "a",
    "hi",
    "Paris",
    "two words",
    "é",
    "👩‍🚀",
    "\u202e",
    "\x00",
    "\r\n",
    "{{ x }}",
    "<|im_end|>",
    "</think>",
    "<tool_call>",
    SECRET,
)
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 129, 257, 320, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1,
    10**40, 10**400, 0.5, -0.0, 1.0, 5e-324, 1e308, -1e308, 3.5, "", "x" * 300, "ab " * 20_000, "\ud800", "a\udfff\ud800",
    [], [1], ["a"], [[]], [None], [[1], ["a"]], [257, 65], [[65, 66], [67]], ["a"] * 40, {}, {"a": 1}, {"1": 2}, {"65": -100},
    {"type": "text"}, [{"role": "user", "content": "a"}], [{"role": "user"}], [{"type": "function"}], *WORDS,
)  # fmt: skip
REGEXES = (
    "a", "", "(", "[", "a{1000}", "(a+)+b", "(?=a)b", "\\p{L}+", "[^\\x00-\\x7f]{3}", "(a|b|c){0,5}", "\\b", "^x$",
    "(?i)yes|no", "\\u{110000}", "[z-a]", "((((a){9}){9}){9}){9}", ".*", "\x00",
)  # fmt: skip
GRAMMARS = (
    'start: "a"', "start: start", "start: b", 'root ::= "a" | "b"', "root ::= root", "start: /[a-z]+/", 'start: "a"~1..3',
    "", "::", '%import common.INT\nstart: INT', 'start: "(" start ")" | ""', "root ::= [", 'start: "x"' * 50,
)  # fmt: skip
TEMPLATES = (
    "{{ messages }}", "{{", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ ''.__class__.__mro__ }}",
    "{{ 'a' * 10**10 }}", "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "{% include 'x' %}", "x", "", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9].x.y }}",
    "{{ cycler.__init__.__globals__ }}",
)  # fmt: skip


class BodyMaker:
    """One body after another from one source of randomness."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._wrongness = 0.0

    def make(self) -> tuple[str, bytes]:
        """A path and the bytes of its body."""
        rng = self._rng
        path = rng.choice([*ENDPOINTS, "/v1/chat/completions", "/v1/completions"])
        kinds = (self._by_schema, self._mutated_example, self._with_a_wrong_field, self._of_field_names)
        kind = rng.choices(kinds, (4, 3, 3, 1))[0]
        body = self._affordable(path, kind(path))
        text = json.dumps(body)
        if rng.random() < 0.2:
            return path, self._break(text)
        return path, text.encode()

    def make_valid(self) -> tuple[str, dict[str, Any]]:
        """A path and a body that is as it should be."""
        path = self._rng.choice(list(ENDPOINTS))
        return path, self._affordable(path, dict(self._rng.choice(ENDPOINTS[path][1])), always=True)

    # -- by the document ----------------------------------------------------------------------------------------------

    def _by_schema(self, path: str) -> Any:
        self._wrongness = self._rng.choice((0.0, 0.0, 0.02, 0.1))
        return self._object(SCHEMAS[ENDPOINTS[path][0]], depth=0)

    def _value(self, schema: dict[str, Any], name: str, depth: int) -> Any:
        """One that the schema allows, as a rule."""
        rng = self._rng
        if rng.random() < self._wrongness:
            return self._junk()
        if name in _BY_NAME and rng.random() < 0.9:
            return _BY_NAME[name](rng)
        if "$ref" in schema:
            return self._value(SCHEMAS[schema["$ref"].rpartition("/")[2]], name, depth)
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum", [schema.get("const")]))
        for several in ("anyOf", "oneOf"):
            if several in schema and "properties" not in schema:
                return self._value(rng.choice(schema[several]), name, depth)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = rng.choice([*kind, kind[0], kind[0]])
        if kind is None and "properties" not in schema:
            known = _CHAT_PROPERTIES.get(name, schema)  # /tokenize leaves them to the chat's own type
            return self._json(2) if known == schema else self._value(known, name, depth)
        makers: dict[str | None, Callable[[], Any]] = {
            "null": lambda: None,
            "boolean": lambda: rng.random() < 0.5,
            "integer": lambda: self._number(schema, whole=True),
            "number": lambda: self._number(schema, whole=False),
            "string": lambda: self._text(max(schema.get("minLength", 0), rng.choice((0, 1, 1, 2)))),
            "array": lambda: self._array(schema, name, depth),
        }
        return makers.get(kind, lambda: self._object(schema, depth))()

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng = self._rng
        properties: dict[str, Any] = schema.get("properties", {})
        needed = [*schema.get("required", ()), *rng.choice(schema.get("oneOf", [{}])).get("required", ())]
        optional = [name for name in properties if name not in needed]
        count = rng.choice((0, 1, 2, 3, 6) if depth == 0 else (0, 0, 1, 2))
        chosen = [*needed, *rng.sample(optional, min(count, len(optional)))]
        made = {name: self._value(properties.get(name, {}), name, depth + 1) for name in chosen}
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            made |= {rng.choice(("65", "7", "x", "-1")): self._value(more, "", depth + 1) for _ in range(rng.randrange(3))}
        if rng.random() < 0.5 * self._wrongness:
            made[rng.choice((*FIELD_NAMES, SECRET, ""))] = self._junk()
        return made

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        count = max(schema.get("minItems", 0), self._rng.choice((1, 1, 1, 2, 3)) if depth < 4 else 0)
        return [self._value(schema.get("items", {}), name + "[]", depth + 1) for _ in range(count)]

    def _number(self, schema: dict[str, Any], *, whole: bool) -> int | float:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -9))
        high = min(schema.get("maximum", 300), max(low, 300))
        edges = [low, high, schema.get("maximum", high)]
        drawn = self._rng.randint(int(low), int(high)) if whole else self._rng.uniform(low, high)
        return self._rng.choice([drawn, drawn, drawn, *edges])

    def _text(self, num_words: int) -> str:
        if self._rng.random() < 0.1:
            return "".join(chr(self._rng.choice((*range(0x20), 0x7F, 0xFEFF, 0x10FFFF, 0x1F600))) for _ in range(num_words))
        if self._rng.random() < 0.05:
            return "x" * self._rng.randint(CONTEXT - 20, CONTEXT + 2)
        return " ".join(self._rng.choice(WORDS) for _ in range(num_words))

    # -- otherwise ----------------------------------------------------------------------------------------------------

    def _mutated_example(self, path: str) -> Any:
        """An example of the document, changed in a few places."""
        rng = self._rng
        body = rng.choice(ENDPOINTS[path][1])
        for _ in range(rng.choice((1, 1, 2, 4))):
            body = json.loads(json.dumps(body))  # a copy in which nothing is there twice
            places = list(_places(body))
            if not places:
                break
            holder, key = rng.choice(places)
            change = rng.randrange(6)
            if change == 0:
                del holder[key]
            elif change == 1:
                other_holder, other_key = rng.choice(places)
                holder[key] = copy.deepcopy(other_holder[other_key])
            elif change == 2:
                holder[key] = [holder[key]] * rng.choice((1, 2, 50))
            elif change == 3 and isinstance(holder, dict):
                holder[rng.choice(FIELD_NAMES)] = self._junk()
            elif change == 4 and isinstance(holder, dict):
                holder[rng.choice((*FIELD_NAMES, SECRET, "\ud800", ""))] = holder.pop(key)
            else:
                holder[key] = self._junk()
        return body

    def _with_a_wrong_field(self, path: str) -> Any:
        """An example with one more of its endpoint's fields, of any type."""
        body = copy.deepcopy(self._rng.choice(ENDPOINTS[path][1]))
        body[self._rng.choice(list(SCHEMAS[ENDPOINTS[path][0]]["properties"]))] = self._junk()
        return body

    def _of_field_names(self, path: str) -> Any:
        names = self._rng.sample(FIELD_NAMES, self._rng.choice((1, 3, 8, 40)))
        return {name: self._json(3) for name in names}

    def _json(self, depth: int) -> Any:
        rng = self._rng
        if depth == 0 or rng.random() < 0.4:
            return self._junk()
        if rng.random() < 0.5:
            return [self._json(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice((*FIELD_NAMES, SECRET)): self._json(depth - 1) for _ in range(rng.randrange(4))}

    def _junk(self) -> Any:
        return self._rng.choice(JUNK)

    def _affordable(self, path: str, body: Any, *, always: bool = False) -> Any:
        """With a small limit of tokens where the body may have one, as a rule: 10,000 requests are to take minutes."""
        if path in _LIMITS and isinstance(body, dict) and (always or self._rng.random() < 0.9):
            wrong = not isinstance(body.get(_LIMITS[path]), int | None)
            if always or not wrong:
                body[_LIMITS[path]] = self._rng.randint(1, 8)
            if isinstance(body.get("n"), int) and body["n"] > 8 and self._rng.random() < 0.98:
                body["n"] = self._rng.randint(2, 8)
        return body

    # -- as text ------------------------------------------------------------------------------------------------------

    def _break(self, text: str) -> bytes:
        """The same body, spoilt below what JSON can say."""
        rng = self._rng
        data = text.encode()
        at = rng.randrange(len(data) + 1)
        deep = rng.choice((20, 127, 128, 129, 1000, 100_000))
        nested = b"[" * deep + b"1" + b"]" * deep if rng.random() < 0.5 else b'{"a":' * deep + b"1" + b"}" * deep
        number = rng.choice(
            (b"NaN", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"0" * 50, b"1e-999", b"0.1e1.2", b"+1", b".5")
        )
        return rng.choice(
            (
                lambda: data[:at],
                lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                lambda: data[:at] + rng.randbytes(rng.choice((1, 3, 50))) + data[at:],
                lambda: re.sub(rb"(?<=[:,\[ ])-?\d[\d.]*", number, data, count=rng.choice((0, 1))),
                lambda: _in_place_of_a_value(rng, data, number),
                lambda: _in_place_of_a_value(rng, data, nested),
                lambda: _in_place_of_a_value(rng, data, b'"\xed\xa0\x80"'),  # a surrogate in bytes
                lambda: _in_place_of_a_value(rng, data, b'"\\ud800"'),
                lambda: _in_place_of_a_value(rng, data, b'"\xc0\x80"'),  # overlong
                lambda: data[:-1] + b"," + data[1:] if len(data) > 2 else data,  # every key twice
                lambda: b"\xef\xbb\xbf" + data,
                lambda: text.encode("utf-16", "surrogatepass"),
                lambda: data + rng.choice((b"}", b" {}", b"\x00", b"// x", b"," * 1000)),
                lambda: b" " * 70_000 + data,
                lambda: nested,
                lambda: rng.randbytes(rng.choice((1, 10, 1000))),
                lambda: b"",
            )
        )()


def _places(value: Any) -> Any:
    """(object or array, key or index) of everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _in_place_of_a_value(rng: random.Random, data: bytes, new: bytes) -> bytes:
    found = list(re.finditer(rb'(?<=: )("[^"\\]*"|-?[\d.]+|true|false|null)', data))
    if not found:
        return b'{"prompt": ' + new + b', "messages": ' + new + b"}"
    one = rng.choice(found)
    return data[: one.start()] + new + data[one.end() :]


def _schema(rng: random.Random) -> Any:
    schema = SchemaMaker(rng.randrange(2**32), bounded=True).make().schema
    places = list(_places(schema))
    if places and rng.random() < 0.3:
        holder, key = rng.choice(places)
        holder[key] = rng.choice(JUNK)
    return schema


_BY_NAME: dict[str, Callable[[random.Random], Any]] = {
    "model": lambda rng: rng.choice(("tiny", None)),
    "schema": _schema,
    "json": _schema,
    "parameters": lambda rng: {"type": "object", "properties": {"a": _schema(rng)}},
    "guided_json": _schema,
    "regex": lambda rng: rng.choice(REGEXES),
    "guided_regex": lambda rng: rng.choice(REGEXES),
    "grammar": lambda rng: rng.choice(GRAMMARS),
    "guided_grammar": lambda rng: rng.choice(GRAMMARS),
    "chat_template": lambda rng: rng.choice(TEMPLATES),
    "name": lambda rng: rng.choice(("f", "get_weather", "a b", SECRET, "")),
    "timeout": lambda rng: rng.choice((0.001, 1, 60, 1e-300)),
    "first_token_timeout": lambda rng: rng.choice((0.001, 1, 60)),
    "prompt[]": lambda rng: rng.choice(WORDS),
    "arguments": lambda rng: rng.choice(("{}", "{", '{"a": 1}', "[" * 200, SECRET, "", "NaN")),
}
