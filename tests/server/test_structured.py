"""response_format and structured_outputs: what they become, what is refused and with which field, and that the docs say so."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import llguidance
import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from server.api.body import validate
from server.api.json_schema import FORMAT_LENGTHS, FORMATS, MAX_DEPTH, SUPPORTED, UNSUPPORTED, checked_schema
from server.api.regex import without_look_aheads
from server.api.structured import StructuredFields, to_lark
from tests.server.conftest import Api

DOCS = Path(__file__).resolve().parents[2] / "docs" / "structured-output.md"
BYTES = llguidance.LLTokenizer("byte")
SECRET = "qX7-secret"


def spec_of(**fields: Any) -> StructuredSpec | None:
    body, _ = validate(StructuredFields, fields, strict=False)
    return body.structured_spec()


def json_schema(schema: Any, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **others}}


def grammar_of(spec: StructuredSpec | None) -> llguidance.LLMatcher:
    """By way of Lark, as for a reasoning model's answer."""
    assert spec is not None
    matcher = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(to_lark(spec)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(matcher: llguidance.LLMatcher, text: str) -> bool:
    copy = matcher.deep_copy()
    return copy.consume_tokens(list(text.encode())) and copy.is_accepting()


def schema_accepts(schema: Any, *texts: str) -> list[bool]:
    matcher = grammar_of(spec_of(structured_outputs={"json": schema}))
    return [accepts(matcher, text) for text in texts]


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", ['{"a": [1]}', "{}"], ["[]", "1", " {}"]),
        ({"response_format": json_schema({"type": "integer"})}, "json_schema", ["17"], ["x", "{}"]),
        ({"response_format": json_schema({"type": "integer"}, strict=True, description="d")}, "json_schema", ["17"], ["x"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema", ["{}"], ["1"]),
        ({"structured_outputs": {"json": {"const": None}}}, "json_schema", ["null"], ["1"]),
        ({"structured_outputs": {"json": '{"enum": ["é", 2]}'}}, "json_schema", ['"é"', "2"], ["1"]),
        ({"structured_outputs": {"json_object": True}}, "json_schema", ["{}"], ["1"]),
        ({"structured_outputs": {"json_object": False, "regex": "a/b+"}}, "regex", ["a/b", "a/bbb"], ["a", "a/"]),
        ({"structured_outputs": {"choice": ["a", 'é "\\\n']}}, "choice", ["a", 'é "\\\n'], ["b", ""]),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /[0-9]+/'}}, "lark", ["a1", "a22"], ["a", "1"]),
        ({"structured_outputs": {"grammar": 'root ::= "a" b\nb ::= [0-9]+'}}, "lark", ["a1", "a22"], ["a", "1"]),
        ({"structured_outputs": {"grammar": 'root ::= "\\u0041" [\\u00e9-\\u00ff]'}}, "lark", ["Aé"], ["Ae", "u"]),
        ({"guided_json": {"type": "boolean"}}, "json_schema", ["true"], ["1"]),
        ({"guided_regex": "[ab]"}, "regex", ["a"], ["c"]),
        ({"guided_choice": ["x"]}, "choice", ["x"], ["y"]),
        ({"guided_grammar": 'start: "x"'}, "lark", ["x"], ["y"]),
    ],
)
def test_what_a_field_asks_for(fields: dict[str, Any], kind: str, good: list[str], bad: list[str]) -> None:
    spec = spec_of(**fields)
    assert spec is not None and spec.kind == kind
    matcher = grammar_of(spec)
    assert [accepts(matcher, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"structured_outputs": None, "guided_json": None}],
)
def test_free_text(fields: dict[str, Any]) -> None:
    assert spec_of(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": SECRET}, "response_format", "got a string"),
        ({"response_format": {}}, "response_format.type", "missing"),
        ({"response_format": {"type": SECRET}}, "response_format.type", "text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", "missing"),
        ({"response_format": json_schema({}, name="a b")}, "response_format.json_schema.name", "pattern"),
        ({"response_format": json_schema({"type": SECRET})}, "response_format.json_schema.schema", "type that is none of"),
        ({"response_format": json_schema({"format": SECRET})}, "response_format.json_schema.schema", "format that is not"),
        ({"response_format": json_schema({"$schema": SECRET})}, "response_format.json_schema.schema", r"\$schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "got 2"),
        ({"structured_outputs": {"json": "{" + SECRET}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "got an integer"),
        ({"structured_outputs": {"json": "false"}}, "structured_outputs.json", "no answer can satisfy"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "empty"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex", "surrogate"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]", "string"),
        ({"structured_outputs": {"grammar": f'root ::= "a" {SECRET}'}}, "structured_outputs.grammar", "not found"),
        ({"structured_outputs": {"grammar": 'root ::= "a'}}, "structured_outputs.grammar", "line 1"),
        ({"structured_outputs": {"grammar": "root ::= " + "(" * 5000}}, "structured_outputs.grammar", "nested too deep"),
        ({"structured_outputs": {"grammar": "root ::= " + "x" * 40_000}}, "structured_outputs.grammar", "write larger"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
        ({"structured_outputs": {"regex": "a" * 2**20 + "a"}}, "structured_outputs.regex", "at most 1,048,576"),
        ({"structured_outputs": {"json": {"enum": ["a" * 2**20]}}}, "structured_outputs.json", "at most 1,048,576"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex", "exclude each other"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format", "exclude each other"),
        ({"response_format": json_schema({}), "structured_outputs": {"regex": "a"}}, "response_format", "exclude each other"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_field_without_the_input(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(**fields)
    assert caught.value.param == param and re.search(message, caught.value.message), caught.value.message
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"), [("response_format", {"type": "json_object"}), ("structured_outputs", {"regex": "a+"})]
)
def test_both_endpoints_ask_the_engine_for_it(api: Api, key: str, value: Any) -> None:
    assert api.complete(prompt="a", **{key: value}).status_code == 200
    assert api.chat(**{key: value}).status_code == 200
    assert api.complete(prompt="a").status_code == 200
    first, second, free = [sampling.structured for sampling in api.client.sampling]
    assert first == second == spec_of(**{key: value}) and free is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_regex": "("}, "guided_regex"),
    ],
)
def test_the_field_to_name_when_the_engine_refuses(fields: dict[str, Any], name: str | None) -> None:
    assert validate(StructuredFields, fields, strict=False)[0].structured_field() == name


def test_fields_that_change_nothing_are_listed(api: Api) -> None:
    response = api.complete(prompt="a", structured_outputs={"regex": "a", "disable_fallback": True, "mood": 1})
    assert response.headers["X-Octavo-Ignored-Fields"] == "structured_outputs.disable_fallback, structured_outputs.mood"


# -- schemas -----------------------------------------------------------------------------------------------------------

# Keyword -> a schema that has it, an answer that it lets through and one that it does not.
HONOURED: dict[str, tuple[Any, str, str]] = {
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "null", "1"),
    "additionalItems": ({"type": "array", "items": [{"type": "null"}], "additionalItems": False}, "[null]", "[null,1]"),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "null"}}, '{"a":null}', '{"a":1}'),
    "allOf": ({"allOf": [{"minLength": 1}, {"type": "string", "maxLength": 2}]}, '"ab"', '"abc"'),
    "anyOf": ({"anyOf": [{"type": "null"}, {"const": 2}]}, "2", "3"),
    "const": ({"const": {"a": 1}}, '{"a":1}', '{"a":2}'),
    "enum": ({"enum": [1, "x"]}, '"x"', '"y"'),
    "exclusiveMaximum": ({"type": "number", "minimum": 0, "exclusiveMaximum": 3}, "2.99", "3"),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3, "maximum": 9}, "4", "3"),
    "format": ({"type": "string", "format": "ipv4"}, '"1.2.3.4"', '"1.2.3.400"'),
    "items": ({"type": "array", "items": {"type": "null"}}, "[null, null]", "[1]"),
    "maxItems": ({"type": "array", "maxItems": 1}, "[1]", "[1,2]"),
    "maxLength": ({"type": "string", "maxLength": 2}, '"éé"', '"abc"'),
    "maxProperties": ({"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
    "maximum": ({"type": "integer", "maximum": 10}, "10", "11"),
    "minItems": ({"type": "array", "minItems": 2}, "[1,2]", "[1]"),
    "minLength": ({"type": "string", "minLength": 2}, '"ab"', '"a"'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    "minimum": ({"type": "integer", "minimum": 10}, "10", "9"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "15", "16"),
    "oneOf": ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, "1", '"a"'),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"aa"', '"ab"'),
    "patternProperties": ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, '{"x1":null}', '{"x1":1}'),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null,1]", "[1]"),
    "properties": ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"a":null}', '{"a":1}'),
    "required": ({"type": "object", "required": ["a"]}, '{"a":1}', '{"b":1}'),
    "type": ({"type": ["null", "integer"]}, "1", '"1"'),
}


