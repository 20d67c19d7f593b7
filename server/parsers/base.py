"""What the parsers of model output give and take: parts of a message, and the two kinds of format.

A parser is fed the text of one choice as it comes, split anywhere, and gives parts. Joined, the parts are the same however the
text was split, so an answer that is not streamed is the same parser fed at once. Rules that hold for every format:

- Text that is no call comes out as content, also a call that cannot be parsed. A call's name is given out when its arguments
  begin; one that breaks after that ends with the arguments that came, and what follows is content.
- A function's name is what the model said, whether there is such a function or not.
- Whitespace after a marker of the format belongs to the marker, and so does whitespace before it unless more text follows.
- Text is held back while it may be the beginning of a marker or of a call's name, and no longer.
- Special tokens that mean nothing where they stand are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text of the thoughts before the answer."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """The call number `index` of this message, from 0, begins. At least one CallArguments follows."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of the arguments of call `index`; always of the latest call."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class OutputParser(Protocol):
    """The parser of one choice. Never raises, whatever the model says."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, when the choice ends. Nothing may be pushed after it."""
        ...


class FunctionTool(msgspec.Struct):
    """parameters: JSON schema of the arguments, {} where the request gave none. grammar_schema: the same as grammars take it;
    None where that is no different."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False
    grammar_schema: dict[str, Any] | None = None

    def schema(self) -> dict[str, Any]:
        """What a grammar holds the arguments to."""
        return self.parameters if self.grammar_schema is None else self.grammar_schema


class Vocabulary(msgspec.Struct, frozen=True):
    """What of the tokenizer a format must know.

    added_tokens: text -> id of the tokens that stand for themselves and are no part of ordinary text: markers among them are
    single tokens. special: those of them that `skip_special_tokens` hides.
    """

    added_tokens: dict[str, int] = {}
    special: frozenset[str] = frozenset()


class ToolFormat(Protocol):
    """How one family of models writes calls of functions. Made once for a served model, with its Vocabulary.

    shows_special_tokens: markers are special tokens, so text must be generated with skip_special_tokens=False.
    splits_reasoning: the parser gives Reasoning as well, so no reasoning parser stands before it.
    """

    name: str
    shows_special_tokens: bool
    splits_reasoning: bool

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser: ...

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        """Lark for one call of one of the tools (parallel: or several), whose text the parser reads as these calls alone."""
        ...

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str | None:
        """Lark for free text in which every call is one of the tools with arguments as declared; None where there is none."""
        ...

    def new_call_id(self) -> str:
        """An id that the model's chat template accepts."""
        ...


class ReasoningFormat(Protocol):
    """How one family of models writes its thoughts. Made once for a served model, with its Vocabulary."""

    name: str
    shows_special_tokens: bool

    def starts_open(self, prompt_text: str) -> bool:
        """Whether the prompt ends inside the thoughts: the chat template has written their opening marker."""
        ...

    def parser(self, *, is_open: bool, before_tools: bool = False) -> OutputParser:
        """before_tools: a ToolFormat's parser reads what is content here, so its special tokens are left in."""
        ...

    def grammar(self, answer: str, *, is_open: bool, is_call: bool = False) -> str:
        """Lark for thoughts and then what the Lark `answer` says. is_call: `answer` is a ToolFormat's grammar."""
        ...
