"""The fields of requests, from three sides: OpenAI's types, ours, and the tables of docs/api.md. Paths are written
`messages[].tool_calls[].id`."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typing_extensions
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.api.body import RequestBody
from server.api.chat_request import ChatRequest, ContentPart
from server.api.completions import CompletionRequest
from server.api.embeddings import EmbeddingRequest
from server.api.responses_input import GivenItem
from server.api.responses_request import ResponseRequest
from server.api.tokenize import DetokenizeRequest, TokenizeRequest

DOCS = Path(__file__).parent.parent / "docs" / "api.md"
SPECIFICATION: dict[str, Any] = {
    "completions": completion_create_params.CompletionCreateParamsStreaming,
    "chat": chat_create_params.CompletionCreateParamsStreaming,
    "responses": response_create_params.ResponseCreateParamsStreaming,
    "embeddings": embedding_create_params.EmbeddingCreateParams,
}
REQUESTS: dict[str, type[RequestBody]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "responses": ResponseRequest,
    "embeddings": EmbeddingRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
}
# Types behind fields that are read by hand.
_BEHIND: dict[tuple[str, str], tuple[type[RequestBody], ...]] = {
    ("chat", "messages[].content"): (ContentPart,),
    ("responses", "input"): get_args(GivenItem),
}
# Objects whose fields are the caller's own.
_FREE = {"response_format.json_schema.schema", "tools[].function.parameters"}
_KIND_FIELDS = ("type", "role")


@dataclass(frozen=True)
class Row:
    """One field of one endpoint, as the docs have it; cells as written. accepted: of refused ones, the values that are not."""

    status: str
    range: str = ""
    default: str = ""
    accepted: str = ""


@dataclass(frozen=True)
class Kind:
    """A field that says of which kind an object is. refused: None for whatever is not taken."""

    taken: frozenset[str]
    refused: frozenset[str] | None


def tables() -> Iterator[tuple[list[str], list[list[str]]]]:
    """(heads, rows) of every table of the page."""
    for block in re.findall(r"(?:^\|.*\n)+", DOCS.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        yield head, rows


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", cell)]


def documented() -> dict[tuple[str, str], Row]:
    """(endpoint, path) -> its row. AssertionError where one stands there twice."""
    found: dict[tuple[str, str], Row] = {}
    for head, rows in tables():
        if head[:2] != ["field", "where"] or "status" not in head:
            continue
        for cells in rows:
            cell = dict(zip(head, cells, strict=True))
            row = Row(cell["status"], cell.get("range", ""), cell.get("default", ""), cell.get("accepted", ""))
            for path in quoted(cell["field"]):
                for endpoint in cell["where"].split(", "):
                    assert (endpoint, path) not in found, f"{path} of {endpoint} stands there twice"
                    found[endpoint, path] = row
    return found


def documented_kinds() -> dict[tuple[str, str], Kind]:
    found = {}
    for head, rows in tables():
        if head == ["field", "where", "taken", "refused"]:
            for field, where, taken, refused in rows:
                others = None if refused.startswith("all others") else frozenset(quoted(refused))
                found[where, quoted(field)[0]] = Kind(frozenset(quoted(taken)), others)
    return found


def our_fields(endpoint: str) -> dict[str, str]:
    """Path -> status, by the request types."""
    found: dict[str, str] = {}
    for path, status in _fields_of(endpoint, REQUESTS[endpoint], ""):
        found[path] = status if found.get(path, status) == status else "both"
    return found


def _fields_of(endpoint: str, body_type: type[RequestBody], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in body_type.model_fields.items():
        path = prefix + (field.alias or name)
        yield path, "no effect" if name in body_type.WITHOUT_EFFECT else "done"
        inner = [(suffix, cls) for suffix, cls in _types_in(field.annotation) if issubclass(cls, RequestBody)]
        for suffix, cls in [*inner, *(("[]", cls) for cls in _BEHIND.get((endpoint, path), ()) if not inner)]:
            yield from _fields_of(endpoint, cls, f"{path}{suffix}.")
    for name in body_type.UNSUPPORTED:
        yield prefix + name, "refused"
    for name in body_type.WITHOUT_EFFECT:
        yield prefix + name, "no effect"


def specified_fields(endpoint: str, rows: dict[tuple[str, str], Row], kinds: dict[tuple[str, str], Kind]) -> set[str]:
    """The paths of OpenAI's types: all at the top, and below it those of objects that are taken."""
    return set(_specified(endpoint, [SPECIFICATION[endpoint]], "", rows, kinds, ())) if endpoint in SPECIFICATION else set()


