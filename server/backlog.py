"""Backlog: what this server has given its engine, and whether there is room for more.

The frontend decides, not the engine that has the queue: an engine answers between two steps, which may be a second apart, and
a refusal has to come at once. The frontend knows all it takes, for everything in the queue went through it. It counts a request
in before anything is awaited: of a burst whose requests all looked first and were counted later, all would pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.errors import Overloaded
from engine.messages import EngineReady, EngineStats
from engine.sampling_params import SamplingParams

MAX_WAIT_S = 60.0
"""Without a limit of its own, as many tokens may wait as the engine gets through in this time; the longest Retry-After too."""


class Work(NamedTuple):
    """What a request is expected to take. num_tokens: of its prompt and of all its choices' outputs."""

    num_choices: int
    num_tokens: int


class Ticket:
    """A request's place in the backlog, from before it is sent until it has ended."""

    __slots__ = ("_backlog", "_is_open", "_waits", "work")

    def __init__(self, backlog: Backlog, work: Work) -> None:
        self.work = work
        self._backlog = backlog
        self._is_open = True
        self._waits = True

    def start(self) -> None:
        """It has had its first output: it waits no longer."""
        if self._waits:
            self._waits = False
            self._backlog._no_longer_waits(self.work)

    def close(self) -> None:
        """It has ended, in whatever way. May be called again."""
        self.start()
        if self._is_open:
            self._is_open = False
            self._backlog._has_ended(self.work)


class Backlog:
    """Bounds what waits for the engine beyond what it can run at once, in requests (every choice counts as one) and in
    tokens, and says when there will be room.

    max_waiting_requests: None is as many as run at once, 0 any number. max_waiting_tokens: None is what the engine gets through
    in MAX_WAIT_S, 0 any number. observe_shed: is told the reason of every refusal.

    Who finds nobody waiting is let in, whatever its size: what is too large for an empty server is no matter of load.
    """

    def __init__(
        self,
        read_stats: Callable[[], EngineStats],
        *,
        max_waiting_requests: int | None,
        max_waiting_tokens: int | None,
        observe_shed: Callable[[str], None],
    ) -> None:
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._observe_shed = observe_shed
        self._pace = _Pace(read_stats)
        self._outputs = _OutputLength()
        self._num_slots = 0
        self._num_page_tokens = 0
        self._open = Work(0, 0)
        self._waiting = Work(0, 0)  # without a first output: in the queue, or being begun

    def expect(self, num_prompt_tokens: int, sampling: SamplingParams) -> Work:
        """What a request will take, with outputs of the usual length where it does not say."""
        return Work(sampling.n, num_prompt_tokens + sampling.n * self._outputs.expect(sampling))

    def enter(self, works: Sequence[Work], ready: EngineReady) -> list[Ticket]:
        """Count requests in, all or none. Raises Overloaded where they would wait too long; never waits itself."""
        self._num_slots, self._num_page_tokens = ready.max_num_seqs, ready.kv_cache_tokens
        self._measure()
        before = Work(self._num_waiting(), self.tokens_ahead())
        added = Work(sum(work.num_choices for work in works), sum(work.num_tokens for work in works))
        self._open, self._waiting = _sum(self._open, added), _sum(self._waiting, added)
        for too_much in (self._too_many_requests(before, added), self._too_many_tokens(before, added)):
            if too_much is not None:
                self._no_longer_waits(added)
                self._has_ended(added)
                raise self.overloaded(*too_much)
        self._measure()
        return [Ticket(self, work) for work in works]

    def learn(self, sampling: SamplingParams, num_output_tokens: float) -> None:
        """A request's choices have ended by themselves, after so many tokens each."""
        self._outputs.learn(sampling, num_output_tokens)

    def tokens_ahead(self) -> int:
        """Expected tokens of what waits beyond the slots and pages that the engine has."""
        by_slots = 0.0
        if self._waiting.num_choices:
            by_slots = self._waiting.num_tokens * min(1.0, self._num_waiting() / self._waiting.num_choices)
        by_pages = min(self._waiting.num_tokens, self._open.num_tokens - self._num_page_tokens)
        return max(0, int(by_slots), by_pages)

    def wait_s(self) -> float:
        """How long who came now would wait, at the present pace; 0 where none was measured yet."""
        tokens_a_second = self._pace.tokens_a_second
        return self.tokens_ahead() / tokens_a_second if tokens_a_second else 0.0

    def overloaded(self, reason: str, sentence: str) -> Overloaded:
        """A refusal, counted. sentence: what there is too much of."""
        self._observe_shed(reason)
        seconds = min(max(1, math.ceil(self.wait_s())), int(MAX_WAIT_S))
        return Overloaded(f"{sentence}; try again in {seconds} s.", retry_after_s=seconds)

    def _num_waiting(self) -> int:
        return max(0, self._open.num_choices - self._num_slots)

    def _too_many_requests(self, before: Work, added: Work) -> tuple[str, str] | None:
        """The reason to refuse what has been added, and a sentence about it; None where there is none."""
        limit = self._num_slots if self._max_waiting_requests is None else self._max_waiting_requests
        if not limit or not before.num_choices or self._num_waiting() <= limit:
            return None
        waiting = f"{before.num_choices} requests are waiting, and with {added.num_choices} more it would be more than {limit}"
        return "waiting_requests", f"{waiting} (--max-waiting-requests)"

    def _too_many_tokens(self, before: Work, added: Work) -> tuple[str, str] | None:
        if self._max_waiting_tokens is not None:
            limit, why = self._max_waiting_tokens, "--max-waiting-tokens"
        else:
            limit, why = int(self._pace.tokens_a_second * MAX_WAIT_S), f"{MAX_WAIT_S:.0f} s of work; --max-waiting-tokens"
        if not limit or not before.num_tokens or self.tokens_ahead() <= limit:
            return None
        waiting = (
            f"about {before.num_tokens} tokens are waiting, and with {added.num_tokens} more it would be more than {limit}"
        )
        return "waiting_tokens", f"{waiting} ({why})"

    def _no_longer_waits(self, work: Work) -> None:
        self._waiting = _sum(self._waiting, work, -1)
        self._measure()

    def _has_ended(self, work: Work) -> None:
        self._open = _sum(self._open, work, -1)
        self._measure()

    def _measure(self) -> None:
        self._pace.measure(self.tokens_ahead() > 0)