def test_the_docs_name_the_keywords_and_formats() -> None:
    text = DOCS.read_text(encoding="utf-8")
    named = [set(re.findall(r"`([^`]+)`", block)) for block in text.split("\n\n")]
    assert set(SUPPORTED) in named and set(UNSUPPORTED) in named
    [formats] = re.findall(r"Formats\s+of strings: (.*?);", text, re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", formats)) == set(FORMATS)


@pytest.mark.parametrize("keyword", sorted(SUPPORTED))
def test_a_supported_keyword_is_honoured(keyword: str) -> None:
    schema, good, bad = HONOURED[keyword]
    assert keyword in schema and schema_accepts(schema, good, bad) == [True, False]


@pytest.mark.parametrize(
    "draft", ["http://json-schema.org/draft-04/schema#", "https://json-schema.org/draft/2020-12/schema", None]
)
@pytest.mark.parametrize("keyword", sorted(UNSUPPORTED))
def test_an_unsupported_keyword_is_refused_by_name_wherever_it_stands(keyword: str, draft: str | None) -> None:
    """In every draft: the library leaves out what a draft does not know."""
    inner = {"type": "object", keyword: {"type": "string", "lenient": True}}
    for schema in (
        inner,
        {"properties": {"a": inner}},
        {"items": inner},
        {"items": [inner]},
        {"anyOf": [{}, inner]},
        {"additionalProperties": {"allOf": [inner]}},
        {"$ref": "#/definitions/a", "definitions": {"a": {"patternProperties": {"x": inner}}}},
    ):
        with pytest.raises(InvalidRequest, match=re.escape(f"the keyword {keyword},")):
            checked_schema(schema if draft is None else {"$schema": draft, **schema}, "schema")


@pytest.mark.parametrize("keyword", sorted(keyword for keyword, values in UNSUPPORTED.items() if values))
def test_what_asks_for_nothing_is_left_out(keyword: str) -> None:
    for neutral in UNSUPPORTED[keyword]:
        schema = json.loads(json.dumps({"type": "object", keyword: neutral, "additionalProperties": {"type": "integer"}}))
        assert schema_accepts(schema, '{"a":1}', '{"a":"b"}', "1") == [True, False, False]
    with pytest.raises(InvalidRequest):
        checked_schema({keyword: 0}, "schema")  # which Python takes for equal to False


def test_what_is_no_keyword_is_left_alone() -> None:
    named = {
        "type": "object",
        "properties": {"not": {"const": {"if": 1}}},
        "required": ["not"],
        "title": "t",
        "mood": {"not": 1},
    }
    assert schema_accepts({**named, "default": {"not": 1}, "additionalProperties": False}, '{"not":{"if":1}}', "{}") == [
        True,
        False,
    ]
    assert schema_accepts({"type": "integer", "format": "int32"}, "1", '"a"') == [True, False]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_known_to_the_library(name: str) -> None:
    assert schema_accepts({"type": "string", "format": name}, '"?"') == [False]


@pytest.mark.parametrize(
    ("name", "longest", "longer"),
    [
        ("time", "10:10:10.123456789+01:00", "10:10:10.1234567890+01:00"),
        ("date-time", "2026-01-31T10:10:10.123456789-01:00", "2026-01-31T10:10:10.1234567890-01:00"),
        ("duration", f"P{'1' * 62}D", f"P{'1' * 63}D"),
        ("email", f"{'a' * 64}@{'b' * 63}.{'c' * 63}.{'d' * 61}", f"{'a' * 64}@{'b' * 63}.{'c' * 63}.{'d' * 62}"),
        ("hostname", ".".join(["a" * 63] * 3 + ["b" * 61]), ".".join(["a" * 63] * 3 + ["b" * 62])),
    ],
)
def test_a_format_has_a_longest_answer(name: str, longest: str, longer: str) -> None:
    """A model that likes zeros would fill any budget with a second's decimals."""
    assert schema_accepts({"type": "string", "format": name}, f'"{longest}"', f'"{longer}"') == [True, False]
    assert len(longest) == FORMAT_LENGTHS[name]
    assert schema_accepts({"type": "string", "format": name, "maxLength": 300}, f'"{longer}"') == [True]


def test_a_format_that_only_names_a_pattern() -> None:
    """As zod writes startsWith, nanoid and others of its own."""
    schema = {"type": "string", "format": "starts_with", "pattern": "^ab.{0,2}$"}
    assert schema_accepts(schema, '"abc"', '"bc"') == [True, False]
    several = {"type": "string", "format": "ends_with", "allOf": [{"pattern": "^a.*"}, {"pattern": ".*b$"}]}
    assert schema_accepts(several, '"ab"', '"ac"', '"cb"') == [True, False, False]
    with pytest.raises(InvalidRequest, match="format that is not supported"):
        checked_schema({"type": "string", "format": "starts_with"}, "schema")


ZOD_DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
ZOD_HOSTNAME = (
    r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$"
)
ZOD_EMOJI = (
    r"^(?=[\s\S]*[\p{Extended_Pictographic}\p{Regional_Indicator}\u20E3])[\p{Extended_Pictographic}\p{Emoji_Component}]+$"
)


@pytest.mark.parametrize("of_type", ["string", ["string", "null"], None])
@pytest.mark.parametrize(
    ("format_", "pattern", "good", "bad"),
    [
        ("duration", ZOD_DURATION, ["P1W", "P3Y6M4DT12H30M5S", "PT5M", f"P{'1' * 62}D"], ["P", "PT", "1D", f"P{'1' * 63}D"]),
        ("hostname", ZOD_HOSTNAME, ["a", "a-b.c", ".".join("a" * 127)], ["", "-a", "a" * 64, ".".join("a" * 128)]),
        ("emoji", ZOD_EMOJI, ["\N{GRINNING FACE}", "1\N{GRINNING FACE}"], ["1", "a", ""]),
    ],
)
def test_zods_patterns_with_look_aheads(
    format_: str, pattern: str, good: list[str], bad: list[str], of_type: str | list[str] | None
) -> None:
    schema = {"format": format_, "pattern": pattern} | ({} if of_type is None else {"type": of_type})
    texts = [json.dumps(text, ensure_ascii=False) for text in (*good, *bad)]
    assert schema_accepts(schema, *texts) == [True] * len(good) + [False] * len(bad)


def test_all_that_has_the_format_matches_the_pattern_that_is_left_out() -> None:
    """The library's durations, drawn at random, against zod's expression, which Python's `re` reads as JavaScript does."""
    matcher, rng = grammar_of(spec_of(structured_outputs={"json": {"type": "string", "format": "duration"}})), random.Random(5)
    for _ in range(200):
        copy, drawn = matcher.deep_copy(), b""
        while not copy.is_stopped():
            mask = copy.compute_bitmask()
            allowed = [token for token in range(256) if mask[token // 8] >> token % 8 & 1]
            # Digits are most of what is allowed, and would fill the whole length.
            drawn += bytes([rng.choice([token for token in allowed if not chr(token).isdigit()] or allowed)])
            assert copy.consume_tokens([drawn[-1]])
        assert re.fullmatch(ZOD_DURATION, json.loads(drawn), re.ASCII), drawn


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^(?=.*[A-Z])(?=.*\d).{3,8}$", ["aA1", "1aA", "AA1"], ["aaA", "a11", "A1", "AAAAAAAA1", "aA\u0661"]),
        (r"^(?=a|b)\w+$", ["ax", "b"], ["cx", "xa"]),
        (r"^(?=.{2}$)(?=x)\w*", ["xy"], ["x", "xyz", "yx"]),
        (r"^(?=[)]|[(|])(?=.[\]\\]).*$", [")]", "(\\\\", "|]"], ["a]", ")a"]),
        (r"^(?=\)x)", [")x", ")xy"], ["x"]),
    ],
)
def test_look_aheads_at_the_begin_of_a_pattern(pattern: str, good: list[str], bad: list[str]) -> None:
    texts = [f'"{text}"' if "\\" in text else json.dumps(text, ensure_ascii=False) for text in (*good, *bad)]
    assert all(re.search(pattern, json.loads(text), re.ASCII) for text in texts[: len(good)]), "the test itself"
    assert not any(re.search(pattern, json.loads(text), re.ASCII) for text in texts[len(good) :]), "the test itself"
    assert schema_accepts({"type": "string", "pattern": pattern}, *texts) == [True] * len(good) + [False] * len(bad)
    both = {"type": "string", "pattern": pattern, "allOf": [{"minLength": 2}]}
    long = [json.loads(text) for text in texts[: len(good)] if len(json.loads(text)) > 1]
    assert schema_accepts(both, *(json.dumps(text, ensure_ascii=False) for text in long)) == [True] * len(long)
    assert checked_schema(both, "schema")["allOf"][0] == {"minLength": 2}


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(?=a)b|c", r"(?=a)b", r"^(?!a)b", r"^(?=a)?b", r"^(?=a)*b", r"^(?=a){0}b", r"a(?=b)", r"^(?=[^]*x)a]",
        r"^(?=[[)x])a", r"^(?=[]a)]b)c", r"^(?=a", r"^((?=a)b)",
    ],
)  # fmt: skip
def test_a_pattern_that_cannot_be_taken_apart_is_left_as_it_is(pattern: str) -> None:
    assert without_look_aheads(pattern) == [pattern]


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_that_are_no_doubles_are_never_exceeded(kind: str) -> None:
    """The library rounds them to the nearest double, and refuses those from 2**63 on."""
    for bound in (2**53 + 1, 2**53 + 3, 2**60 + 129, 2**63 - 1, -(2**53) - 3):
        beyond = [str(bound + distance) for distance in (1, 2, 64, 600)]
        accepted = schema_accepts({"type": kind, "maximum": bound}, str(bound - 1500), *beyond)
        assert accepted == [True, False, False, False, False], bound
        mirrored = [text[1:] if text.startswith("-") else f"-{text}" for text in beyond]
        accepted = schema_accepts({"type": kind, "minimum": -bound}, str(-bound + 1500), *mirrored)
        assert accepted == [True, False, False, False, False], bound
    for low, high in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (-3.4e38, 3.4e38), (-(10**400), 10**400)):
        assert schema_accepts({"type": kind, "minimum": low, "maximum": high}, "0", str(2**63 - 1024)) == [True, True]
    assert schema_accepts({"type": kind, "exclusiveMaximum": 2**53 + 1}, str(2**53 - 1), str(2**53 + 1)) == [True, False]
    assert "minimum" in checked_schema({"type": kind, "minimum": 10**400, "exclusiveMaximum": 1}, "schema")
    small = {"minimum": -0.5, "exclusiveMaximum": 2**53, "maximum": 1e3}
    assert checked_schema(small, "schema") == small


