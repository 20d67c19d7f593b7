"""The tools of a chat request: their types, and what has to be right about them before a model hears of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import WithJsonSchema

from engine.errors import InvalidRequest
from server.api.body import RequestBody, WrongType, json_type
from server.api.conversation import NamedFunction, ToolChoice
from server.api.json_schema import checked_schema, lenient_schema
from server.parsers.base import FunctionTool

MAX_TOOLS = 128
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_NAMED_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
_ALLOWED_TOOLS_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _NAMED_FUNCTION_SCHEMA},
            },
        },
    },
}
GivenToolChoice = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_FUNCTION_SCHEMA, _ALLOWED_TOOLS_SCHEMA]})
]


_INSIDE_NAMED_FUNCTION: dict[str, Any] = {"type": {}, "function": {"name": {}}}
INSIDE_TOOL_CHOICE = {**_INSIDE_NAMED_FUNCTION, "allowed_tools": {"mode": {}, "tools": [_INSIDE_NAMED_FUNCTION]}}


class ChatFunction(RequestBody):
    """parameters: a JSON schema of an object; none for a function without arguments. strict: calls follow the schema exactly,
    also those that the model makes of its own accord."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class ChatTool(RequestBody):
    """type: "function"; OpenAI's custom tools are refused."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"custom": ()}

    type: str
    function: ChatFunction | None = None


def function_tools(tools: Sequence[ChatTool]) -> list[FunctionTool]:
    """Raises InvalidRequest naming the field."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools may hold at most {MAX_TOOLS} tools, got {len(tools)}.", param="tools")
    checked = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if tool.type != "function":
            raise InvalidRequest(
                f'{where}.type must be "function": this server knows no other tools.',
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        if tool.function is None:
            raise InvalidRequest(f"{where}.function is missing.", param=f"{where}.function", code="missing_required_parameter")
        function = tool.function
        checked.append(FunctionTool(function.name, function.description, function.parameters, function.strict))
    check_functions(checked, "tools[{index}].function")
    return checked


def check_functions(tools: Sequence[FunctionTool], where: str) -> None:
    """Adds the schemas that grammars take. where: the path of a function, with {index}. Raises InvalidRequest for names that no
    function may have or that are there twice, and for parameters that describe no object, or not what a strict function can be
    held to."""
    first_with: dict[str, int] = {}
    for index, tool in enumerate(tools):
        path = where.format(index=index)
        if not FUNCTION_NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{path}.name must be 1 to 64 letters (a-z, A-Z), digits, underscores and dashes.", param=f"{path}.name"
            )
        if (first := first_with.setdefault(tool.name, index)) != index:
            raise InvalidRequest(
                f"{path}.name is that of {where.format(index=first)} too: names must be different.", param=f"{path}.name"
            )
        _check_parameters(tool, f"{path}.parameters")


def _check_parameters(tool: FunctionTool, param: str) -> None:
    if not tool.parameters:
        return
    kind = tool.parameters.get("type", "object")
    if kind != "object":
        got = "another one" if isinstance(kind, str) else json_type(kind)
        raise InvalidRequest(f'{param} must be a schema of type "object", got {got}.', param=param)
    properties = tool.parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise WrongType(f"{param}.properties must be an object, got {json_type(properties)}.", param=f"{param}.properties")
    required = tool.parameters.get("required", [])
    if not isinstance(required, list) or any(not isinstance(name, str) for name in required):
        raise InvalidRequest(f"{param}.required must be an array of strings.", param=f"{param}.required")
    tool.grammar_schema = checked_schema(tool.parameters, param) if tool.strict else lenient_schema(tool.parameters)


def choose_tools(tools: list[FunctionTool], given: object) -> tuple[list[FunctionTool], ToolChoice]:
    """The tools that may be called, and how, as the field `tool_choice` says. Raises InvalidRequest naming the field."""
    if given is None:
        return tools, "auto" if tools else "none"
    if given == "none" or (given == "auto" and tools):
        return tools, "none" if given == "none" else "auto"
    if given == "auto":
        return tools, "none"
    if given == "required":
        _require_tools(tools)
        return tools, "required"
    if not isinstance(given, Mapping):
        got = "another string" if isinstance(given, str) else json_type(given)
        raise InvalidRequest(f'tool_choice must be "none", "auto", "required" or an object, got {got}.', param="tool_choice")
    _require_tools(tools)
    match given.get("type"):
        case "function":
            name = _function_name(given, "tool_choice")
            _find(tools, name, "tool_choice.function.name")
            return tools, NamedFunction(name)
        case "allowed_tools":
            return _allowed_tools(tools, given.get("allowed_tools"))
    raise InvalidRequest('tool_choice.type must be "function" or "allowed_tools".', param="tool_choice.type")


def _allowed_tools(tools: list[FunctionTool], given: object) -> tuple[list[FunctionTool], ToolChoice]:
    where = "tool_choice.allowed_tools"
    if not isinstance(given, Mapping):
        raise WrongType(f"{where} must be an object, got {json_type(given)}.", param=where)
    mode, allowed = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f'{where}.mode must be "auto" or "required".', param=f"{where}.mode")
    if not isinstance(allowed, list) or not allowed:
        got = "an empty one" if allowed == [] else json_type(allowed)
        raise InvalidRequest(f"{where}.tools must be an array of tools, got {got}.", param=f"{where}.tools")
    names = set()
    for index, item in enumerate(allowed):
        path = f"{where}.tools[{index}]"
        if not isinstance(item, Mapping):
            raise WrongType(f"{path} must be an object, got {json_type(item)}.", param=path)
        name = _function_name(item, path)
        _find(tools, name, f"{path}.function.name")
        names.add(name)
    return [tool for tool in tools if tool.name in names], "auto" if mode == "auto" else "required"


def _function_name(given: Mapping[str, object], where: str) -> str:
    function = given.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{where}.function.name must be a string.", param=f"{where}.function.name")
    return name


def _find(tools: Sequence[FunctionTool], name: str, param: str) -> None:
    if all(tool.name != name for tool in tools):
        raise InvalidRequest(f"{param} is the name of none of the tools.", param=param)


def _require_tools(tools: Sequence[FunctionTool]) -> None:
    if not tools:
        raise InvalidRequest("tool_choice is allowed only with tools.", param="tool_choice")
