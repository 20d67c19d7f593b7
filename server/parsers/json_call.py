"""A call written as one JSON object: {"name": ..., "arguments": {...}}."""

from __future__ import annotations

import json

from server.parsers.tape import Broken, Reading, Tape

_MAX_NAME_CHARS = 256


def read_json_call(tape: Tape, *, is_open: bool = False, needs_arguments: bool = False) -> Reading[None]:
    """Gives out one call. The arguments may be called "parameters" and may stand before the name.

    is_open: the object's opening bracket is read. needs_arguments: an object without arguments is no call; else it is a call
    with {}. Raises Broken.
    """
    name = arguments = None
    if not is_open and (yield from tape.peek()) == "{":
        tape.position += 1
    elif not is_open:
        raise Broken
    char = yield from tape.peek()
    while char != "}":
        key = yield from _read_key(tape)
        if key == "name" and name is None:
            name = yield from _read_name(tape)
            if arguments is not None:
                tape.start_call(name)
                tape.write_arguments(arguments)
        elif key in ("arguments", "parameters") and arguments is None:
            arguments = yield from _read_arguments(tape, name)
        elif key in ("id", "type") or (name is not None and arguments is not None):
            yield from tape.peek()
            yield from tape.read_json()
        else:
            raise Broken
        char = yield from tape.peek()
        if char == ",":
            tape.position += 1
        elif char != "}":
            raise Broken
    if name is None or (arguments is None and needs_arguments):
        raise Broken
    tape.position += 1
    if arguments is None:
        tape.start_call(name)
        tape.write_arguments("{}")


def _read_key(tape: Tape) -> Reading[str]:
    if (yield from tape.peek()) != '"':
        raise Broken
    key = json.loads((yield from tape.read_json()))
    if (yield from tape.peek()) != ":":
        raise Broken
    tape.position += 1
    return str(key)


def _read_name(tape: Tape) -> Reading[str]:
    if (yield from tape.peek()) != '"':
        raise Broken
    name = str(json.loads((yield from tape.read_json())))
    # Not printable are control characters and half a surrogate pair, which no answer could carry.
    if not name or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise Broken
    return name


def _read_arguments(tape: Tape, name: str | None) -> Reading[str]:
    """Gives the arguments out if the name is known, else returns them."""
    if name is not None:
        yield from tape.read_arguments(name)
        return ""
    if (yield from tape.peek()) != "{":
        raise Broken
    return (yield from tape.read_json())