def test_draft_4_says_exclusive_with_true() -> None:
    schema = {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": False}
    assert schema_accepts(schema, "3", "4", "9", "10") == [False, True, True, False]


@pytest.mark.parametrize(
    "schema",
    [
        {"exclusiveMinimum": 3, "exclusiveMaximum": 3.5},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.25},
        {"type": ["number", "null"], "minimum": -1.5, "exclusiveMaximum": -1},
        {"type": "number", "minimum": 3, "exclusiveMinimum": True, "maximum": 3.5},
    ],
)
def test_bounds_that_the_library_forgets_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="same integer part"):
        checked_schema(schema, "schema")
    assert checked_schema({**schema, "type": "integer"}, "schema")


@pytest.mark.parametrize("low", [-10, -1.5, -1, -0.5, 0, 0.25, 1, 3, 99])
@pytest.mark.parametrize("width", [0.25, 0.5, 1, 2.5, 100])
def test_exclusive_bounds_are_kept_or_refused(low: float, width: float) -> None:
    for kinds in (("minimum", "exclusiveMaximum"), ("exclusiveMinimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")):
        schema = {"type": "number", kinds[0]: low, kinds[1]: low + width}
        try:
            checked_schema(schema, "schema")
        except InvalidRequest:
            continue
        for value, exclusive in ((low, kinds[0]), (low + width, kinds[1])):
            texts = [json.dumps(value), json.dumps(float(value))]
            assert not exclusive.startswith("exclusive") or schema_accepts(schema, *texts) == [False, False], schema


