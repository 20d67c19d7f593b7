"""What is learnt from an engine at work: what it gets through in a second, how long its answers are, and how fast they come."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from engine.sampling_params import SamplingParams


class Pace:
    """What something counts up a second while there is more to do than it can take up: what it does with less to do says
    nothing of what it could. A mean over about MEMORY_S of such time."""

    MEMORY_S = 30.0

    def __init__(self, read_count: Callable[[], int], *, interval_s: float, enough_s: float) -> None:
        """interval_s: between two looks at the count, which may be told that seldom. enough_s: of such time before anything is
        said."""
        self._read_count = read_count
        self._interval_s = interval_s
        self._enough_s = enough_s
        self._count = 0.0
        self._seconds = 0.0
        self._since_s = 0.0
        self._counted = 0
        self._is_full = False
        self._life: int | None = None

    def measure(self, now_s: float, is_full: bool, life: int | None) -> None:
        """To be called whenever is_full, whether there is more to do than can be taken up, may have changed. life: which engine
        is at work, None where none is; the time that one takes to take the place of another says nothing of either."""
        is_full = is_full and life is not None
        if self._is_full and now_s - self._since_s < self._interval_s:
            self._is_full = is_full
            return
        if not self._is_full and not is_full:
            return
        counted = self._read_count()
        if self._is_full and life == self._life and counted >= self._counted:
            kept = math.exp((self._since_s - now_s) / self.MEMORY_S)
            self._count = self._count * kept + counted - self._counted
            self._seconds = self._seconds * kept + now_s - self._since_s
        self._since_s, self._counted, self._is_full, self._life = now_s, counted, is_full, life

    @property
    def a_second(self) -> float:
        """0 until enough has been seen."""
        return self._count / self._seconds if self._seconds >= self._enough_s else 0.0


class OutputLength:
    """How long answers are that may end by themselves, learnt from those that did: max_tokens is often all the context left.
    The first guess counts for GUESS_WEIGHT answers, and the mean is over about MEMORY of them."""

    FIRST_GUESS = 256
    GUESS_WEIGHT = 4
    MEMORY = 64

    def __init__(self) -> None:
        self._mean = float(self.FIRST_GUESS)
        self._num_learnt = self.GUESS_WEIGHT

    def expect(self, sampling: SamplingParams) -> int:
        """Tokens of one choice."""
        if sampling.ignore_eos:
            return sampling.max_tokens
        return min(sampling.max_tokens, max(sampling.min_tokens, int(self._mean)))

    def learn(self, sampling: SamplingParams, num_tokens: float) -> None:
        if not sampling.ignore_eos:
            self._num_learnt = min(self.MEMORY, self._num_learnt + 1)
            self._mean += (num_tokens - self._mean) / self._num_learnt


class AnswerTimes:
    """How long the answers take that have ended lately, from first token to end, and how many tokens a second that was."""

    WEIGHT = 1 / 16

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0
        self._weight = 0.0

    def learn(self, seconds: float, num_tokens: float) -> None:
        """num_tokens: that came in these seconds, so without the first."""
        kept = 1.0 - self.WEIGHT
        self._seconds = self._seconds * kept + seconds
        self._tokens = self._tokens * kept + num_tokens
        self._weight = self._weight * kept + 1.0

    @property
    def mean_s(self) -> float:
        """0 until an answer has ended."""
        return self._seconds / self._weight if self._weight else 0.0

    def tokens_a_second(self, seconds: float, num_tokens: float) -> float:
        """Of one answer; seconds, num_tokens: of all that are coming now, up to now. 0 where there are none yet."""
        seconds += self._seconds
        return (num_tokens + self._tokens) / seconds if seconds > 0.0 else 0.0


class State(NamedTuple):
    """How much is open, and of that, how much has had no output yet."""

    num_open: int
    num_waiting: int
    num_slots: int


class Burst:
    """How many may be open without a look at how long they wait: as many as a burst has brought, and a few more.

    A burst is what comes to a server that has nothing to do, or little, much faster than it can take it up: load tools and
    batch jobs open all their connections at once. What it brought may stay as it is, so that clients which ask anew as soon as
    they are answered are never refused. The level follows what is open down, and every refusal takes one from it: more than
    that is wanted, so it is no closed circle of clients, and the queue is to become short.
    """

    LENGTH_S = 1.0  # since somebody came who found at most a quarter of the slots in use and nobody waiting
    SHARE_IN_USE = 0.25
    STEEPNESS = 5.0  # seconds by which the wait grows in a second; at four times what a server can do they are three
    SLACK = 1.125  # for a stranger among them, and for clients that pause before they ask anew
    MEMORY_S = 10.0

    def __init__(self) -> None:
        self._idle_s = -math.inf
        self._level = 0.0
        self._peak = 0  # of what was open, since _since_s
        self._since_s = 0.0

    def lets_in(self, now_s: float, before: State, num_added: int, wait_s: float) -> bool:
        """To be asked whenever somebody comes. wait_s: how long they would wait; 0 too where that is not known."""
        if not before.num_waiting and before.num_open <= before.num_slots * self.SHARE_IN_USE:
            self._idle_s = now_s
        if now_s - self._since_s >= self.MEMORY_S:
            self._level = min(self._level, self.SLACK * self._peak)
            self._peak, self._since_s = before.num_open, now_s
        since_s = now_s - self._idle_s
        if since_s <= self.LENGTH_S and wait_s >= self.STEEPNESS * since_s:
            self._level = max(self._level, self.SLACK * (before.num_open + num_added))
        return before.num_open + num_added <= self._level

    def has_entered(self, now_s: float, num_open: int) -> None:
        """num_open: with those who came."""
        self._peak = max(self._peak, num_open)
        if now_s - self._idle_s <= self.LENGTH_S:
            self._level = max(self._level, num_open)

    def was_refused(self) -> None:
        self._level = max(0.0, self._level - 1.0)
