"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, WithJsonSchema, field_validator

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from server.api.body import RequestBody, json_type
from server.api.conversation import NamedFunction, ToolChoice
from server.api.responses_input import GivenItem, parse_input
from server.api.sampling import Integer, SamplingRequest, check_logprobs
from server.api.structured import StructuredOutputs, json_object_spec, json_schema_spec, structured_spec
from server.api.tools import MAX_TOOLS, check_functions
from server.parsers.base import FunctionTool

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"

_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {"type": "object", "properties": {"type": {"const": "function"}, "name": {"type": "string"}}},
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": {"type": "object"}},
            },
        },
    ]
}


class ResponseTool(RequestBody):
    """A function, in this API's flat form."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"output_schema"})

    type: Literal["function"]
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class TextFormat(RequestBody):
    """name, schema: of json_schema, which the answer follows, `strict` or not."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"description"})

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(RequestBody):
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"verbosity"})

    format: TextFormat = TextFormat(type="text")


class ReasoningConfig(RequestBody):
    """effort: for the chat template. There are no summaries: the thoughts themselves are in the answer."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary", "context", "mode"})

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponseStreamOptions(RequestBody):
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})


class ResponseRequest(SamplingRequest):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingRequest.UNSUPPORTED,
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "prompt": (),
        # What chat completions call by these names has others here, or is not there.
        "messages": (),
        "max_tokens": (),
        "max_completion_tokens": (),
        "n": (1,),
        "logprobs": (False,),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = (SamplingRequest.WITHOUT_EFFECT - {"metadata", "store"}) | {
        "image",  # how images are compressed: there are none
        "max_tool_calls",  # of the built-in tools: there are none
    }
    INSIDE: ClassVar[dict[str, Any]] = {
        "tool_choice": {"type": {}, "name": {}, "mode": {}, "tools": [{"type": {}, "name": {}}]}
    }

    input: str | list[GivenItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, str] = {}
    max_output_tokens: Integer | None = None
    top_logprobs: Integer = 0
    include: list[
        Literal[
            "message.output_text.logprobs",
            "reasoning.encrypted_content",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
        ]
    ] = []
    tools: list[ResponseTool] = []
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE_SCHEMA)] = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    truncation: Literal["auto", "disabled"] = "disabled"
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] = {}
    stream_options: ResponseStreamOptions | None = None

    @field_validator("input", mode="plain", json_schema_input_type=str | list[GivenItem])
    @classmethod
    def _parse_input(cls, value: object) -> str | list[GivenItem]:
        return parse_input(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _only_functions(cls, value: object) -> object:
        """The other tools are OpenAI's own; said before their fields are looked at."""
        for index, tool in enumerate(value if isinstance(value, list) else ()):
            if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
                where = f"tools[{index}].type"
                raise InvalidRequest(
                    f"{where} must be function: this server has no built-in tools.", param=where, code="unsupported_parameter"
                )
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) > MAX_METADATA or any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
            raise ValueError(f"may hold {MAX_METADATA} keys of at most 64 characters, and values of at most 512")
        return value

    def structured_field(self) -> str | None:
        if self.structured_outputs is not None:
            return "structured_outputs"
        return None if self.text.format.type == "text" else "text.format"

    @property
    def ignored_includes(self) -> list[str]:
        """What `include` asks for that there is not: results of built-in tools; reasoning that only the server can read."""
        return [f"include[{index}]" for index, name in enumerate(self.include) if name != LOGPROBS]

    def num_logprobs(self) -> int | None:
        """Best tokens to list, None when logprobs are off. Raises InvalidRequest."""
        check_logprobs(self.top_logprobs, "top_logprobs")
        if LOGPROBS in self.include:
            return self.top_logprobs
        if self.top_logprobs:
            raise InvalidRequest(f'top_logprobs is allowed only with include: ["{LOGPROBS}"].', param="top_logprobs")
        return None

    def output_tokens(self) -> int | None:
        """The limit asked for. Raises InvalidRequest."""
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequest(
                f"max_output_tokens must be at least 1, got {self.max_output_tokens}.", param="max_output_tokens"
            )
        return self.max_output_tokens

    def structured(self) -> StructuredSpec | None:
        """What the answer's text must look like; None where it is free. Raises InvalidRequest."""
        chosen = self.text.format
        if chosen.type == "text":
            return structured_spec(None, self.structured_outputs)
        if self.structured_outputs is not None:
            raise InvalidRequest(
                "text.format and structured_outputs exclude each other; give one of them.", param="text.format"
            )
        if chosen.type == "json_object":
            return json_object_spec()
        for name, value in (("name", chosen.name), ("schema", chosen.schema_)):
            if value is None:
                param = f"text.format.{name}"
                raise InvalidRequest(f"{param} is missing.", param=param, code="missing_required_parameter")
        return json_schema_spec(chosen.schema_, "text.format.schema")

    def functions(self) -> list[FunctionTool]:
        """The functions that may be called. Raises InvalidRequest."""
        if len(self.tools) > MAX_TOOLS:
            raise InvalidRequest(f"tools may hold at most {MAX_TOOLS} tools, got {len(self.tools)}.", param="tools")
        given = [FunctionTool(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools]
        check_functions(given, "tools[{index}]")
        allowed = self.tool_choice.get("tools") if self._allows_some() else None
        if allowed is None:
            return given
        names = [tool.get("name") if isinstance(tool, dict) else None for tool in allowed] if isinstance(allowed, list) else []
        known = {tool.name for tool in given}
        if not names or any(not isinstance(name, str) or name not in known for name in names):
            raise InvalidRequest("tool_choice.tools must name functions of tools, one or several.", param="tool_choice")
        return [tool for tool in given if tool.name in names]

    def choice(self) -> ToolChoice:
        """Raises InvalidRequest for what is no choice, and for one that there are no tools for."""
        choice = self.tool_choice
        if self._allows_some():
            choice = choice.get("mode")
            if choice not in ("auto", "required"):
                raise InvalidRequest("tool_choice.mode must be auto or required.", param="tool_choice")
        if choice in ("none", "auto") or (choice == "required" and self.tools):
            return cast(ToolChoice, choice)
        if choice == "required":
            raise InvalidRequest("tool_choice may be required only where there are tools.", param="tool_choice")
        if isinstance(choice, dict) and choice.get("type") == "function":
            if choice.get("name") not in [tool.name for tool in self.tools]:
                raise InvalidRequest("tool_choice.name must be that of a function in tools.", param="tool_choice")
            return NamedFunction(choice["name"])
        raise InvalidRequest(
            "tool_choice must be none, auto, required, a function ({type, name}) or allowed_tools "
            f"({{type, mode, tools}}), got {json_type(choice)}.",
            param="tool_choice",
        )

    def _allows_some(self) -> bool:
        return isinstance(self.tool_choice, dict) and self.tool_choice.get("type") == "allowed_tools"