def test_one_of_objects_told_apart_by_a_tag() -> None:
    """As pydantic writes a discriminated union; the library itself refuses references there."""
    animals = {
        name: {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"], "additionalProperties": False}
        for name in ("cat", "dog")
    }
    schema = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": animals}
    assert schema_accepts(schema, '{"kind":"cat"}', '{"kind": "dog"}', '{"kind":"cow"}') == [True, True, False]
    assert "oneOf" in checked_schema({"oneOf": [animals["cat"], animals["cat"]]}, "schema")


def test_a_schema_that_is_too_deep_or_not_finite() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH // 2 + 1):
        deep = {"items": {"allOf": [deep]}}
    with pytest.raises(InvalidRequest, match="nested deeper than 100"):
        checked_schema(deep, "schema")
    with pytest.raises(InvalidRequest, match="not finite"):
        spec_of(structured_outputs={"json": {"minimum": float("inf")}})


def test_whitespace_is_bounded() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"], "additionalProperties": False}
    good = ['{"a":[1,2]}', '{"a": [1, 2]}', '{\n  "a": [\n    1\n  ]\n}', '{ "a" : [ 1 ] }', '{"a":\n' + " " * 20 + "[]}"]
    bad = ['{"a":  []}', '{"a":\n\n[]}', '{"a":\n' + " " * 21 + "[]}", '{"a":\t[]}', '{"a":[]} ', ' {"a":[]}', '{"a": \n[]}']
    assert schema_accepts(schema, *good, *bad) == [True] * len(good) + [False] * len(bad)


def test_what_the_engine_says_of_a_grammar_names_the_field(api: Api) -> None:
    def refuse() -> None:
        api.client.refusal = InvalidRequest("the grammar cannot be used: it is too large")

    fields: list[tuple[dict[str, object], str]] = [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ]
    for fields_given, name in fields:
        refuse()
        response = api.complete(prompt="a", **fields_given)
        assert response.status_code == 400 and response.json()["error"]["param"] == name
    refuse()
    body = {"input": "a", "text": {"format": {"type": "json_object"}}}
    assert api.request("POST", "/v1/responses", json=body).json()["error"]["param"] == "text.format"
    refuse()
    assert api.complete(prompt="a").json()["error"]["param"] is None
