"""A parser written as one generator: it reads text in order and waits where there is none yet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from server.parsers.base import CallArguments, CallStart, Content, Part, Reasoning
from server.parsers.json_scanner import JsonScanner
from server.parsers.markers import Markers

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where it needs more text
Kind = type[Content] | type[Reasoning]

_MAX_NAME_CHARS = 256


class Broken(Exception):
    """What is being read is not what the format has there. Never leaves this package."""


class Tape:
    """Text in, parts out.

    text[position:] is not read yet. Between `attempt` and `start_call` nothing is forgotten, so that text which turns out to be
    no call can be read again as content.
    """

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.is_final = False
        self.at_line_start = True  # no content since the last line break, or space only
        self.num_calls = 0
        self._attempt: int | None = None
        self._parts: list[Part] = []
        self._kind: Kind = Content
        self._given: set[Kind] = set()
        self._space: dict[Kind, str] = {Content: "", Reasoning: ""}  # read, to be given out before the next text of its kind
        self._after_marker = False

    def add(self, text: str) -> None:
        keep = self.position if self._attempt is None else self._attempt
        self.text = self.text[keep:] + text
        self.position -= keep
        if self._attempt is not None:
            self._attempt = 0

    def take_parts(self) -> list[Part]:
        if self.is_final and not self._after_marker and (space := self._space[self._kind]):
            self._give(self._kind(space))
        parts, self._parts = self._parts, []
        return parts

    def attempt(self) -> None:
        """From here on may be a call; it is one when `start_call` is called."""
        self._attempt = self.position

    def end_attempt(self, *, is_broken: bool) -> None:
        """is_broken: what was read since the attempt, if it is no call by now, is to be read again."""
        if is_broken and self._attempt is not None:
            self.position = self._attempt
        self._attempt = None

    def more(self) -> Reading[bool]:
        """Whether there is unread text, now or later."""
        while self.position >= len(self.text):
            if self.is_final:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character that is no space, which stays unread; "" at the end."""
        while (yield from self.more()):
            rest = self.text[self.position :].lstrip()
            self.position = len(self.text) - len(rest)
            if rest:
                return rest[0]
        return ""

    def take(self, literal: str) -> Reading[bool]:
        """Reads `literal` if it comes next."""
        while not self.is_final and len(self.text) - self.position < len(literal):
            if not literal.startswith(self.text[self.position :]):
                return False
            yield
        if not self.text.startswith(literal, self.position):
            return False
        self.position += len(literal)
        return True

    def take_or_rest(self, literal: str) -> Reading[bool]:
        """The same of a mark within a call: where the limit of tokens cuts it, what is there is read too, being no text."""
        if (yield from self.take(literal)):
            return True
        if self.is_final and literal.startswith(self.text[self.position :]):
            self.position = len(self.text)
        return False

    def expect(self, literal: str) -> Reading[None]:
        """Raises Broken where something else comes."""
        if not (yield from self.take_or_rest(literal)):
            raise Broken

    def read_name(self, *, before: str = "") -> Reading[str]:
        """A function's name that stands by itself, without quotes; or all of a line before the character `before`.

        Raises Broken where there is none.
        """
        name = ""
        while (yield from self.more()) and len(name) <= _MAX_NAME_CHARS:
            char = self.text[self.position]
            if (char in (before, "\n")) if before else not (char.isalnum() or char in "_-./:"):
                break
            name += char
            self.position += 1
        if not name or len(name) > _MAX_NAME_CHARS:
            raise Broken
        return name

    def read_json(self, *, arguments: bool = False) -> Reading[str]:
        """A JSON value. arguments: it is given out as the call's as it comes, also what comes of a broken one.

        Raises Broken where it is none.
        """
        scanner = JsonScanner()
        pieces: list[str] = []
        while not scanner.is_done:
            if scanner.is_broken or not (yield from self.more()):
                scanner.finish()
                if scanner.is_broken:
                    raise Broken
                break
            piece, self.position = scanner.feed(self.text, self.position)
            if arguments:
                self.write_arguments(piece)
            else:
                pieces.append(piece)
        return "".join(pieces)

    def read_arguments(self, name: str) -> Reading[None]:
        """A call's arguments, an object, after its name. Raises Broken."""
        if (yield from self.peek()) != "{":
            raise Broken
        self.start_call(name)
        yield from self.read_json(arguments=True)

    def write(self, text: str, kind: Kind = Content) -> None:
        if kind is not self._kind:
            self.pass_marker()
            self._kind = kind
        if not text:
            return
        _, line_break, line = text.rpartition("\n")
        self.at_line_start = (bool(line_break) or self.at_line_start) and not line.strip()
        if self._after_marker:
            text = text.lstrip()
            self._after_marker = not text
        text = self._space[kind] + text
        body = text.rstrip()
        self._space[kind] = text[len(body) :]
        if body:
            self._given.add(kind)
            self._give(kind(body))

    def pass_marker(self) -> None:
        """Space after this place is no text of the message; space before it is, if more text of its kind follows."""
        self._after_marker = True
        if self._kind not in self._given:
            self._space[self._kind] = ""

    def begin_paragraph(self, kind: Kind) -> None:
        """An empty line sets what follows apart from earlier text of its kind."""
        self.pass_marker()
        self._kind = kind
        self._space[kind] = "\n\n" if kind in self._given else ""

    def start_call(self, name: str) -> None:
        self.pass_marker()
        self.at_line_start = True
        self._attempt = None
        self._give(CallStart(self.num_calls, name))
        self.num_calls += 1

    def write_arguments(self, text: str) -> None:
        if text:
            self._give(CallArguments(self.num_calls - 1, text))

    def _give(self, part: Part) -> None:
        """Neighbours of one kind become one part."""
        last = self._parts[-1] if self._parts else None
        if type(last) is not type(part) or isinstance(part, CallStart):
            self._parts.append(part)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            self._parts[-1] = CallArguments(part.index, last.text + part.text)
        elif isinstance(part, Content | Reasoning) and isinstance(last, Content | Reasoning):
            self._parts[-1] = type(part)(last.text + part.text)