def _specified(
    endpoint: str,
    typed_dicts: list[Any],
    prefix: str,
    rows: dict[tuple[str, str], Row],
    kinds: dict[tuple[str, str], Kind],
    above: tuple[Any, ...],
) -> Iterator[str]:
    for typed_dict in typed_dicts:
        hints = typing_extensions.get_type_hints(typed_dict)
        if typed_dict in above or not _is_taken(endpoint, hints, prefix, kinds):
            continue
        for name, hint in hints.items():
            path = prefix + name
            yield path
            row = rows.get((endpoint, path))
            if row is None or row.status != "done" or path in _FREE:
                continue
            inner: dict[str, list[Any]] = {}
            for suffix, cls in _types_in(hint):
                if typing_extensions.is_typeddict(cls):
                    inner.setdefault(suffix, []).append(cls)
            for suffix, found in inner.items():
                yield from _specified(endpoint, found, f"{path}{suffix}.", rows, kinds, (*above, typed_dict))


def _is_taken(endpoint: str, hints: dict[str, Any], prefix: str, kinds: dict[tuple[str, str], Kind]) -> bool:
    for name in _KIND_FIELDS:
        kind, values = kinds.get((endpoint, prefix + name)), literals(hints.get(name))
        if kind is not None and values:
            return bool(kind.taken & values)
    return True


def specified_kinds(endpoint: str, rows: dict[tuple[str, str], Row], kinds: dict[tuple[str, str], Kind]) -> dict[str, set[str]]:
    """Path of a field that says of which kind an object is -> OpenAI's values; only where there are several objects."""
    found: dict[str, set[str]] = {}
    for path, typed_dicts in _unions(endpoint, [SPECIFICATION[endpoint]], "", rows, kinds, ()):
        for name in _KIND_FIELDS:
            values = [literals(typing_extensions.get_type_hints(cls).get(name)) for cls in typed_dicts]
            if all(values) and len(set(map(frozenset, values))) > 1:
                found.setdefault(f"{path}{name}", set()).update(*values)
                break
    return found


def _unions(
    endpoint: str,
    typed_dicts: list[Any],
    prefix: str,
    rows: dict[tuple[str, str], Row],
    kinds: dict[tuple[str, str], Kind],
    above: tuple[Any, ...],
) -> Iterator[tuple[str, list[Any]]]:
    yield prefix, typed_dicts
    for typed_dict in typed_dicts:
        hints = typing_extensions.get_type_hints(typed_dict)
        if typed_dict in above or not _is_taken(endpoint, hints, prefix, kinds):
            continue
        for name, hint in hints.items():
            row = rows.get((endpoint, prefix + name))
            if row is None or row.status != "done" or prefix + name in _FREE:
                continue
            inner: dict[str, list[Any]] = {}
            for suffix, cls in _types_in(hint):
                if typing_extensions.is_typeddict(cls):
                    inner.setdefault(suffix, []).append(cls)
            for suffix, found in inner.items():
                yield from _unions(endpoint, found, f"{prefix}{name}{suffix}.", rows, kinds, (*above, typed_dict))


def _types_in(hint: Any) -> list[tuple[str, type]]:
    """(suffix, class) of the classes in an annotation; the suffix is [] in a list."""
    origin = get_origin(hint)
    if isinstance(hint, type) and origin is None:
        return [("", hint)]
    if origin is None or origin is Literal or origin is dict:
        return []
    is_plain = origin in (Union, types.UnionType, typing_extensions.Annotated, typing_extensions.Required)
    return [("" + suffix if is_plain else "[]" + suffix, cls) for part in get_args(hint) for suffix, cls in _types_in(part)]


def literals(hint: Any) -> set[str]:
    """The values of every Literal in an annotation."""
    if get_origin(hint) is Literal:
        return {value for value in get_args(hint) if isinstance(value, str)}
    return {value for part in get_args(hint) for value in literals(part)}
