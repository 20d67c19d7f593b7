"""RequestStream: what the engine says of one request, as text, for the one who reads it. Owned by the EngineClient."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType

import msgspec

from engine.deadlines import FIRST_TOKEN, WHOLE
from engine.detokenizer import Detokenizer
from engine.errors import OctavoError
from engine.messages import AddRequest, RequestOutput, TokenLogprobs


class ChoiceDelta(msgspec.Struct, gc=False):
    """What is new of one choice. text: new and safe to send; token_ids and logprobs: the new tokens.

    finish_reason: "stop" | "length", on the last one. stop_reason: the stop string, or the caller's stop token
    id, that ended it; None for the model's own end.
    prompt_logprobs: with the first delta of the choice, when asked for. queue_s, prefill_s: with the first one; embedding too.
    num_preemptions: so far.
    """

    choice_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    embedding: bytes | None = None
    num_preemptions: int = 0

    def extend(self, later: ChoiceDelta) -> None:
        """Take in the choice's next delta: what comes with the first one stays, the end is the later one's."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_preemptions = later.num_preemptions


class Choice:
    """What the frontend knows of one choice: its text so far lives in the detokenizer. token_ids: its output so far, for an
    engine that is to go on with it (four bytes each; as a list they would take nine times that)."""

    __slots__ = ("detokenizer", "finished", "num_preemptions", "token_ids")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.token_ids = array("i")
        self.finished = False
        self.num_preemptions = 0


