"""JSON Schema as this server takes it: keywords that cannot be honoured are refused by name, never skipped.

The grammar library knows draft 2020-12 and leaves out what its draft, told by `$schema`, does not know; here every draft's
assertions count. Unknown keywords are annotations, as the specification says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from engine.errors import InvalidRequest
from server.api.body import WrongType, json_type
from server.api.regex import with_ascii_classes, without_look_aheads

SUPPORTED = frozenset(
    {"$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum"}
    | {"exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength"}
    | {"minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "properties"}
    | {"required", "type"}
)
# Keyword -> values that ask for nothing; with one of these it is left out.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "$dynamicAnchor": (),
    "$dynamicRef": (),
    "$recursiveAnchor": (False,),
    "$recursiveRef": (),
    "contains": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "disallow": ([],),
    "divisibleBy": (),
    "else": (),
    "extends": (),
    "if": (),
    "maxContains": (),
    "minContains": (),
    "not": (False,),
    "nullable": (False,),
    "propertyNames": (True, {}, {"type": "string"}),  # the last as zod writes a record
    "then": (),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
    "x-guidance": (),
}
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# Characters of the longest one, where the library knows none, since an answer is to end: seconds with nine decimals, and what
# RFC 5321 and 1035 let an address and a name have.
FORMAT_LENGTHS = {"date-time": 35, "duration": 64, "email": 254, "hostname": 253, "time": 24}
# What zod writes beside a format and the library cannot read; all that has the format matches it.
IMPLIED_PATTERNS = {
    "duration": r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
}
DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")

MAX_DEPTH = 100  # of nested arrays and objects
MAX_BYTES = 2**20
_LAST_DOUBLE = 2**63 - 1024  # before 2**63
# Between two tokens of JSON: nothing, a space, or a line break and its indentation.
WHITESPACE = r"( |\n {0,20})"

_SCHEMA_MAPS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset({"additionalItems", "additionalProperties", "items"})


def checked_schema(schema: object, param: str) -> dict[str, Any]:
    """A copy of a schema that holds only what the grammar honours. Raises InvalidRequest (of `param`) naming the keyword."""
    if schema is True:
        return {}
    if schema is False:
        raise InvalidRequest(f"{param} is false: no answer can satisfy it.", param=param)
    if not isinstance(schema, dict):
        raise WrongType(f"{param} must be a JSON schema, got {json_type(schema)}.", param=param)
    _check_depth(schema, param)
    if not DRAFTS.fullmatch(str(schema.get("$schema", "https://json-schema.org/draft/2020-12/schema"))):
        raise InvalidRequest(
            f"{param} has a $schema that is not supported; it may be draft 4, 6, 7, 2019-09 or 2020-12.",
            param=param,
            code="unsupported_schema",
        )
    copy: dict[str, Any] = _Copy(schema, param).of(schema)
    return copy


def lenient_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The same of a schema that is kept as far as it goes: nothing is refused, the library leaves out what it does not know."""
    copy: dict[str, Any] = _Copy(schema, None).of(schema)
    return copy


def schema_text(schema: dict[str, Any], param: str) -> str:
    """A checked schema as the grammar library takes it, also for `%json` in Lark: with the whitespace that is allowed. Raises
    InvalidRequest."""
    try:
        text = json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}, allow_nan=False)
    except ValueError:
        raise InvalidRequest(f"{param} holds a number that is not finite.", param=param) from None
    if len(text) > MAX_BYTES:
        raise InvalidRequest(f"{param} has {len(text):,} bytes; at most {MAX_BYTES:,} are allowed.", param=param)
    return text


def _within_doubles(bound: int | float, *, is_upper: bool) -> int | float:
    """The bound, or the next one within it that the library reads as it is: it rounds to doubles, also outwards, and refuses
    those from 2**63 on."""
    if not is_upper:
        return -_within_doubles(-bound, is_upper=True)
    if not -_LAST_DOUBLE <= bound < math.inf:
        return bound  # not finite, or nothing that the library knows is within it
    bound = min(bound, _LAST_DOUBLE)
    nearest = float(bound)
    return bound if nearest == bound else int(nearest if nearest < bound else math.nextafter(nearest, -math.inf))


def _share_integer_part(whole: float, other: float) -> bool:
    is_finite = abs(whole) < math.inf and abs(other) < math.inf  # also of an integer that is too long for a double
    return is_finite and whole == int(whole) == int(other) != other


def _check_depth(schema: dict[str, Any], param: str) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"{param} is nested deeper than {MAX_DEPTH} arrays and objects.", param=param)


