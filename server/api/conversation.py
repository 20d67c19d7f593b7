"""A conversation's way through the model, as chat completions and responses share it.

Messages and tools become a prompt by the chat template; tool choice and output format become a grammar; and the text of each
choice is read, as it comes, by the parsers of the model's own formats. Streamed or not, it is the same parser.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import msgspec
from starlette.types import Receive

from engine.chat_template import ChatJob
from engine.errors import InvalidRequest
from engine.request_stream import ChoiceDelta
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.tokenizer import Tokenizer
from server.api.generation import Generation, Prompt
from server.api.sampling import SamplingRequest, check_vocabulary, output_limit, truncate_prompt
from server.api.structured import to_lark
from server.api.text_threads import in_thread_if_long
from server.config import ServerConfig
from server.disconnect import unless_disconnected
from server.parsers.base import (
    CallArguments,
    CallStart,
    Content,
    FunctionTool,
    OutputParser,
    Part,
    Reasoning,
    ReasoningFormat,
    ToolFormat,
    Vocabulary,
)
from server.parsers.hermes import default_tool_block
from server.parsers.registry import chain, detect_reasoning_format, detect_tool_format, load_reasoning_format, load_tool_format
from server.state import ServerState
from server.template_worker import template_worker

# How a template that knows no tools gets them described, and so how the model is asked to call them.
DEFAULT_TOOL_FORMAT = "hermes"
# Templates may be slow beyond proportion, and look at all messages for each one.
MAX_MESSAGES = 8192


class NamedFunction(msgspec.Struct, frozen=True):
    """A tool choice: call this function, once."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


class Conversation(msgspec.Struct, kw_only=True):
    """What is asked of the model, checked by the endpoint.

    messages: as chat templates take them. tools: those that may be called; `tool_choice` names one of them, or is "none" or
    "auto" where there are none. structured: what the answer must look like; calls are exempt from it. include_reasoning: False
    leaves Reasoning out. add_special_tokens: beside those that the template writes. chat_template: the name of one of the
    model's templates, or template text. max_tokens: asked for in the field max_tokens_param; None for all that is left of the
    context.
    """

    messages: list[dict[str, Any]]
    tools: list[FunctionTool] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    structured: StructuredSpec | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = {}
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def callable_tools(self) -> list[FunctionTool]:
        """The tools the model hears of: with the choice "none" it is better not tempted."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[FunctionTool]:
        """The tools of which one must be called; none where the model may answer in words."""
        if isinstance(self.tool_choice, NamedFunction):
            return [tool for tool in self.tools if tool.name == self.tool_choice.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def num_chars(self) -> int:
        """About how long it is."""
        return sum(_num_chars(message) for message in self.messages) + sum(_num_chars(tool.parameters) for tool in self.tools)


class Reply:
    """The model's answer on its way: `deltas` or `set_shortcut` give what the engine says, `read` what it means.

    prompt_token_ids, sampling: what the engine was given. is_plain: all text is the answer's content, as it comes.
    """

    def __init__(
        self,
        conversation: Conversation,
        formats: _Formats,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        is_open: bool,
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self._tool_format = formats.tools
        self._ends_in_calls = not isinstance(conversation.tool_choice, NamedFunction)
        self._readers = [_Reader(conversation, formats.parser(conversation, is_open)) for _ in range(conversation.n)]
        self.is_plain = self._readers[0].parser is None
        self.generation: Generation

    @classmethod
    async def start(
        cls,
        state: ServerState,
        receive: Receive,
        request_id: str,
        conversation: Conversation,
        body: SamplingRequest,
        arrival: float,
    ) -> Reply:
        """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
        ready = state.require_ready()
        tokenizer = state.client.tokenizer
        formats = _Formats.of(conversation, state.config, tokenizer)
        tokenizing = _tokenize(state, conversation, formats)
        # It may be a while before the template of a request has its turn.
        patient = _is_own(conversation.chat_template, tokenizer)
        text, token_ids = await (tokenizing if patient else unless_disconnected(receive, tokenizing))
        token_ids = truncate_prompt(token_ids, body.truncate_prompt_tokens, conversation.max_tokens, None, ready)
        check_vocabulary(token_ids, ready.vocab_size, "messages")
        asked, param = conversation.max_tokens, conversation.max_tokens_param
        limit = output_limit(len(token_ids), asked, None, ready, param, "messages")
        is_open = formats.reasoning is not None and formats.reasoning.starts_open(text)
        sampling = body.sampling_params(
            ready,
            tokenizer,
            max_tokens=limit,
            n=conversation.n,
            logprobs=conversation.logprobs,
            prompt_logprobs=conversation.prompt_logprobs,
            structured=formats.constraint(conversation, is_open),
        )
        if formats.shows_special_tokens:
            body = body.model_copy(update={"skip_special_tokens": False})
        reply = cls(conversation, formats, token_ids, sampling, is_open=is_open)
        start = Generation.start(state, request_id, [Prompt(token_ids, None, sampling)], body, arrival)
        reply.generation = await unless_disconnected(receive, start, release=Generation.close)
        if formats.reasoning is not None:
            reply.generation.count_reasoning(0)
        return reply

    def new_call_id(self) -> str:
        """An id for a call that `read` has given."""
        assert self._tool_format is not None
        return self._tool_format.new_call_id()

    def deltas(self) -> AsyncIterator[tuple[int, list[ChoiceDelta]]]:
        """What is new, until every choice has finished; the number is always 0. Raises RequestFailed."""
        return self.generation.deltas()

    def set_shortcut(self, take: Callable[[int, list[ChoiceDelta]], Awaitable[None] | None]) -> None:
        """See Generation.set_shortcut."""
        self.generation.set_shortcut(take)

    def read(self, delta: ChoiceDelta) -> list[Part]:
        """What is new of the choice's message. Once for each delta, in their order; after the last one nothing is held back."""
        parts, num_reasoning_tokens = self._readers[delta.choice_index].read(delta)
        if num_reasoning_tokens:
            self.generation.count_reasoning(num_reasoning_tokens)
        return parts

    def finish_reason(self, delta: ChoiceDelta) -> str | None:
        """The choice's, when it has been read: "stop", "length", or "tool_calls" where the model chose to call."""
        if delta.finish_reason == "stop" and self._ends_in_calls and self._readers[delta.choice_index].num_calls:
            return "tool_calls"
        return delta.finish_reason

    def close(self) -> None:
        """Let go of everything. May be called again."""
        self.generation.close()


