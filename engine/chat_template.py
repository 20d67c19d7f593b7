"""Chat templates: the Jinja a model brings along, run in a sandbox with the variables Hugging Face passes.

https://huggingface.co/docs/transformers/chat_templating_writing documents what a template may use. A template is looked at
once (its syntax tree) to learn which of the legal message forms it can take, and messages are brought into that form.

A template that knows no tools has them written into the texts that it does know, in the manner of Hermes: what they are
to the system message, calls to the assistant's text in `<tool_call>`, results to a user message in `<tool_response>`.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest

Message = Mapping[str, Any]

# Ends in space that no template writes of its own accord, which shows whether it trims the message's text.
_OPEN_END = "<octavo:open-end>\t \t"

MAX_ARGUMENTS_DEPTH = 100
_BRACKET_OR_STRING = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\.)*+"?', re.DOTALL)

TIME_LIMIT_S = 5.0
_deadline_s: ContextVar[float] = ContextVar("deadline_s")
"""When (time.monotonic()) the rendering that runs here must have come to its end."""


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training masks; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_time() -> None:
    if time.monotonic() > _deadline_s.get():
        raise jinja2.TemplateError(f"they take it more than {TIME_LIMIT_S:g} seconds")


def _watched(items: Iterable[Any]) -> Iterator[Any]:
    """What a loop of a template runs over."""
    for item in items:
        _check_time()
        yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox with a time limit: a template cannot go on for long without a loop's next round or a call."""

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """What every call in a template becomes, of a macro too."""
        _check_time()
        return super().call(context, obj, *args, **kwargs)

    def compile_watched(self, tree: nodes.Template) -> jinja2.Template:
        """Changes the tree: its loops look at the clock."""
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "watched", [], [], None, None, lineno=loop.lineno)
        return self.from_string(tree)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own `tojson` escapes HTML, which is noise to a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """One compiled template. Raises InvalidRequest (param "chat_template") when it cannot be parsed."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.filters["watched"] = _watched
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            fields = _FieldUses(environment.parse(source))
            self._template = environment.compile_watched(environment.parse(source))
        except Exception as error:  # besides Jinja's own, Python's when it compiles the result: nesting, huge numbers, ...
            raise InvalidRequest(f"the chat template cannot be parsed: {error}", param="chat_template") from error
        self.takes_developer_role = "developer" in source
        self.takes_content_parts = fields.is_iterated("content")
        self.takes_content_string = not self.takes_content_parts or fields.any_test("string")
        self.takes_content_none = fields.is_compared_with_none("content")
        self.takes_arguments_mapping = fields.is_used_as_mapping("arguments")
        self.takes_tools = fields.reads_variable("tools")
        self.takes_tool_calls = fields.mentions("tool_calls")
        self.takes_tool_role = fields.mentions("tool")

    def render(
        self,
        messages: Sequence[Message],
        *,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        tool_block: str = "",
    ) -> str:
        """The prompt. With `continue_final_message` it ends right after the last message's text.

        tool_block: what describes the tools of `variables` to the model where the template does not.

        Raises InvalidRequest (param "messages") with the template's own words where it refuses the messages.
        """
        if not self.takes_tool_calls:
            messages = [_with_calls_as_text(message) for message in messages]
        if not self.takes_tool_role:
            messages = _with_results_as_text(messages)
        if not tool_block or self.takes_tools:
            return self._render_prepared(messages, continue_final_message, variables)
        try:
            rendered = self._render_prepared(_with_system_text(messages, tool_block), continue_final_message, variables)
        except InvalidRequest:
            rendered = ""
        if tool_block in rendered:
            return rendered
        # There is no place for a system message, or it is left out silently.
        return self._render_prepared(_with_user_text(messages, tool_block), continue_final_message, variables)

    def _render_prepared(self, messages: Sequence[Message], continue_final_message: bool, variables: Mapping[str, Any]) -> str:
        prepared = [self._prepare(message, index) for index, message in enumerate(messages)]
        if not continue_final_message:
            return self._render(prepared, variables)
        text = _open_final_message(prepared)
        return _cut_at_open_end(self._render(prepared, variables), text)

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        _deadline_s.set(time.monotonic() + TIME_LIMIT_S)
        try:
            return self._template.render(messages=messages, **variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        except Exception as error:  # a template is a program: it can raise whatever Python can, and that is no fault of ours
            reason = f"{type(error).__name__}: {error}"
            raise InvalidRequest(f"the chat template fails on these messages: {reason}", param="messages") from error

    def _prepare(self, message: Message, index: int) -> dict[str, Any]:
        prepared = dict(message)
        if prepared.get("role") == "developer" and not self.takes_developer_role:
            prepared["role"] = "system"
        prepared["content"] = self._prepare_content(prepared.get("content"), index)
        if self.takes_arguments_mapping and prepared.get("tool_calls"):
            prepared["tool_calls"] = [_parse_arguments(call) for call in prepared["tool_calls"]]
        return prepared

    def _prepare_content(self, content: Any, index: int) -> Any:
        if content is None and self.takes_content_none:
            return None
        texts = _texts_of(content, index)
        if content is None or isinstance(content, str):
            if self.takes_content_string:
                return texts[0]
            return [{"type": "text", "text": texts[0]}] if texts[0] else []
        if self.takes_content_parts:
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> ChatTemplate:
    """Templates come with requests too, mostly the same few."""
    return ChatTemplate(source)


class ChatJob(msgspec.Struct, kw_only=True):
    """A conversation and the template it is to go through: plain data, so that another process can do it."""

    source: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    continue_final_message: bool = False
    tool_block: str = ""

    def render(self) -> str:
        """See ChatTemplate, also for what is raised."""
        return compile_template(self.source).render(
            self.messages,
            continue_final_message=self.continue_final_message,
            variables=self.variables,
            tool_block=self.tool_block,
        )


def _with_calls_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [_parse_arguments(call)["function"] for call in message["tool_calls"]]
    texts = [f"<tool_call>\n{_to_json(_name_and_arguments(call))}\n</tool_call>" for call in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": _joined(message.get("content"), "\n".join(texts), "\n")}


def _name_and_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call.get("name"), "arguments": call.get("arguments")}


def _with_results_as_text(messages: Sequence[Message]) -> list[Message]:
    """Results that follow each other share one message of the user, so that its turns and the assistant's alternate."""
    merged: list[Message] = []
    follows_result = False
    for index, message in enumerate(messages):
        is_result = message.get("role") == "tool"
        if is_result:
            text = "\n".join(_texts_of(message.get("content"), index))
            result = f"<tool_response>\n{text}\n</tool_response>"
            if follows_result:
                merged[-1] = {"role": "user", "content": f"{merged[-1]['content']}\n{result}"}
            else:
                merged.append({"role": "user", "content": result})
        else:
            merged.append(message)
        follows_result = is_result
    return merged


