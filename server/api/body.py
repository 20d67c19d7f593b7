"""A request body: strict JSON, then types, then what is left over. Errors name place and type of the input, never repeat it."""

from __future__ import annotations

import re
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from engine.errors import InvalidRequest
from server.config import nearest
from server.errors import BodyTooLarge

IGNORED_FIELDS_HEADER = "X-Octavo-Ignored-Fields"
MAX_LISTED_FIELDS = 32
# Several million tokens, as text or as ids; more is a mistake, and would be held in memory several times over.
MAX_BODY_BYTES = 64 * 2**20

_JSON_TYPES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


class RequestBody(BaseModel):
    """Base of the request types. Types are taken strictly ("0.5" is no number, true is no integer).

    UNSUPPORTED: known fields of the API that are not built yet -> values that ask for nothing, and so are accepted.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}


Body = TypeVar("Body", bound=RequestBody)


def json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), "something else")


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as an object, without the fields that are null: null means not given. Raises InvalidRequest, BodyTooLarge."""
    content = await _read_body(request)
    try:
        data = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The decoder's messages give byte positions, not content; UnicodeDecodeError's would give the bytes.
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8, or nested too deep"
        raise InvalidRequest(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {json_type(data)}.", code="invalid_json")
    return without_nulls(data)


async def _read_body(request: Request) -> bytes:
    """Stops reading where the limit is passed, whatever Content-Length says. Raises BodyTooLarge."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body is more than {MAX_BODY_BYTES:,} bytes.")
    return bytes(content)


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def validate(body_type: type[Body], data: dict[str, Any], *, strict: bool) -> tuple[Body, dict[str, str]]:
    """The request, and the response header that lists fields nobody knows ({} without any).

    Raises InvalidRequest for wrong types, for fields not supported yet, and with `strict` for unknown ones.
    """
    try:
        body = body_type.model_validate(data)
    except ValidationError as error:
        raise _invalid_request(error) from None
    for name, neutral in body_type.UNSUPPORTED.items():
        if name in data and data[name] not in neutral:
            raise InvalidRequest(f"{name} is not supported yet.", param=name, code="unsupported_parameter")
    unknown = [path for path in _unknown_fields(body, "") if path not in body_type.UNSUPPORTED]
    if not unknown:
        return body, {}
    names = [_safe_name(path) for path in unknown[:MAX_LISTED_FIELDS]]
    if strict:
        hint = nearest(names[0], body_type.model_fields)
        raise InvalidRequest(f"Unknown field {names[0]}{hint}.", param=names[0], code="unknown_field")
    if len(unknown) > MAX_LISTED_FIELDS:
        names.append(f"+{len(unknown) - MAX_LISTED_FIELDS} more")
    return body, {IGNORED_FIELDS_HEADER: ", ".join(names)}


def _unknown_fields(body: BaseModel, prefix: str) -> list[str]:
    found = [prefix + name for name in body.model_extra or ()]
    for name in body.model_fields_set & type(body).model_fields.keys():
        value = getattr(body, name)
        if isinstance(value, BaseModel):
            found += _unknown_fields(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                found += _unknown_fields(item, f"{prefix}{name}[{index}].")
    return found


def _safe_name(path: str) -> str:
    """A header may carry only plain ASCII, and field names come from outside."""
    return re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", path[:64])


def _invalid_request(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    path = _safe_name(path.lstrip("."))
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is missing.", param=path, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return InvalidRequest(f"{path}: {reason}, got {json_type(first['input'])}.", param=path, code="invalid_type")
