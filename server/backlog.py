"""Backlog: what this server has given its engine, and whether there is room for more.

The frontend decides, not the engine that has the queue: an engine answers between two steps, which may be a second apart, and
a refusal has to come at once. The frontend knows all it takes, for everything in the queue went through it. It counts a request
in before anything is awaited: of a burst whose requests all looked first and were counted later, all would pass.
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engine.errors import Overloaded
from engine.messages import EngineReady, EngineStats
from engine.sampling_params import SamplingParams
from server.pace import AnswerTimes, Burst, OutputLength, Pace, State

MAX_WAIT_S = 60.0
"""Without a limit of its own, as many tokens may wait as the engine gets through in this time; the longest Retry-After too."""

LEAST_MAX_WAIT_S = 1.5
ANSWER_SHARE = 1 / 4
"""Without a limit of its own, a request may wait for this share of the time that an answer takes here, and at least so long."""

FEW_PROMPTS = 4
"""Where a slot is free, so many prompts before its own are no reason to refuse a request, however long they are: one client's
long text would keep everybody else away."""


class Work(NamedTuple):
    """What a request is expected to take. num_tokens: of its prompt and of all its choices' outputs; num_output_tokens: of
    these alone."""

    num_choices: int
    num_tokens: int
    num_output_tokens: int = 0


class Ticket:
    """A request's place in the backlog, from before it is sent until it has ended. num_output_tokens: of all its choices, so
    far; whoever reads its answer counts them here."""

    __slots__ = ("_backlog", "_is_open", "_num_choices_left", "num_output_tokens", "started_s", "work")

    def __init__(self, backlog: Backlog, work: Work) -> None:
        self.work = work
        self.num_output_tokens = 0
        self.started_s: float | None = None
        self._backlog = backlog
        self._num_choices_left = work.num_choices
        self._is_open = True

    def start(self) -> None:
        """It has had its first output: it waits no longer."""
        if self.started_s is None:
            self.started_s = self._backlog._has_started(self)

    def end_choice(self) -> None:
        """One of its choices has ended by itself; with the last of them it is closed."""
        self._num_choices_left -= 1
        if self._num_choices_left == 0:
            self.close()

    def close(self) -> None:
        """It has ended, in whatever way. May be called again."""
        self.start()
        if self._is_open:
            self._is_open = False
            self._backlog._has_ended(self)

    def num_later_tokens(self) -> float:
        """Of one choice, after its first."""
        return max(0.0, self.num_output_tokens / self.work.num_choices - 1.0)

    def num_tokens_left(self) -> float:
        """Of one choice, by what was expected; 0 where it has had more."""
        return max(0.0, (self.work.num_output_tokens - self.num_output_tokens) / self.work.num_choices)


class Backlog:
    """Bounds what waits for the engine beyond what it can run at once: by how long who comes now would wait, in requests (every
    choice counts as one) and in tokens; and says when there will be room.

    max_wait_s: of who comes, until the engine takes it up and has computed the prompts before its own. None is the larger of
    LEAST_MAX_WAIT_S and ANSWER_SHARE of an answer's time, 0 any time; see `Burst` for who is let in all the same.
    max_waiting_requests: 0 is any number. max_waiting_tokens: None is what the engine gets through in MAX_WAIT_S, 0 any number.
    observe_shed: is told the reason of every refusal. read_life: see `Pace`. clock: in seconds, for tests.

    Who finds nobody waiting is never too many and never too large: what is too much for an empty server is no matter of load.
    """

    def __init__(
        self,
        read_stats: Callable[[], EngineStats],
        *,
        max_wait_s: float | None,
        max_waiting_requests: int,
        max_waiting_tokens: int | None,
        observe_shed: Callable[[str], None],
        read_life: Callable[[], int | None] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_wait_s = max_wait_s
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._observe_shed = observe_shed
        self._read_life = read_life
        self._clock = clock
        # The engine tells its counters every quarter of a second; what has started is known at once.
        self._pace = Pace(lambda: read_stats().prompt_tokens + read_stats().generation_tokens, interval_s=0.5, enough_s=3.0)
        self._prompt_pace = Pace(lambda: self._num_started_prompt_tokens, interval_s=0.0, enough_s=1.0)
        self._outputs = OutputLength()
        self._answers = AnswerTimes()
        self._burst = Burst()
        self._num_slots = 0
        self._num_page_tokens = 0
        self._num_step_tokens = 0
        self._num_started_prompt_tokens = 0
        self._promised_until_s = -math.inf  # when the last of those who were refused is to come again
        self._open = Work(0, 0)
        self._waiting = Work(0, 0)  # without a first output: in the queue, or being begun
        self._running: dict[Ticket, None] = {}  # with a first output

    def expect(self, num_prompt_tokens: int, sampling: SamplingParams) -> Work:
        """What a request will take, with outputs of the usual length where it does not say."""
        num_output_tokens = sampling.n * self._outputs.expect(sampling)
        return Work(sampling.n, num_prompt_tokens + num_output_tokens, num_output_tokens)

    def enter(self, works: Sequence[Work], ready: EngineReady) -> list[Ticket]:
        """Count requests in, all or none. Raises Overloaded where they would wait too long; never waits itself."""
        self._num_slots, self._num_page_tokens = ready.max_num_seqs, ready.kv_cache_tokens
        self._num_step_tokens = ready.max_num_batched_tokens
        self._measure()
        before = Work(self._num_waiting(), self.tokens_ahead())
        added = Work(0, 0)
        for work in works:
            added = _sum(added, work)
        too_long = self._too_long(added)
        self._open, self._waiting = _sum(self._open, added), _sum(self._waiting, added)
        for too_much in (self._too_many_requests(before, added), self._too_many_tokens(before, added), too_long):
            if too_much is not None:
                self._open, self._waiting = _sum(self._open, added, -1), _sum(self._waiting, added, -1)
                raise self.overloaded(*too_much, num_choices=added.num_choices)
        self._burst.has_entered(self._clock(), self._open.num_choices)
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
        """How long who came now would wait until the engine has its prompt to compute. 0 where nothing was measured yet."""
        return max(self._wait_for_work_s(), self._wait_for_turn_s())

    def max_wait_s(self) -> float:
        """How long a request may be expected to wait; infinity where there is no bound."""
        if self._max_wait_s is None:
            return max(LEAST_MAX_WAIT_S, ANSWER_SHARE * self._answers.mean_s)
        return self._max_wait_s or math.inf

    def overloaded(self, reason: str, sentence: str, num_choices: int = 1) -> Overloaded:
        """A refusal, counted. sentence: what there is too much of. num_choices: of what is refused.

        When to come again: once what is here has been taken up, and those refused before who come again too. Told the same
        second, a whole crowd would be back in it, and most of them refused again.
        """
        self._observe_shed(reason)
        now = self._clock()
        self._promised_until_s = max(self._promised_until_s, now + self.wait_s()) + num_choices * self._turn_s()
        self._promised_until_s = min(self._promised_until_s, now + MAX_WAIT_S)
        seconds = max(1, math.ceil(self._promised_until_s - now))
        return Overloaded(f"{sentence}; try again in {seconds} s.", retry_after_s=seconds)

    def _num_waiting(self) -> int:
        return max(0, self._open.num_choices - self._num_slots)

    def _num_begun(self) -> int:
        """Choices that have a slot and no output yet."""
        return max(0, self._waiting.num_choices - self._num_waiting())

    def _wait_for_work_s(self) -> float:
        """Until what waits has been taken up, at the present pace."""
        pace = self._pace.a_second
        return self.tokens_ahead() / pace if pace else 0.0

    def _wait_for_turn_s(self) -> float:
        """Until as many answers have ended as it takes, and the prompts before its own are computed.

        Answers that begin together and are equally long end together: however many a second that is on the average, who comes
        after they have begun waits until then.
        """
        prompt_s = self._prompt_s()
        at_s = self._num_begun() * prompt_s
        num_ahead = self._open.num_choices - self._num_slots
        if num_ahead < 0:
            return at_s
        for free_s in self._slots_free_s(num_ahead, at_s):
            at_s = max(at_s, free_s) + prompt_s
        return at_s - prompt_s

    def _slots_free_s(self, num_ahead: int, begun_s: float) -> list[float]:
        """When those who wait will have slots, and who comes after them. begun_s: until the prompts in slots are computed."""
        speed = self._answer_speed()
        if not speed:
            return [0.0] * (num_ahead + 1)
        lefts_s = sorted(num_tokens / speed for num_tokens in self._tokens_left())
        usual_s = self._usual_answer_s(speed)
        num_late = bisect_right(lefts_s, 0.0)  # longer than expected: when they will end nobody knows, hardly all at once
        lefts_s[:num_late] = [usual_s * (index + 1) / num_late for index in range(num_late)]
        lefts_s += [usual_s + begun_s] * self._num_begun()
        lefts_s.sort()
        return [lefts_s[index % len(lefts_s)] + index // len(lefts_s) * usual_s for index in range(num_ahead + 1)]

    def _answer_speed(self) -> float:
        """Tokens a second of one answer. 0 where there was none yet."""
        now = self._clock()
        seconds = sum(now - ticket.started_s for ticket in self._running if ticket.started_s is not None)
        return self._answers.tokens_a_second(seconds, sum(ticket.num_later_tokens() for ticket in self._running))

    def _usual_answer_s(self, speed: float) -> float:
        """What an answer takes of what is open, on the average, from its first token on. 0 where that is not known."""
        return self._open.num_output_tokens / self._open.num_choices / speed if speed and self._open.num_choices else 0.0

    def _turn_s(self) -> float:
        """Between one free slot and the next, on the average."""
        return self._usual_answer_s(self._answer_speed()) / max(1, self._num_slots)

    def _tokens_left(self) -> Iterator[float]:
        """Of each choice that has begun to answer, by what was expected."""
        for ticket in self._running:
            yield from itertools.repeat(ticket.num_tokens_left(), ticket.work.num_choices)

    def _prompt_s(self) -> float:
        """What a prompt takes of those not yet computed."""
        pace = self._prompt_pace.a_second
        if not pace or not self._waiting.num_choices:
            return 0.0
        return (self._waiting.num_tokens - self._waiting.num_output_tokens) / self._waiting.num_choices / pace

    def _num_begun_prompt_tokens(self) -> float:
        if not self._waiting.num_choices:
            return 0.0
        num_prompt_tokens = self._waiting.num_tokens - self._waiting.num_output_tokens
        return num_prompt_tokens * self._num_begun() / self._waiting.num_choices

    def _too_long(self, added: Work) -> tuple[str, str] | None:
        """The reason to refuse what is to be added, and a sentence about it; None where there is none."""
        now, limit_s = self._clock(), self.max_wait_s()
        has_room = self._open.num_choices < self._num_slots and self._waiting.num_choices <= FEW_PROMPTS
        wait_s = self._wait_for_work_s() if has_room else self.wait_s()
        before = State(self._open.num_choices, self._waiting.num_choices, self._num_slots)
        is_let_in = self._burst.lets_in(now, before, added.num_choices, wait_s)
        if is_let_in or wait_s <= limit_s:
            return None
        self._burst.was_refused()
        return "waiting_time", f"it would wait longer than {limit_s:.1f} s for its first token (--max-wait-s)"

    def _too_many_requests(self, before: Work, added: Work) -> tuple[str, str] | None:
        limit = self._max_waiting_requests
        if not limit or not before.num_choices or self._num_waiting() <= limit:
            return None
        waiting = f"{before.num_choices} requests are waiting, and with {added.num_choices} more it would be more than {limit}"
        return "waiting_requests", f"{waiting} (--max-waiting-requests)"

    def _too_many_tokens(self, before: Work, added: Work) -> tuple[str, str] | None:
        if self._max_waiting_tokens is not None:
            limit, why = self._max_waiting_tokens, "--max-waiting-tokens"
        else:
            limit, why = int(self._pace.a_second * MAX_WAIT_S), f"{MAX_WAIT_S:.0f} s of work; --max-waiting-tokens"
        if not limit or not before.num_tokens or self.tokens_ahead() <= limit:
            return None
        waiting = (
            f"about {before.num_tokens} tokens are waiting, and with {added.num_tokens} more it would be more than {limit}"
        )
        return "waiting_tokens", f"{waiting} ({why})"

    def _has_started(self, ticket: Ticket) -> float:
        """When it did."""
        self._measure()
        work = ticket.work
        self._num_started_prompt_tokens += work.num_tokens - work.num_output_tokens
        self._waiting = _sum(self._waiting, work, -1)
        self._running[ticket] = None
        self._measure()
        return self._clock()

    def _has_ended(self, ticket: Ticket) -> None:
        assert ticket.started_s is not None
        self._open = _sum(self._open, ticket.work, -1)
        del self._running[ticket]
        if ticket.num_output_tokens:
            self._answers.learn(self._clock() - ticket.started_s, ticket.num_later_tokens())
        self._measure()

    def _measure(self) -> None:
        now, life = self._clock(), self._read_life()
        self._pace.measure(now, self.tokens_ahead() > 0, life)
        self._prompt_pace.measure(now, self._num_begun_prompt_tokens() >= self._num_step_tokens > 0, life)


def _sum(one: Work, other: Work, sign: int = 1) -> Work:
    return Work(
        one.num_choices + sign * other.num_choices,
        one.num_tokens + sign * other.num_tokens,
        one.num_output_tokens + sign * other.num_output_tokens,
    )
