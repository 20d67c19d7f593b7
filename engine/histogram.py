"""Histogram: counts of values by size, cheap enough for every step and every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import zip_longest

import msgspec


class HistogramCounts(msgspec.Struct, frozen=True):
    """counts: by bucket, each without those below it, the last one for what no bound holds; empty before the first value.
    sum: of all values."""

    counts: list[int] = []
    sum: float = 0.0

    def __add__(self, other: HistogramCounts) -> HistogramCounts:
        counts = [one + another for one, another in zip_longest(self.counts, other.counts, fillvalue=0)]
        return HistogramCounts(counts, self.sum + other.sum)


class Histogram:
    """A search and two additions a value, and no locks: for one thread. bounds: the largest value of each bucket, ascending."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def counts(self) -> HistogramCounts:
        """What was observed so far."""
        return HistogramCounts(self._counts.copy(), self._sum)
