"""Where a JSON value ends, found while its text is coming (RFC 8259)."""

from __future__ import annotations

import re

_SPACE = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
_DIGITS = "0123456789"
_LITERALS = {"t": "true", "f": "false", "n": "null"}

# The states between the parts of a value, where space may stand.
_BETWEEN = frozenset({"value", "value or end", "key", "key or end", "colon", "comma"})

# What may follow within a number, by the kind of its latest character; a number may end where the kind is in _NUMBER_ENDS.
_NUMBER_STEPS: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "integer"),
    "zero": {".": "point", "e": "exponent", "E": "exponent"},
    "integer": {".": "point", "e": "exponent", "E": "exponent"} | dict.fromkeys(_DIGITS, "integer"),
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {"e": "exponent", "E": "exponent"} | dict.fromkeys(_DIGITS, "fraction"),
    "exponent": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "power"),
    "sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
_NUMBER_ENDS = {"zero", "integer", "fraction", "power"}


class JsonScanner:
    """Follows one JSON value, character by character in effect: what it says never depends on how the text is split.

    is_done: the value has ended. is_broken: the next character can be in no JSON value here. Control characters in a string,
    which models write and JSON forbids, are escaped in what is given out; all else is given out as it came.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._open: list[str] = []  # the brackets around the place
        self._state = "value"
        self._kind = ""  # of the latest character of a number; the rest of a literal; digits of a \\u that are to come

    def feed(self, text: str, start: int) -> tuple[str, int]:
        """The part of text[start:] that belongs to the value, and where it ends in `text`."""
        pieces: list[str] = []
        index = start
        while index < len(text) and not (self.is_done or self.is_broken):
            if self._state == "string":
                index = self._feed_string(text, index, pieces)
                continue
            if self._state in _BETWEEN and (space := _SPACE.match(text, index)):
                pieces.append(space[0])
                index = space.end()
                continue
            char = text[index]
            if self._take(char):
                pieces.append(char)
                index += 1
        return "".join(pieces), index

    def finish(self) -> None:
        """No more text comes: a number at the outermost place ends here, everything else that is not done is broken."""
        if not self.is_done:
            self.is_done = self._state == "number" and not self._open and self._kind in _NUMBER_ENDS
            self.is_broken = not self.is_done

    def _feed_string(self, text: str, index: int, pieces: list[str]) -> int:
        if plain := _PLAIN.match(text, index):
            pieces.append(plain[0])
            return plain.end()
        char = text[index]
        if char == '"':
            self._end_string()
        elif char == "\\":
            self._state = "escape"
        else:
            char = _CONTROL.get(char) or f"\\u{ord(char):04x}"
        pieces.append(char)
        return index + 1

    def _take(self, char: str) -> bool:
        """Whether `char` belongs to the value; if not, it is broken, or the number before `char` has ended."""
        match self._state:
            case "escape":
                self._state, self._kind = ("unicode", "4") if char == "u" else ("string", "")
                return self._check(char in '"\\/bfnrtu')
            case "unicode":
                self._kind = str(int(self._kind) - 1)
                if self._kind == "0":
                    self._state = "string"
                return self._check(char in "0123456789abcdefABCDEF")
            case "number":
                return self._take_in_number(char)
            case "literal":
                expected, self._kind = self._kind[0], self._kind[1:]
                if char == expected and not self._kind:
                    self._end_value()
                return self._check(char == expected)
            case "colon":
                self._state = "value"
                return self._check(char == ":")
            case "comma" | "key" | "key or end":
                return self._take_between(char)
            case _:
                return self._take_first_of_value(char)

    def _take_first_of_value(self, char: str) -> bool:
        if char == "]" and self._state == "value or end":
            return self._close(char)
        if char in "{[":
            self._open.append(char)
            self._state = "key or end" if char == "{" else "value or end"
        elif char == '"':
            self._state = "string"
        elif char in _LITERALS:
            self._state, self._kind = "literal", _LITERALS[char][1:]
        elif char == "-" or char in _DIGITS:
            self._state, self._kind = "number", {"-": "minus", "0": "zero"}.get(char, "integer")
        else:
            return self._check(False)
        return True

    def _take_between(self, char: str) -> bool:
        """At the place of a key, a comma or a closing bracket."""
        if char in "}]" and self._state != "key":
            return self._close(char)
        if self._state == "comma":
            self._state = "key" if self._open[-1] == "{" else "value"
            return self._check(char == ",")
        self._state = "string"
        self._open.append('"')  # a key stands open like a bracket, which tells it from a value
        return self._check(char == '"')

    def _end_string(self) -> None:
        if self._open and self._open[-1] == '"':
            self._open.pop()
            self._state = "colon"
        else:
            self._end_value()

    def _take_in_number(self, char: str) -> bool:
        step = _NUMBER_STEPS[self._kind].get(char)
        if step is not None:
            self._kind = step
            return True
        if self._check(self._kind in _NUMBER_ENDS):
            self._end_value()
        return False

    def _close(self, char: str) -> bool:
        if not self._check(self._open[-1] == {"}": "{", "]": "["}[char]):
            return False
        self._open.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._state = "comma"
        self.is_done = not self._open

    def _check(self, is_right: bool) -> bool:
        self.is_broken = not is_right
        return is_right
