"""Seeded random JSON schemas, each satisfiable, with the length of their longest answer where there is one."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

# Between two tokens of JSON: a line break and twenty spaces.
SPACE = 21
# A character of a string as an escape of six, or as four bytes.
CHARACTER = 6

# Pattern, and the longest text it matches.
BOUNDED_PATTERNS = (
    ("^[a-z]{2,5}$", 5),
    ("^(foo|bar)-[0-9]{1,3}$", 7),
    ("^\\d{3}-\\w{1,4}$", 8),
    ("^(a|bc){0,4}$", 8),
    ("^é?z$", 3),
)
PATTERNS = ("^[A-Z][a-z]*$", "[0-9]", "^(x|y)+$", "ab", "^\\w+@\\w+$")
BOUNDED_FORMATS = (("date", 10), ("ipv4", 15), ("uuid", 36), ("time", 24), ("date-time", 35), ("duration", 64))
FORMATS = ("date-time", "time", "email", "hostname", "ipv6", "duration", "uri")
NAMES = ("a", "b", "name", "id", "two words", "é", 'q"', "x-y", "tags", "value", "$ref", "type", "not")


class Made(NamedTuple):
    """longest: characters of the longest answer, None where there is none."""

    schema: Any
    longest: int | None


class SchemaMaker:
    """bounded: every answer has a longest form."""

    def __init__(self, seed: int, *, bounded: bool) -> None:
        self._rng = random.Random(seed)
        self._bounded = bounded
        self._definitions: dict[str, Any] = {}

    def make(self) -> Made:
        made = self._any(self._rng.choice((1, 2, 3)))
        if not self._bounded and self._rng.random() < 0.3:
            made = self._recursive()
        if self._definitions:
            made.schema["$defs"] = self._definitions
        return made

    def _any(self, depth: int) -> Made:
        simple = [self._string, self._integer, self._enum, self._const, self._boolean, self._null]
        if not self._bounded:
            simple.append(self._number)
        nested = [self._object, self._object, self._array, self._any_of, self._tuple, self._one_of, self._reference]
        if not self._bounded:
            nested.append(self._map)
        return self._rng.choice(simple if depth == 0 else [*nested, *simple])(depth)

    # -- leaves -----------------------------------------------------------------------------------------------------

    def _string(self, depth: int) -> Made:
        rng = self._rng
        schema: dict[str, Any] = {"type": "string"}
        kind = rng.choice(("length", "pattern", "format"))
        if kind == "pattern":
            schema["pattern"], longest = rng.choice(BOUNDED_PATTERNS)
            if not self._bounded and rng.random() < 0.5:
                return Made({"type": "string", "pattern": rng.choice(PATTERNS)}, None)
        elif kind == "format":
            schema["format"], longest = rng.choice(BOUNDED_FORMATS)
            if not self._bounded and rng.random() < 0.6:
                return Made({"type": "string", "format": rng.choice(FORMATS)}, None)
        else:
            longest = schema["maxLength"] = rng.randint(0, 12)
            if rng.random() < 0.5:
                schema["minLength"] = rng.randint(0, longest)
            if not self._bounded and rng.random() < 0.4:
                del schema["maxLength"]
                return Made(schema, None)
        return Made(schema, 2 + CHARACTER * longest)

    def _integer(self, depth: int) -> Made:
        rng = self._rng
        low, high = sorted(rng.choice((-(10**9), -100, -7, -1, 0, 1, 5, 99, 1000, 2**40)) + rng.randint(0, 3) for _ in range(2))
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high + 12}
        if rng.random() < 0.3:
            schema["exclusiveMinimum"] = schema.pop("minimum") - 1
        if rng.random() < 0.3:
            schema["exclusiveMaximum"] = schema.pop("maximum") + 1
        if rng.random() < 0.2:
            schema["multipleOf"] = rng.choice((1, 2, 3, 5, 10))
        if not self._bounded and rng.random() < 0.3:
            del schema[next(key for key in schema if key.lower().endswith("maximum"))]
            return Made(schema, None)
        return Made(schema, 2 + max(len(str(low)), len(str(high + 12))))

    def _number(self, depth: int) -> Made:
        rng = self._rng
        schema: dict[str, Any] = {"type": "number"}
        low = rng.choice((-100, -0.5, 0, 0.25, 3))
        if rng.random() < 0.6:
            schema[rng.choice(("minimum", "exclusiveMinimum"))] = low
        if rng.random() < 0.6:
            # (Not less than 1 above: see docs/structured-output.md.)
            schema[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.choice((1, 1.5, 17.25, 1000))
        return Made(schema, None)

    def _enum(self, depth: int) -> Made:
        values = self._rng.sample([1, -2.5, "x", 'say "y"', "é\n", None, True, [], [1, {"a": 2}], {"k": "v"}, ""], k=3)
        return Made({"enum": values}, 120)

    def _const(self, depth: int) -> Made:
        value = self._rng.choice(["fixed", 0, None, False, {"a": [1, 2]}, "\\"])
        return Made({"const": value}, 80)

    def _boolean(self, depth: int) -> Made:
        return Made({"type": "boolean"}, 5)

    def _null(self, depth: int) -> Made:
        return Made({"type": "null"}, 4)

    # -- what holds others ------------------------------------------------------------------------------------------

    def _object(self, depth: int) -> Made:
        rng = self._rng
        names = rng.sample(NAMES, rng.randint(0, 4))
        children = {name: self._any(depth - 1) for name in names}
        schema: dict[str, Any] = {"type": "object", "properties": {name: child.schema for name, child in children.items()}}
        if rng.random() < 0.7:
            schema["required"] = [name for name in names if rng.random() < 0.6]
        schema["additionalProperties"] = False
        longest: int | None = 2 + 2 * SPACE
        for name, child in children.items():
            longest = _sum(longest, child.longest, CHARACTER * len(name) + 4 + 4 * SPACE)
        if not self._bounded and rng.random() < 0.5:
            longest = None
            if rng.random() < 0.5:
                del schema["additionalProperties"]
            else:
                schema["additionalProperties"] = self._any(0).schema
            if rng.random() < 0.5:
                schema.setdefault("required", []).append("extra")
        return Made(schema, longest)

    def _map(self, depth: int) -> Made:
        value = self._any(depth - 1).schema
        if self._rng.random() < 0.5:
            return Made({"type": "object", "additionalProperties": value, "minProperties": 1}, None)
        return Made({"type": "object", "patternProperties": {"^k_[a-z]+$": value}, "additionalProperties": False}, None)

    def _array(self, depth: int) -> Made:
        rng = self._rng
        item = self._any(depth - 1)
        schema: dict[str, Any] = {"type": "array", "items": item.schema}
        at_most = rng.randint(0, 4)
        if rng.random() < 0.5:
            schema["minItems"] = rng.randint(0, at_most)
        if not self._bounded and rng.random() < 0.4:
            return Made(schema, None)
        schema["maxItems"] = at_most
        return Made(schema, _times(at_most, item.longest))

    def _tuple(self, depth: int) -> Made:
        items = [self._any(depth - 1) for _ in range(self._rng.randint(1, 3))]
        schema = {"type": "array", "prefixItems": [item.schema for item in items], "items": False, "minItems": len(items)}
        longest: int | None = 2 + 2 * SPACE
        for item in items:
            longest = _sum(longest, item.longest, 1 + 2 * SPACE)
        return Made(schema, longest)

    def _any_of(self, depth: int) -> Made:
        options = [self._any(depth - 1) for _ in range(self._rng.randint(1, 3))]
        lengths = [option.longest for option in options]
        longest = None if None in lengths else max(length for length in lengths if length is not None)
        return Made({"anyOf": [option.schema for option in options]}, longest)

    def _one_of(self, depth: int) -> Made:
        """Objects told apart by a tag, as references."""
        options, longest = [], 0
        for tag in self._rng.sample(("cat", "dog", "fish"), 2):
            name = f"{tag}{len(self._definitions)}"
            child = self._any(0)
            self._definitions[name] = {
                "type": "object",
                "properties": {"kind": {"const": tag}, "value": child.schema},
                "required": ["kind"],
                "additionalProperties": False,
            }
            options.append({"$ref": f"#/$defs/{name}"})
            longest = max(longest, _sum(child.longest, 40, 10 * SPACE) or 0) if child.longest is not None else -1
            if longest < 0:
                break
        if longest < 0:
            return Made(options[0], None)
        return Made({"oneOf": options}, longest)

    def _reference(self, depth: int) -> Made:
        made = self._any(depth - 1)
        name = f"d{len(self._definitions)}"
        self._definitions[name] = made.schema
        return Made({"$ref": f"#/$defs/{name}"}, made.longest)

    def _recursive(self) -> Made:
        """A tree or a list; only what is optional recurs."""
        name = f"node{len(self._definitions)}"
        again = {"$ref": f"#/$defs/{name}"}
        self._definitions[name] = {
            "type": "object",
            "properties": {
                "value": self._any(0).schema,
                "next": self._rng.choice([{"anyOf": [again, {"type": "null"}]}, {"type": "array", "items": again}]),
            },
            "required": ["value"] if self._rng.random() < 0.5 else ["value", "next"],
            "additionalProperties": False,
        }
        return Made({"$ref": f"#/$defs/{name}"}, None)


def _sum(*lengths: int | None) -> int | None:
    return None if None in lengths else sum(length for length in lengths if length is not None)


def _times(count: int, longest: int | None) -> int | None:
    return 2 + SPACE if count == 0 else None if longest is None else 2 + 2 * SPACE + count * (longest + 1 + 2 * SPACE)