class RequestStream:
    """Iterates over what is new, a ChoiceDelta for each choice that has something; ends when every choice has.

    A reader that keeps up sees a delta for every output of the engine. What comes in while it is behind is joined on arrival:
    it then gets few long deltas instead of many short ones, and neither its time nor our memory goes into their number.

    shortcut: takes what is new in the reader's place, without waking its task, while that waits and the stream goes on. It
    returns what the reader then has to await first, or None; what it raises, the reader gets.

    events: (what, time.monotonic()) of what held the request up: "preemption", told by the first token after it, "engine_died",
    and "replay", when the next engine was given it.

    Raises RequestFailed or EngineUnavailable where the engine gave up. Leaving the `async with` aborts what is unfinished.
    """

    def __init__(
        self,
        message: AddRequest,
        choices: list[Choice],
        eos_token_ids: frozenset[int],
        abort: Callable[[str], None],
    ) -> None:
        """message: the request as it was made, kept for `replay`."""
        self.request_id = message.request_id
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.finished = False
        self.events: list[tuple[str, float]] = []
        self._has_lost_engine = False
        self._message = message
        self.shortcut: Callable[[list[ChoiceDelta]], Awaitable[None] | None] | None = None
        self._choices = choices
        self._num_unfinished = len(choices)
        self._eos_token_ids = eos_token_ids
        self._abort = abort
        self._news: list[ChoiceDelta] = []
        self._error: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished: Awaitable[None] | None = None

    def take(self, output: RequestOutput) -> int | None:
        """Add an engine output; returns the choice's index when a stop string ended it, so that the engine can be told.

        The reader hears of it with the next `deliver`.
        """
        if output.error is not None:
            self.fail(output.error.to_exception())
            return None
        choice = self._choices[output.choice_index]
        if choice.finished:
            return None  # tokens that were on their way when a stop string ended it
        token_ids, logprobs, num_known = output.token_ids, output.logprobs, len(choice.token_ids)
        if skip := num_known - output.first_token_index:
            assert skip > 0, "the engine left out a token"
            token_ids = token_ids[skip:]
            logprobs = None if logprobs is None else logprobs[skip:]
        choice.token_ids.extend(token_ids)
        if output.finish_reason is None and len(token_ids) == 1 and choice.detokenizer.is_plain:
            delta = ChoiceDelta(output.choice_index, choice.detokenizer.push(token_ids[0]), token_ids, logprobs)
            stopped = False
        else:
            delta, stopped = self._read(choice, output, token_ids, logprobs)
        if not num_known:
            delta.prompt_logprobs = output.prompt_logprobs
            delta.num_cached_tokens = output.num_cached_tokens
            delta.queue_s, delta.prefill_s = output.queue_s, output.prefill_s
            delta.embedding = output.embedding
        if output.num_preemptions:
            delta.num_preemptions = output.num_preemptions
            self._note_preemptions(choice, output.num_preemptions)
        if delta.finish_reason is not None:
            choice.finished = True
            self._num_unfinished -= 1
            self.finished = not self._num_unfinished
        for unread in self._news:
            if unread.choice_index == delta.choice_index:
                unread.extend(delta)
                break
        else:
            self._news.append(delta)
        return output.choice_index if stopped and output.finish_reason is None else None

    def _note_preemptions(self, choice: Choice, number: int) -> None:
        if number > choice.num_preemptions:
            self.events.append(("preemption", time.monotonic()))
        choice.num_preemptions = number  # the next engine begins again at 0

    def _read(
        self, choice: Choice, output: RequestOutput, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> tuple[ChoiceDelta, bool]:
        """The delta of tokens among which the choice may end, and whether a stop string has ended it."""
        # A token that only ends the text, like an end-of-turn mark, is counted but has no place in it.
        text = choice.detokenizer.append(token_ids if output.stop_token_id is None else token_ids[:-1])
        if text.stop is not None:
            logprobs = None if logprobs is None else logprobs[: text.num_tokens]
            seen = token_ids[: text.num_tokens]
            return ChoiceDelta(output.choice_index, text.text, seen, logprobs, "stop", text.stop), True
        rest = choice.detokenizer.finish() if output.finish_reason is not None else ""
        stop_reason = None if output.stop_token_id in self._eos_token_ids else output.stop_token_id
        text_now = text.text + rest
        return ChoiceDelta(output.choice_index, text_now, token_ids, logprobs, output.finish_reason, stop_reason), False

    def replay(self, *, alone: bool) -> AddRequest:
        """The request as an engine is told it that knows nothing of it, to go on after the last token that came. alone: see
        AddRequest."""
        token_ids = [choice.token_ids.tolist() for choice in self._choices]
        has_tokens = any(token_ids)
        if self._has_lost_engine:
            self.events.append(("replay", time.monotonic()))
        return msgspec.structs.replace(
            self._message,
            output_token_ids=token_ids if has_tokens else [],
            finished_choices=[index for index, choice in enumerate(self._choices) if choice.finished],
            first_token_deadline_s=None if has_tokens else self._message.first_token_deadline_s,
            alone=alone,
        )

    def engine_died(self) -> None:
        """The engine that was to compute this is gone; `replay` is for the next one."""
        self._has_lost_engine = True
        self.events.append(("engine_died", time.monotonic()))

    def deadlines(self) -> list[tuple[str, float]]:
        """(kind, time.monotonic()) of those that still hold."""
        first = None if any(choice.token_ids for choice in self._choices) else self._message.first_token_deadline_s
        kinds = ((FIRST_TOKEN, first), (WHOLE, self._message.deadline_s))
        return [(kind, at_s) for kind, at_s in kinds if at_s is not None]

    def fail(self, error: OctavoError) -> None:
        """End the stream with an error, after what has arrived."""
        self._error = error
        self.finished = True

    def deliver(self) -> None:
        """Give the reader what is new, if it waits for it. One that is busy finds it by itself."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self.shortcut is not None and not self.finished:
            news, self._news = self._news, []
            try:
                self._unfinished = self.shortcut(news)
            except Exception as error:  # the other streams are not to suffer for it
                self._unfinished = _raise(error)
            if self._unfinished is None:
                return
        waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        while not self._news:
            if self._error is not None:
                raise self._error
            if self.finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if self._unfinished is not None:
                unfinished, self._unfinished = self._unfinished, None
                await unfinished
        news, self._news = self._news, []
        return news

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Free what the engine still holds for this stream. Harmless when it has finished."""
        self._abort(self.request_id)


async def _raise(error: Exception) -> None:
    raise error
