"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs`, and the StructuredSpec of them."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field, WithJsonSchema

from engine.detokenizer import check_unicode
from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from server.api.body import RequestBody, json_type
from server.api.json_schema import checked_schema, schema_text
from server.api.regex import with_ascii_classes

MAX_CHARACTERS = 2**20
# The library's converter is plain Python: what it is given takes it a fraction of a second at most.
MAX_GBNF_CHARACTERS = 2**15
MAX_GBNF_RULES = 500

_KINDS = ("json", "json_object", "regex", "choice", "grammar")

SchemaOrText = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})]


class JsonSchemaFormat(RequestBody):
    """`strict` or not, the answer follows the schema."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"description"})

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """type: "text", "json_object" or "json_schema"."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestBody):
    """Exactly one of these. json: a schema, or its text. grammar: Lark as llguidance reads it, or GBNF."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"disable_fallback"})

    json_: SchemaOrText = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class StructuredFields(RequestBody):
    """The fields of a request that say what the answer must look like. guided_*: older names of those in structured_outputs."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structured_spec(self) -> StructuredSpec | None:
        """None where the answer is free text. Raises InvalidRequest naming the field."""
        guided = self._guided()
        if guided and self.structured_outputs is not None:
            name = self._guided_names()[0]
            raise InvalidRequest(f"{name} and structured_outputs exclude each other; give one of them.", param=name)
        if len(guided) > 1:
            names = self._guided_names()
            raise InvalidRequest(f"{' and '.join(names)} exclude each other; give one of them.", param=names[1])
        outputs = StructuredOutputs(**guided) if guided else self.structured_outputs
        prefix = "guided_" if guided else "structured_outputs."
        return structured_spec(self.response_format, outputs, prefix=prefix)

    def structured_field(self) -> str | None:
        """The field that says what the answer must look like; None where it is free text."""
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        return "structured_outputs" if self.structured_outputs is not None else next(iter(self._guided_names()), None)

    def _guided_names(self) -> list[str]:
        return [f"guided_{kind}" for kind in self._guided()]

    def _guided(self) -> dict[str, Any]:
        values = {kind: getattr(self, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")}
        return {kind: value for kind, value in values.items() if value is not None}


def structured_spec(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    *,
    prefix: str = "structured_outputs.",
) -> StructuredSpec | None:
    """None where both leave the answer free. prefix: of the fields of `structured_outputs` in errors. Raises InvalidRequest."""
    spec = None if response_format is None else _from_response_format(response_format)
    if structured_outputs is None:
        return spec
    if spec is not None:
        other = "structured_outputs" if prefix.endswith(".") else f"{prefix}*"
        raise InvalidRequest(f"response_format and {other} exclude each other; give one of them.", param="response_format")
    return _from_structured_outputs(structured_outputs, prefix)


def json_schema_spec(schema: object, param: str) -> StructuredSpec:
    """An answer that is JSON as the schema says. Raises InvalidRequest of `param`."""
    return StructuredSpec("json_schema", schema_text(checked_schema(schema, param), param))


def json_object_spec() -> StructuredSpec:
    """Any JSON object."""
    return json_schema_spec({"type": "object"}, "response_format")


def to_lark(spec: StructuredSpec) -> str:
    """The same as Lark, beginning at its rule `start`, to be part of a larger grammar."""
    match spec.kind:
        case "json_schema":
            return f"start: %json {spec.text}"
        case "choice":
            return f"start: CHOICE\nCHOICE: {' | '.join(lark_string(choice) for choice in json.loads(spec.text))}"
        case "regex":
            import llguidance  # late: most servers never need it

            return f"start: /{llguidance.regex_to_lark(spec.text, '')}/"
    return spec.text


def lark_string(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _from_response_format(response_format: ResponseFormat) -> StructuredSpec | None:
    match response_format.type:
        case "text":
            return None
        case "json_object":
            return json_object_spec()
        case "json_schema":
            if response_format.json_schema is None:
                raise InvalidRequest(
                    "response_format.json_schema is missing.",
                    param="response_format.json_schema",
                    code="missing_required_parameter",
                )
            schema = response_format.json_schema.schema_
            if schema is None:
                return json_object_spec()
            return json_schema_spec(schema, "response_format.json_schema.schema")
    raise InvalidRequest(
        "response_format.type must be text, json_object or json_schema.",
        param="response_format.type",
        code="unsupported_parameter" if response_format.type == "structural_tag" else None,
    )


def _from_structured_outputs(outputs: StructuredOutputs, prefix: str) -> StructuredSpec:
    given = {name: getattr(outputs, "json_" if name == "json" else name) for name in _KINDS}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if len(given) != 1:
        param = prefix.rstrip("._")
        raise InvalidRequest(f"{param} must hold exactly one of {', '.join(_KINDS)}, got {len(given)}.", param=param)
    [(name, value)] = given.items()
    param = prefix + name
    match name:
        case "json":
            return json_schema_spec(_parsed(value, param) if isinstance(value, str) else value, param)
        case "json_object":
            return json_object_spec()
        case "choice":
            return StructuredSpec("choice", _checked_choices(value, param))
        case "regex":
            return StructuredSpec("regex", with_ascii_classes(_checked_text(value, param)))
    return StructuredSpec("lark", _as_lark(_checked_text(value, param), param))


def _parsed(text: str, param: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise InvalidRequest(f"{param} is a string that is not valid JSON.", param=param) from None


def _checked_text(text: str, param: str) -> str:
    check_unicode(text, param)
    if not text:
        raise InvalidRequest(f"{param} must not be empty.", param=param)
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(f"{param} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed.", param=param)
    return text


def _checked_choices(choices: list[str], param: str) -> str:
    if not choices:
        raise InvalidRequest(f"{param} must hold at least one string.", param=param)
    for choice in choices:
        if not isinstance(choice, str):
            raise InvalidRequest(f"{param} must be an array of strings, got {json_type(choice)} in it.", param=param)
    return _checked_text(json.dumps(choices, ensure_ascii=False), param)


def _as_lark(grammar: str, param: str) -> str:
    """GBNF (llama.cpp's form) is told by its `::=`."""
    if "::=" not in grammar or re.search(r"(?m)^\s*(%llguidance\b|start\s*:)", grammar):
        return grammar
    if len(grammar) > MAX_GBNF_CHARACTERS or grammar.count("::=") > MAX_GBNF_RULES:
        raise InvalidRequest(
            f"{param} in the form of GBNF may have {MAX_GBNF_CHARACTERS:,} characters and {MAX_GBNF_RULES} rules at most; "
            "write larger ones in Lark.",
            param=param,
        )
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(_without_unicode_escapes(grammar))
    except GbnfToLarkError as error:
        place = re.search(r"line \d+", str(error))
        where = f" in {place[0]}" if place else ""
        raise InvalidRequest(f"{param} is not valid GBNF: it cannot be read{where}.", param=param) from None
    except Exception as error:  # the library raises a bare Exception for rules that are missing or there twice
        reason = re.sub(r"'[^']*'", "of that name", str(error)) if not isinstance(error, RecursionError) else "nested too deep"
        raise InvalidRequest(f"{param} is not valid GBNF: {reason}.", param=param) from None
    check_unicode(lark, param)
    return lark


def _without_unicode_escapes(grammar: str) -> str:
    """Characters beyond ASCII as themselves: the converter spoils their escapes."""

    def replace(match: re.Match[str]) -> str:
        code = int(match[1] or match[2], 16) if match[1] or match[2] else -1
        return match[0] if not 0 <= code < 0x110000 else chr(code) if code >= 0x80 else f"\\x{code:02x}"

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", replace, grammar)