def _with_system_text(messages: Sequence[Message], text: str) -> list[Message]:
    if messages and messages[0].get("role") in ("system", "developer"):
        return [{**messages[0], "content": _joined(messages[0].get("content"), text, "\n\n")}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_user_text(messages: Sequence[Message], text: str) -> list[Message]:
    """In front of what the user says first."""
    for index, message in enumerate(messages):
        if message.get("role") == "user":
            content = f"{text}\n\n" + "\n".join(_texts_of(message.get("content"), index))
            return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
    return [{"role": "user", "content": text}, *messages]


def _joined(content: Any, text: str, separator: str) -> Any:
    if isinstance(content, (list, tuple)):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{separator}{text}" if content else text


def _texts_of(content: Any, index: int) -> list[str]:
    param = "messages"
    where = f"messages[{index}].content"
    if content is None or isinstance(content, str):
        return [content or ""]
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(f"{where} must be a string, null or a list of parts, got {type(content).__name__}", param=param)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InvalidRequest(f"{where} may hold parts of type 'text' only, got {kind!r}", param=param)
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where} has a text part without a string 'text'", param=param)
        texts.append(part["text"])
    return texts


def _parse_arguments(call: Any) -> Any:
    """The API carries a tool call's arguments as a JSON string; templates that look into them want the object.

    Arguments that are no JSON object are the model's own mistake of an earlier turn: the template gets them as they are.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    if _is_deep(function["arguments"]):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _is_deep(text: str) -> bool:
    """Whether JSON nests so deep that whoever follows it may run out of stack: whoever renders, or carries it to a process."""
    depth = 0
    for token in _BRACKET_OR_STRING.finditer(text) if len(text) > MAX_ARGUMENTS_DEPTH else ():
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth > MAX_ARGUMENTS_DEPTH:
            return True
    return False


def _open_final_message(messages: list[dict[str, Any]]) -> str:
    """Marks the end of the last message's text, in place; returns that text."""
    content = messages[-1]["content"] if messages else None
    if not content:
        raise InvalidRequest("continue_final_message needs a last message with text to continue", param="messages")
    if isinstance(content, str):
        messages[-1]["content"] = content + _OPEN_END
        return content
    text: str = content[-1]["text"]
    content[-1] = {**content[-1], "text": text + _OPEN_END}
    return text


