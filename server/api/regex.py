r"""Regular expressions as those who send them mean them: \d, \w and \s are classes of ASCII.

The grammar library reads Rust's syntax, whose classes are Unicode's: `\d{3}` would let through digits of all scripts, which
JavaScript (so JSON Schema, and zod behind OpenAI's client for Node) and vLLM take for none.
"""

from __future__ import annotations

import re

# Of \S the space of other dialects is left out too: Python's has the separators, JavaScript's the byte order mark.
_NARROW = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[\x20\t\n\r\f\v]", "S": r"[^\s\x1c-\x1f\x{feff}]"}
# An escape; a class that opens, with a bracket that is literal there; one that closes; what is taken out of a class.
_TOKEN = re.compile(r"\\(.)|\[(\^?)\]?|\]|--", re.DOTALL)
# An escape; a class that every dialect reads alike, which is none that holds a bracket; a group's begin or end; a choice.
_PART = re.compile(r"\\.|\[(?!\^?\])(?:[^\]\[\\]|\\.)+\]|[\[()|]", re.DOTALL)
_LOOK_AHEAD = "(?="


def with_ascii_classes(pattern: str) -> str:
    r"""A pattern that matches nothing that it does not match in the dialects above.

    In a negated class the wide meaning is the narrow one: `[^\d]` stays.
    """
    is_negated: list[bool] = []  # of each class around the place

    def narrow(token: re.Match[str]) -> str:
        text = token[0]
        if text == "]":
            del is_negated[-1:]
        elif text == "--":
            is_negated[-1:] = [not is_negated[-1]] if is_negated else []
        elif text.startswith("["):
            is_negated.append(bool(token[2]))
        elif sum(is_negated) % 2 == 0:
            return _NARROW.get(token[1], text)
        return text

    return _TOKEN.sub(narrow, pattern)


def without_look_aheads(pattern: str) -> list[str]:
    r"""Patterns that together find what one finds that begins with look-aheads: of `^(?=A)B` those are `^B` and `^A`.

    The library knows no look-ahead, but takes several patterns of one string. Any other pattern comes back alone.
    """
    ends = _ends_of_groups(pattern)
    start, found = 1, []
    while pattern.startswith("^") and pattern.startswith(_LOOK_AHEAD, start) and ends:
        end = ends.pop(0)
        if pattern[end : end + 1] in ("?", "*", "+", "{"):
            break
        found.append(f"^(?:{pattern[start + len(_LOOK_AHEAD) : end - 1]})")
        start = end
    return ["^" + pattern[start:], *found] if found else [pattern]


def _ends_of_groups(pattern: str) -> list[int]:
    """Where each group ends that is in no other; none where the whole is a choice, or is not read alike by every dialect."""
    depth, ends = 0, []
    for part in _PART.finditer(pattern):
        if part[0] == "[" or (part[0] == "|" and depth == 0):
            return []
        depth += {"(": 1, ")": -1}.get(part[0], 0)
        if part[0] == ")" and depth == 0:
            ends.append(part.end())
    return ends
