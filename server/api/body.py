"""A request body: strict JSON, then types, then what is left over. Errors name place and type of the input, never repeat it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from starlette.requests import Request

from engine.errors import InvalidRequest
from server.api.json_depth import structure_fault
from server.config_sources import nearest
from server.errors import BodyTooLarge

IGNORED_FIELDS_HEADER = "X-Octavo-Ignored-Fields"
MAX_LISTED_FIELDS = 32

_JSON_TYPES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


# By pydantic's names of its errors.
_MUST_BE = {
    "bool_type": "a boolean",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
# And what of their context says how far it goes.
_OUT_OF_RANGE = {
    "literal_error": ("expected", "must be {}, got another string"),
    "greater_than_equal": ("ge", "must be at least {}, got less"),
    "less_than_equal": ("le", "must be at most {}, got more"),
    "too_short": ("min_length", "must hold at least {}, got {got}"),
    "too_long": ("max_length", "may hold at most {}, got {got}"),
    "string_too_short": ("min_length", "must have at least {} characters, got fewer"),
    "string_too_long": ("max_length", "may have at most {} characters, got more"),
    "string_pattern_mismatch": ("pattern", "must match the pattern {}, got another string"),
}


class WrongType(InvalidRequest):
    default_code = "invalid_type"


class BodyLimits(NamedTuple):
    """What is read of a body, in app.state.body_limits. Its bytes would be held in memory several times over."""

    max_bytes: int
    max_depth: int


class RequestBody(BaseModel):
    """Base of the request types. Types are taken strictly ("0.5" is no number, true is no integer).

    UNSUPPORTED: known fields of the API that are refused -> values that ask for nothing, and so are accepted.
    INSTEAD: which field does what one of these would, for the refusal's text.
    WITHOUT_EFFECT: known fields that are accepted, and change nothing here; declared nowhere else, they may hold anything.
    INSIDE: names known inside of fields that are declared as anything, each with those inside of it; in a list, of its items.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    INSTEAD: ClassVar[dict[str, str]] = {}
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset()
    INSIDE: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, value: object) -> object:
        return without_nulls(value) if isinstance(value, dict) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the fields that have no effect, for the document at /docs."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name in sorted(cls.WITHOUT_EFFECT):
            properties.setdefault(name, {"title": name, "description": "Accepted without effect."})
        return schema


Body = TypeVar("Body", bound=RequestBody)


def json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), "something else")


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as an object, without the fields that are null: null means not given. Raises InvalidRequest, BodyTooLarge."""
    limits: BodyLimits = request.app.state.body_limits
    content = await _read_body(request, limits.max_bytes)
    if fault := structure_fault(content, limits.max_depth):
        raise InvalidRequest(f"The body {fault}.", code="invalid_json")
    try:
        data = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # The decoder's messages give byte positions, not content; UnicodeDecodeError's would give the bytes.
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8"
        raise InvalidRequest(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {json_type(data)}.", code="invalid_json")
    return without_nulls(data)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Reads nothing of a body that is announced as too large, and else stops where the limit is passed. Raises BodyTooLarge."""
    too_large = BodyTooLarge(f"The body is more than {max_bytes:,} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:  # isdecimal: int() takes signs and underscores too
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def validate(body_type: type[Body], data: dict[str, Any], *, strict: bool) -> tuple[Body, dict[str, str]]:
    """The request, and the response header that lists fields that change nothing ({} without any): unknown ones, and those
    of WITHOUT_EFFECT.

    Raises InvalidRequest for wrong types, for fields that are not supported, and with `strict` for unknown ones.
    """
    try:
        body = body_type.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error) from None
    ignored = []
    for owner, path, name, value in _undeclared_fields(body, ""):
        if name in owner.UNSUPPORTED:
            if value not in owner.UNSUPPORTED[name]:
                hint = f"; use {owner.INSTEAD[name]}" if name in owner.INSTEAD else ""
                raise InvalidRequest(f"{path} is not supported{hint}.", param=path, code="unsupported_parameter")
            continue
        if strict and name not in owner.WITHOUT_EFFECT:
            hint = nearest(name, type(owner).model_fields)
            raise InvalidRequest(f"Unknown field {path}{hint}.", param=path, code="unknown_field")
        ignored.append(path)
    if not ignored:
        return body, {}
    listed = ignored[:MAX_LISTED_FIELDS]
    if len(ignored) > MAX_LISTED_FIELDS:
        listed.append(f"+{len(ignored) - MAX_LISTED_FIELDS} more")
    return body, {IGNORED_FIELDS_HEADER: ", ".join(listed)}


def _undeclared_fields(body: RequestBody, prefix: str) -> Iterator[tuple[RequestBody, str, str, Any]]:
    """(object, path, name, value) of every field that is given and that its type does not declare; null is not given."""
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            yield body, _safe_name(prefix + name), name, value
    for name in body.model_fields_set & type(body).model_fields.keys():
        value = getattr(body, name)
        if name in body.INSIDE:
            yield from _unknown_inside(body, value, body.INSIDE[name], prefix + name)
        if isinstance(value, RequestBody):
            yield from _undeclared_fields(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], RequestBody):
            for index, item in enumerate(value):
                if isinstance(item, RequestBody):
                    yield from _undeclared_fields(item, f"{prefix}{name}[{index}].")


def _unknown_inside(owner: RequestBody, value: Any, known: Any, path: str) -> Iterator[tuple[RequestBody, str, str, Any]]:
    if isinstance(value, dict) and isinstance(known, dict):
        for name, item in value.items():
            if name in known:
                yield from _unknown_inside(owner, item, known[name], f"{path}.{name}")
            elif item is not None:
                yield owner, _safe_name(f"{path}.{name}"), name, item
    elif isinstance(value, list) and isinstance(known, list):
        for index, item in enumerate(value):
            yield from _unknown_inside(owner, item, known[0], f"{path}[{index}]")


def _safe_name(path: str) -> str:
    """A header may carry only plain ASCII, and field names come from outside."""
    return re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", path[:64])


def invalid_request(error: ValidationError, prefix: str = "") -> InvalidRequest:
    """The first of pydantic's errors, without the input. prefix: path of what was validated, where that was no whole body."""
    first = error.errors(include_url=False)[0]
    path = prefix
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    path = _safe_name(path.lstrip("."))
    kind, context, got = first["type"], first.get("ctx", {}), json_type(first["input"])
    if kind == "missing":
        return InvalidRequest(f"{path} is missing.", param=path, code="missing_required_parameter")
    if kind in _MUST_BE:
        return WrongType(f"{path} must be {_MUST_BE[kind]}, got {got}.", param=path)
    if kind == "literal_error" and not isinstance(first["input"], str):
        return WrongType(f"{path} must be {context['expected']}, got {got}.", param=path)
    if kind in _OUT_OF_RANGE:
        name, reason = _OUT_OF_RANGE[kind]
        return InvalidRequest(f"{path} {reason.format(context[name], got=context.get('actual_length'))}.", param=path)
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return InvalidRequest(f"{path}: {reason}, got {got}.", param=path)