def _cut_at_open_end(rendered: str, text: str) -> str:
    end = rendered.rfind(_OPEN_END.rstrip())
    if end < 0:
        raise InvalidRequest(
            "continue_final_message cannot be used: the chat template does not write out the last message's text",
            param="messages",
        )
    if rendered.startswith(_OPEN_END, end):
        return rendered[:end]
    # The template trims: then the text's own trailing space would have gone as well.
    return rendered[:end].removesuffix(text[len(text.rstrip()) :])


class _FieldUses:
    """How a template uses the fields of its messages, read from the syntax tree.

    A field is `x.content`, `x['content']`, `x.get('content')`, the same behind filters or a default, or a name that was
    set to it or takes it as a macro's parameter.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self._names = {field: frozenset(self._find_names(field)) for field in ("content", "arguments")}

    def reads_variable(self, name: str) -> bool:
        return any(node.name == name and node.ctx == "load" for node in self._tree.find_all(nodes.Name))

    def mentions(self, word: str) -> bool:
        """Whether it is a field's name, or written out as a string."""
        return any(node.attr == word for node in self._tree.find_all(nodes.Getattr)) or any(
            node.value == word for node in self._tree.find_all(nodes.Const)
        )

    def is_iterated(self, field: str) -> bool:
        return any(self._is_field(loop.iter, field) for loop in self._tree.find_all(nodes.For))

    def any_test(self, name: str) -> bool:
        return any(test.name == name for test in self._tree.find_all(nodes.Test))

    def is_compared_with_none(self, field: str) -> bool:
        tested = (test.node for test in self._tree.find_all(nodes.Test) if test.name == "none")
        compared = (
            compare.expr
            for compare in self._tree.find_all(nodes.Compare)
            if any(isinstance(op.expr, nodes.Const) and op.expr.value is None for op in compare.ops)
        )
        return any(self._is_field(node, field) for source in (tested, compared) for node in source)

    def is_used_as_mapping(self, field: str) -> bool:
        filtered = (
            node.node
            for node in self._tree.find_all(nodes.Filter)
            if node.name in {"tojson", "items", "dictsort"} and node.node
        )
        called = (node.node for node in self._tree.find_all(nodes.Getattr) if node.attr in {"items", "keys"})
        return any(self._is_field(node, field) for source in (filtered, called) for node in source)

    def _is_field(self, node: nodes.Node, field: str) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._names[field]
        return _reads_field(node, field)

    def _find_names(self, field: str) -> Iterator[str]:
        for assign in self._tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _reads_field(assign.node, field):
                yield assign.target.name
        for call in self._tree.find_all(nodes.Call):
            macro = self._macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                pairs = zip(macro.args, call.args, strict=False)
                yield from (parameter.name for parameter, value in pairs if _reads_field(value, field))


def _reads_field(node: nodes.Node | None, field: str) -> bool:
    match node:
        case nodes.Getattr():
            return node.attr == field
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == field
        case nodes.Filter():
            return _reads_field(node.node, field)
        case nodes.Or():
            return _reads_field(node.left, field)
        case nodes.CondExpr():
            return _reads_field(node.expr1, field) or _reads_field(node.expr2, field)
        case nodes.Call():
            is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and bool(node.args)
            return is_get and isinstance(node.args[0], nodes.Const) and node.args[0].value == field
        case _:
            return False