class _Copy:
    """Copies schemas of one document. What is no schema, an instance in `enum` or a name in `properties`, is left alone."""

    def __init__(self, root: dict[str, Any], param: str | None) -> None:
        """param: None refuses nothing."""
        self._root = root
        self._param = param

    def of(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema  # true or false; anything else the grammar library refuses
        copy: dict[str, Any] = {}
        seen_ahead: list[Any] = []
        for keyword, value in schema.items():
            if keyword in UNSUPPORTED and self._param is not None:
                if not any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[keyword]):
                    self._refuse(f"holds the keyword {keyword}, which is not supported")
            elif keyword in _SCHEMA_MAPS and isinstance(value, dict):
                copy[keyword] = {name: self.of(child) for name, child in value.items()}
            elif keyword in (_SCHEMA_LISTS | {"items"}) and isinstance(value, list):
                copy[keyword] = [self.of(child) for child in value]
            elif keyword in _SCHEMAS:
                copy[keyword] = self.of(value)
            elif keyword == "pattern" and isinstance(value, str):
                if value != IMPLIED_PATTERNS.get(str(schema.get("format"))):
                    copy[keyword], *others = map(with_ascii_classes, without_look_aheads(value))
                    seen_ahead = [{"pattern": other} for other in others]
            elif keyword != "$schema":
                copy[keyword] = value
        if seen_ahead and isinstance(given := copy.get("allOf", []), list):
            copy["allOf"] = [*given, *seen_ahead]
        self._check_type(copy)
        self._check_bounds(copy)
        if "oneOf" in copy and "anyOf" not in copy and self._exclude_each_other(copy["oneOf"]):
            copy = {"anyOf" if keyword == "oneOf" else keyword: value for keyword, value in copy.items()}
        return copy

    def _check_type(self, schema: dict[str, Any]) -> None:
        types = schema.get("type", "string")
        types = types if isinstance(types, list) else [types]
        if not all(isinstance(name, str) and name in TYPES for name in types):
            self._refuse(f"has a type that is none of {', '.join(TYPES)}")
        # A format says something about strings only; OpenAPI has some for numbers.
        if "format" in schema and "string" in types:
            self._check_format(schema)

    def _check_format(self, schema: dict[str, Any]) -> None:
        several = schema.get("allOf")  # where zod puts its patterns, if there are more than one
        beside = [schema, *(several if isinstance(several, list) else ())]
        name, has_pattern = schema["format"], any(isinstance(one, dict) and "pattern" in one for one in beside)
        if name not in FORMATS:
            if not has_pattern:
                self._refuse(f"has a format that is not supported; those that are: {', '.join(FORMATS)}")
            del schema["format"]  # a name for the pattern, as zod writes startsWith
        elif name in FORMAT_LENGTHS and not has_pattern and not schema.keys() & {"minLength", "maxLength"}:
            schema["maxLength"] = FORMAT_LENGTHS[name]

    def _check_bounds(self, schema: dict[str, Any]) -> None:
        """Draft 4 says with true that a bound is exclusive. And the grammar library takes 3 for a number above 3 and below 3.5:
        it forgets that a whole number is excluded where the other bound has the same integer part."""
        for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(is_exclusive := schema.get(exclusive), bool):
                del schema[exclusive]
                if is_exclusive and inclusive in schema:
                    schema[exclusive] = schema.pop(inclusive)
            for keyword in (exclusive, inclusive):
                if isinstance(bound := schema.get(keyword), int | float) and not isinstance(bound, bool):
                    schema[keyword] = _within_doubles(bound, is_upper=inclusive == "maximum")
        types = schema.get("type", "number")
        if "number" not in (types if isinstance(types, list) else [types]):
            return
        for exclusive, others in (
            ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
            ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
        ):
            for bound, other in ((schema.get(exclusive), schema.get(name)) for name in others):
                if isinstance(bound, int | float) and isinstance(other, int | float) and _share_integer_part(bound, other):
                    self._refuse(f"has an {exclusive} beside a bound of the same integer part, which is not supported")

    def _refuse(self, what: str) -> None:
        if self._param is None:
            return
        raise InvalidRequest(f"{self._param} {what}.", param=self._param, code="unsupported_schema")

    def _exclude_each_other(self, options: Any) -> bool:
        """Whether all options are objects with one property that every one requires, each with values of its own. (The grammar
        library sees this only where the options are no references.)"""
        if not isinstance(options, list) or not options:
            return False
        tags = [dict(self._tags(option)) for option in options]
        for name in tags[0]:
            values = [tag.get(name, frozenset()) for tag in tags]
            if all(values) and sum(map(len, values)) == len(frozenset().union(*values)):
                return True
        return False

    def _tags(self, option: Any) -> Iterator[tuple[str, frozenset[str]]]:
        """Required properties of an object that are one of a few strings."""
        option = self._resolved(option)
        required, properties = option.get("required"), option.get("properties")
        if option.get("type") != "object" or not isinstance(required, list) or not isinstance(properties, dict):
            return
        for name in required:
            schema = self._resolved(properties.get(name) if isinstance(name, str) else None)
            values = [schema["const"]] if "const" in schema else schema.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                yield name, frozenset(values)

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """The schema behind a reference within the document, {} where there is none."""
        for _ in range(MAX_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str):
                return schema if isinstance(schema, dict) else {}
            schema = self._root if reference.startswith("#") else None
            for part in reference.lstrip("#").split("/")[1:]:
                schema = schema.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(schema, dict) else None
        return {}
