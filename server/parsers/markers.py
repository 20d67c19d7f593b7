"""Finding markers in text that is still coming."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple


class Found(NamedTuple):
    """text[start:end] is `marker`. Without a marker, text from `start` on may be the beginning of one, and end == start."""

    start: int
    end: int
    marker: str | None


class Markers:
    """A set of strings to look for: the leftmost counts, of those that begin together the longest."""

    def __init__(self, markers: Iterable[str]) -> None:
        known = sorted(set(markers), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self._beginnings = frozenset(marker[:end] for marker in known for end in range(1, len(marker)))
        self._longest_beginning = max(map(len, known), default=1) - 1

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, markers: frozenset[str]) -> Markers:
        """The same for the same set: every answer looks for its format's."""
        return cls(markers)

    def find(self, text: str, start: int, *, is_final: bool) -> Found:
        """The first marker from `start` on that no further text can change; is_final: no further text comes."""
        match = self._pattern.search(text, start)
        end = len(text) if match is None else match.start()
        if not is_final:
            first = max(start, len(text) - self._longest_beginning)
            # A marker that may still become a longer one is undecided as well, hence `<=`.
            for index in range(first, min(end, len(text) - 1) + 1):
                if text[index:] in self._beginnings:
                    return Found(index, index, None)
        return Found(end, end, None) if match is None else Found(match.start(), match.end(), match[0])
