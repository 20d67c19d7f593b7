"""An engine and its clients in virtual time, with the real Backlog in front: what becomes of minutes of load, in moments.

The engine works in steps. Each gives every answer that is being written a token and computes prompts in the order in which they
came, as many tokens as a step has room for; what it takes is a sum over both.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from engine.errors import Overloaded
from engine.messages import EngineReady, EngineStats
from engine.sampling_params import SamplingParams
from server.backlog import Backlog, Ticket
from tests.server.fake_client import FakeEngineClient


@dataclass(frozen=True)
class Machine:
    """Times in seconds. The default is about the demo model on two cores: 2.8 answers of 64 tokens a second."""

    num_slots: int = 32
    num_step_tokens: int = 512
    step_s: float = 0.05
    token_s: float = 0.0025
    prompt_token_s: float = 0.0007

    def ready(self) -> EngineReady:
        ready = FakeEngineClient().ready
        assert ready is not None
        sizes = {"max_num_seqs": self.num_slots, "max_num_batched_tokens": self.num_step_tokens, "kv_cache_tokens": 10**6}
        return msgspec.structs.replace(ready, **sizes)


@dataclass
class Request:
    """knows_length: it ends after max_tokens, and says so. when_over: is told when it was answered, or may try again.
    num_retries: how often it comes again, when it was told to, before it is over."""

    prompt_len: int = 128
    output_len: int = 64
    knows_length: bool = True
    when_over: Callable[[float], None] | None = None
    num_retries: int = 0
    came_s: float = 0.0
    num_prompt_tokens_left: int = 0
    num_output_tokens: int = 0
    ticket: Ticket = field(init=False)

    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.output_len if self.knows_length else 4096, ignore_eos=self.knows_length)


@dataclass
class Counts:
    """waits_s: until the first token. busy_slot_s: slots in use, summed over time."""

    num_refused: int = 0
    num_ended: int = 0
    waits_s: list[float] = field(default_factory=list)
    busy_slot_s: float = 0.0

    def p99_s(self) -> float:
        return sorted(self.waits_s)[int(0.99 * len(self.waits_s))]


class Simulation:
    """settings: of `Backlog`."""

    def __init__(self, machine: Machine | None = None, **settings: float | None) -> None:
        self.machine = machine or Machine()
        self.now = 0.0
        self.counts = Counts()
        self.sheds: list[str] = []
        self._ready = self.machine.ready()
        self._num_computed = 0
        limits = {"max_wait_s": None, "max_waiting_requests": 1024, "max_waiting_tokens": None, **settings}
        self.backlog = Backlog(
            lambda: EngineStats(generation_tokens=self._num_computed),
            observe_shed=self.sheds.append,
            clock=lambda: self.now,
            **limits,  # type: ignore[arg-type]
        )
        self._arrivals: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self._queue: deque[Request] = deque()
        self._slots: list[Request] = []

    # -- clients ---------------------------------------------------------------------------------------------------------

    def come(self, at_s: float, request: Request) -> None:
        heapq.heappush(self._arrivals, (at_s, next(self._numbers), request))

    def come_at_random(self, draw: random.Random, rate: float, seconds: float, make: Callable[[], Request]) -> None:
        """So many a second from now on: Poisson arrivals, of which the number is the expected one."""
        for _ in range(round(rate * seconds)):
            self.come(self.now + draw.random() * seconds, make())

    def come_in_circles(self, num_clients: int, until_s: float, make: Callable[[], Request], pause_s: float = 0.01) -> None:
        """Clients that all begin now, and ask anew as soon as they have been answered or may try again."""

        def ask(at_s: float) -> None:
            if at_s < until_s:
                request = make()
                request.when_over = lambda over_s: ask(over_s + pause_s)
                self.come(at_s, request)

        for _ in range(num_clients):
            ask(self.now)

    # -- time ------------------------------------------------------------------------------------------------------------

    def run(self, until_s: float = 1e9) -> Counts:
        """Until that time, or until there is nothing left to do. Returns what has been counted since the last time."""
        while self.now < until_s and (self._slots or self._queue or self._arrivals):
            if self._slots or self._queue:
                self._step()
            else:
                self._let_in(max(self.now, self._arrivals[0][0]))
        counts, self.counts = self.counts, Counts()
        return counts

    def _let_in(self, until_s: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= until_s:
            at_s, _, request = heapq.heappop(self._arrivals)
            self.now = max(self.now, at_s)
            self._enter(request)
        self.now = until_s

    def _enter(self, request: Request) -> None:
        work = self.backlog.expect(request.prompt_len, request.sampling())
        try:
            (request.ticket,) = self.backlog.enter([work], self._ready)
        except Overloaded as refusal:
            again_s = self.now + refusal.retry_after_s
            if request.num_retries:
                request.num_retries -= 1
                self.come(again_s, request)
                return
            self.counts.num_refused += 1
            if request.when_over is not None:
                request.when_over(again_s)
            return
        request.came_s = self.now
        request.num_prompt_tokens_left = request.prompt_len
        self._queue.append(request)

    def _step(self) -> None:
        decoding = [request for request in self._slots if not request.num_prompt_tokens_left]
        num_left = self.machine.num_step_tokens - len(decoding)
        begun: list[Request] = []
        for request in self._slots:
            num_left -= self._compute(request, num_left, begun)
        while self._queue and num_left and len(self._slots) < self.machine.num_slots:
            self._slots.append(self._queue.popleft())
            num_left -= self._compute(self._slots[-1], num_left, begun)
        num_prompt_tokens = self.machine.num_step_tokens - len(decoding) - num_left
        machine = self.machine
        seconds = machine.step_s + machine.token_s * len(decoding) + machine.prompt_token_s * num_prompt_tokens
        self.counts.busy_slot_s += seconds * len(self._slots)
        self._let_in(self.now + seconds)
        self._num_computed += len(decoding) + num_prompt_tokens
        for request in begun:
            self.counts.waits_s.append(self.now - request.came_s)
            request.ticket.start()
        for request in [*decoding, *begun]:
            self._take_token(request)

    def _compute(self, request: Request, num_left: int, begun: list[Request]) -> int:
        """A chunk of its prompt; returns how many tokens that is."""
        chunk = min(num_left, request.num_prompt_tokens_left)
        request.num_prompt_tokens_left -= chunk
        if chunk and not request.num_prompt_tokens_left:
            begun.append(request)
        return chunk

    def _take_token(self, request: Request) -> None:
        request.num_output_tokens += 1
        request.ticket.num_output_tokens += 1
        if request.num_output_tokens == request.output_len:
            self._slots.remove(request)
            request.ticket.end_choice()
            self.backlog.learn(request.sampling(), request.num_output_tokens)
            self.counts.num_ended += 1
            if request.when_over is not None:
                request.when_over(self.now)