class _Reader:
    """Reads one choice. parser: None where all text is content."""

    def __init__(self, conversation: Conversation, parser: OutputParser | None) -> None:
        self.parser = parser
        self.num_calls = 0
        self._max_calls = None if conversation.parallel_tool_calls else 1
        self._include_reasoning = conversation.include_reasoning
        self._has_reasoned = False
        self._has_answered = False
        self._num_tokens = 0

    def read(self, delta: ChoiceDelta) -> tuple[list[Part], int]:
        """(parts, tokens now known to have been reasoning)."""
        if self.parser is None:
            return ([Content(delta.text)] if delta.text else []), 0
        parts = self.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            parts = [*parts, *self.parser.finish()]
        num_reasoning_tokens = 0 if self._has_answered else self._count_reasoning(delta, parts)
        return [part for part in parts if self._is_wanted(part)], num_reasoning_tokens

    def _is_wanted(self, part: Part) -> bool:
        match part:
            case CallStart(index, _):
                self.num_calls = index + 1 if self._max_calls is None else min(index + 1, self._max_calls)
                return index < self.num_calls
            case CallArguments(index, _):
                return index < self.num_calls
            case Reasoning(_):
                return self._include_reasoning
        return True

    def _count_reasoning(self, delta: ChoiceDelta, parts: list[Part]) -> int:
        """Tokens before the one that the answer begins with, markers included; within a delta by their share of its text."""
        answer = [part for part in parts if not isinstance(part, Reasoning)]
        self._has_reasoned = self._has_reasoned or len(answer) < len(parts)
        self._has_answered = bool(answer)
        if not answer:
            self._num_tokens += len(delta.token_ids)
            return self._num_tokens if self._has_reasoned and delta.finish_reason is not None else 0
        num_chars = sum(len(part.text) for part in answer if not isinstance(part, CallStart))
        share = 1 - min(num_chars / max(len(delta.text), 1), 1)
        return self._num_tokens + round(share * len(delta.token_ids)) if self._has_reasoned else 0