class TapeParser:
    """An OutputParser (server.parsers.base) around a generator."""

    def __init__(self, read: Callable[[Tape], Reading[None]]) -> None:
        self._tape = Tape()
        self._reading: Reading[None] | None = read(self._tape)

    def push(self, text: str) -> list[Part]:
        self._tape.add(text)
        self._go_on()
        return self._tape.take_parts()

    def finish(self) -> list[Part]:
        self._tape.is_final = True
        self._go_on()
        return self._tape.take_parts()

    def _go_on(self) -> None:
        if self._reading is not None and next(self._reading, self._reading) is self._reading:
            self._reading = None


def read_to_marker(tape: Tape, markers: Markers, kind: Kind = Content) -> Reading[str | None]:
    """Gives out the text before the next marker, which is read and returned; None at the end of the text."""
    while True:
        found = markers.find(tape.text, tape.position, is_final=tape.is_final)
        tape.write(tape.text[tape.position : found.start], kind)
        tape.position = found.end
        if found.marker is not None or tape.is_final:
            return found.marker
        yield


def read_calls(tape: Tape, openings: Mapping[str, Callable[[Tape], Reading[None]]], dropped: frozenset[str]) -> Reading[None]:
    """Content with calls in it, to the end.

    openings: the reader of what follows each marker that begins calls, which raises Broken where it is no call. It calls
    `tape.attempt()` between calls, so that what was read of a further one that breaks becomes content. dropped: markers and
    special tokens that are never content.
    """
    markers = Markers.of(dropped.union(openings))
    while (marker := (yield from read_to_marker(tape, markers))) is not None:
        if marker in openings:
            yield from read_attempt(tape, openings[marker], "" if marker in dropped else marker)


def read_attempt(tape: Tape, read: Callable[[Tape], Reading[None]], marker: str) -> Reading[None]:
    """`read`, or `marker` as content and what follows it unread where it breaks before its first call."""
    num_calls = tape.num_calls
    tape.attempt()
    try:
        yield from read(tape)
    except Broken:
        tape.end_attempt(is_broken=True)
        if tape.num_calls == num_calls:
            tape.write(marker)
    else:
        tape.end_attempt(is_broken=False)