class _Pace:
    """Tokens a second that the engine gets through while there is more to do than it can take up: what it does with less to do
    says nothing of what it could. A mean over about MEMORY_S of such time."""

    MEMORY_S = 30.0
    INTERVAL_S = 0.5  # the engine tells its counters every quarter of a second
    ENOUGH_S = 3.0

    def __init__(self, read_stats: Callable[[], EngineStats]) -> None:
        self._read_stats = read_stats
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s = 0.0
        self._counted = 0
        self._is_full = False

    def measure(self, is_full: bool) -> None:
        """To be called whenever is_full, whether something waits beyond what the engine can take up, may have changed."""
        if not is_full:
            self._is_full = False
            return
        now = time.monotonic()
        if self._is_full and now - self._since_s < self.INTERVAL_S:
            return
        stats = self._read_stats()
        counted = stats.prompt_tokens + stats.generation_tokens
        if self._is_full and counted >= self._counted:  # less: another engine has begun to count
            kept = math.exp((self._since_s - now) / self.MEMORY_S)
            self._tokens = self._tokens * kept + counted - self._counted
            self._seconds = self._seconds * kept + now - self._since_s
        self._since_s, self._counted, self._is_full = now, counted, True

    @property
    def tokens_a_second(self) -> float:
        """0 until enough has been seen."""
        return self._tokens / self._seconds if self._seconds >= self.ENOUGH_S else 0.0


class _OutputLength:
    """How long answers are that may end by themselves, learnt from those that did: max_tokens is often all the context left."""

    FIRST_GUESS = 256
    WEIGHT = 1 / 64

    def __init__(self) -> None:
        self._mean = float(self.FIRST_GUESS)

    def expect(self, sampling: SamplingParams) -> int:
        """Tokens of one choice."""
        if sampling.ignore_eos:
            return sampling.max_tokens
        return min(sampling.max_tokens, max(sampling.min_tokens, int(self._mean)))

    def learn(self, sampling: SamplingParams, num_tokens: float) -> None:
        if not sampling.ignore_eos:
            self._mean += self.WEIGHT * (num_tokens - self._mean)


def _sum(one: Work, other: Work, sign: int = 1) -> Work:
    return Work(one.num_choices + sign * other.num_choices, one.num_tokens + sign * other.num_tokens)