class _Formats(msgspec.Struct):
    """How this server's model writes calls (None where there is nothing to call) and thoughts, by the settings or by the
    template that is used. tool_block: describes the tools where the template does not.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    tool_block: str

    @classmethod
    def of(cls, conversation: Conversation, config: ServerConfig, tokenizer: Tokenizer) -> _Formats:
        """Raises InvalidRequest where a call is forced and no format is set."""
        tools = conversation.callable_tools
        source = tokenizer.template_source(conversation.chat_template, with_tools=bool(tools))
        tool_name, reasoning_name = config.tool_parser, config.reasoning_parser
        if tool_name == "auto":
            tool_name = _detect_tool_format(source) or DEFAULT_TOOL_FORMAT
        if reasoning_name == "auto":
            reasoning_name = _detect_reasoning_format(source) or "none"
        if tool_name == "none" and conversation.forced_tools:
            raise InvalidRequest(
                'tool_choice may be only "none" or "auto": this server reads no tool calls (--tool-parser none).',
                param="tool_choice",
            )
        return cls(
            tools=_tool_format(tool_name, tokenizer) if tools and tool_name != "none" else None,
            reasoning=_reasoning_format(reasoning_name, tokenizer) if reasoning_name != "none" else None,
            tool_block=default_tool_block(tools) if tools else "",
        )

    @property
    def shows_special_tokens(self) -> bool:
        return any(format is not None and format.shows_special_tokens for format in (self.tools, self.reasoning))

    def parser(self, conversation: Conversation, is_open: bool) -> OutputParser | None:
        """One choice's parser; None where all text is content."""
        tools = None if self.tools is None else self.tools.parser(conversation.tools)
        if self.reasoning is None or (self.tools is not None and self.tools.splits_reasoning):
            return tools
        return chain(self.reasoning.parser(is_open=is_open, before_tools=tools is not None), tools)

    def constraint(self, conversation: Conversation, is_open: bool) -> StructuredSpec | None:
        """What the output must look like, thoughts and calls included; None for free text."""
        structured = None if conversation.forced_tools else conversation.structured
        calls = self._calls_grammar(conversation)
        if calls is None and (structured is None or self.reasoning is None):
            return structured
        grammars = [] if structured is None else [self._after_reasoning(to_lark(structured), is_open, is_call=False)]
        grammars += [] if calls is None else [self._after_reasoning(calls, is_open, is_call=True)]
        return StructuredSpec("lark", grammars[0] if len(grammars) == 1 else _either(*grammars))

    def _calls_grammar(self, conversation: Conversation) -> str | None:
        """Of calls that are forced, or that are the way out of an answer that is constrained; of free text with calls in it
        where a function wants its arguments exact."""
        if self.tools is None:
            return None
        parallel = conversation.parallel_tool_calls
        if isinstance(conversation.tool_choice, NamedFunction):
            return self.tools.forced_grammar(conversation.forced_tools, parallel=False)
        if conversation.tool_choice == "required" or conversation.structured is not None:
            return self.tools.forced_grammar(conversation.tools, parallel=parallel)
        if any(tool.strict for tool in conversation.tools):
            return self.tools.lazy_grammar(conversation.tools, parallel=parallel)
        return None

    def _after_reasoning(self, grammar: str, is_open: bool, *, is_call: bool) -> str:
        return grammar if self.reasoning is None else self.reasoning.grammar(grammar, is_open=is_open, is_call=is_call)


def _either(one: str, other: str) -> str:
    """Two grammars, each with names of its own, as one."""
    return f"start: one | other\none: %lark {{\n{one}\n}}\nother: %lark {{\n{other}\n}}\n"


_detect_tool_format = functools.lru_cache(maxsize=32)(detect_tool_format)
_detect_reasoning_format = functools.lru_cache(maxsize=32)(detect_reasoning_format)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.added_tokens, tokenizer.special_tokens)


@functools.lru_cache(maxsize=8)
def _tool_format(name: str, tokenizer: Tokenizer) -> ToolFormat:
    return load_tool_format(name, _vocabulary(tokenizer))


@functools.lru_cache(maxsize=8)
def _reasoning_format(name: str, tokenizer: Tokenizer) -> ReasoningFormat:
    return load_reasoning_format(name, _vocabulary(tokenizer))


async def prompt_tokens(state: ServerState, conversation: Conversation) -> list[int]:
    """The prompt's ids, before anything is cut. Raises InvalidRequest as `Reply.start` does."""
    formats = _Formats.of(conversation, state.config, state.client.tokenizer)
    _, token_ids = await _tokenize(state, conversation, formats)
    return token_ids


async def _tokenize(state: ServerState, conversation: Conversation, formats: _Formats) -> tuple[str, list[int]]:
    """The prompt's text and ids. Raises InvalidRequest for what the template refuses, and for a prompt that comes out empty."""
    tokenizer = state.client.tokenizer
    if len(conversation.messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages may hold at most {MAX_MESSAGES} messages, got {len(conversation.messages)}.", param="messages"
        )
    tools, adds = conversation.callable_tools, conversation.add_special_tokens
    job = tokenizer.chat_job(
        conversation.messages,
        tools=[template_tool(tool) for tool in tools],
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        chat_template=conversation.chat_template,
        template_kwargs=conversation.template_kwargs,
        tool_block=formats.tool_block,
    )
    if _is_own(conversation.chat_template, tokenizer):
        text, token_ids = await in_thread_if_long(conversation.num_chars, lambda: _render_and_encode(job, tokenizer, adds))
    else:
        text = await template_worker().render(job)
        token_ids = await in_thread_if_long(len(text), lambda: tokenizer.encode_rendered(text, add_special_tokens=adds))
    if not token_ids:
        raise InvalidRequest("messages come out empty from the chat template.", param="messages", code="empty_prompt")
    return text, token_ids


def _is_own(chat_template: str | None, tokenizer: Tokenizer) -> bool:
    """Whether it is the model's template, not the request's."""
    return chat_template is None or tokenizer.has_template(chat_template)


def _render_and_encode(job: ChatJob, tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[str, list[int]]:
    text = job.render()
    return text, tokenizer.encode_rendered(text, add_special_tokens=add_special_tokens)


def template_tool(tool: FunctionTool) -> dict[str, Any]:
    """A tool as chat templates take it; they may look into the parameters, so there is always something to look into."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _num_chars(value: object) -> int:
    match value:
        case str():
            return len(value)
        case dict():
            return sum(map(_num_chars, value.values()))
        case list():
            return sum(map(_num_chars, value))
    return 1
