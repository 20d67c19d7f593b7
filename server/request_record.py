"""RequestRecord: what becomes known of one HTTP request, put together where it is learnt, for its log line and its trace.

Whoever works for the request finds it with `current`: it goes along through tasks in a context variable.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.sampling_params import SamplingParams

MAX_LOGGED_PATH = 200
MAX_PHASES = 16
"""Of how many prompts of one request the phases are kept; a trace of thousands helps nobody."""
DIGITS = 6


class Phases(NamedTuple):
    """How one prompt fared. queue_s, prefill_s: as the engine measured them. first_s, last_s: time.monotonic(), when the first
    and the last output of it came."""

    queue_s: float
    prefill_s: float
    first_s: float
    last_s: float


class Event(NamedTuple):
    """at_s: time.monotonic()."""

    name: str
    at_s: float


@dataclass(slots=True)
class RequestRecord:
    """started_s: time.monotonic(). key_id: "" on a server without keys, "invalid" for a stranger. status: 0 before a response.
    error: the code of the error it ended with. trace_id: "" where traces are off. finish_reasons: one a choice, also "abort"
    and "error". sampling: of its first prompt. phases: of its first prompts. Times in seconds.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    trace_id: str = ""
    started_s: float = field(default_factory=time.monotonic)
    key_id: str = ""
    status: int = 0
    error: str | None = None
    model: str | None = None
    response_id: str | None = None
    stream: bool | None = None
    sampling: SamplingParams | None = None
    num_prompts: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)
    preemptions: int = 0
    phases: list[Phases] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add_phases(self, queue_s: float, prefill_s: float) -> None:
        """One more prompt's, which has just been computed and wants no tokens."""
        if len(self.phases) < MAX_PHASES:
            now = time.monotonic()
            self.phases.append(Phases(queue_s, prefill_s, now, now))

    @property
    def is_broken(self) -> bool:
        """Whether something went wrong after the status had been sent."""
        return "error" in self.finish_reasons

    @property
    def num_replays(self) -> int:
        """How often an engine went on with what one that had died had begun."""
        return sum(event.name == "replay" for event in self.events)

    def fields(self) -> dict[str, Any]:
        """For the log, by name; without what there is nothing to say of."""
        found = {
            "method": self.method,
            "path": self.path[:MAX_LOGGED_PATH],
            "status": self.status,
            "api_key_id": self.key_id or None,
            "model": self.model,
            "response_id": self.response_id,
            "error": self.error,
            "finish_reason": self.finish_reason or None,
            "queue_s": self.queue_s,
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "total_s": self.total_s,
            "preemptions": self.preemptions or None,
            "replays": self.num_replays or None,
        }
        if self.prompt_tokens is not None:
            found["prompt_tokens"] = self.prompt_tokens
            found["cached_tokens"] = self.cached_tokens
            found["output_tokens"] = self.output_tokens
        return {
            name: round(value, DIGITS) if isinstance(value, float) else value
            for name, value in found.items()
            if value is not None
        }

    def sentence(self) -> str:
        """The same for people."""
        path = self.path[:MAX_LOGGED_PATH]
        parts = [f"{self.method} {path if _PLAIN_PATH.fullmatch(path) else ascii(path)} {self.status}"]
        if self.key_id:
            parts.append(f"key {self.key_id}")
        if self.prompt_tokens is not None:
            parts.append(f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached)")
            parts.append(f"{self.output_tokens} output tokens")
        if self.queue_s is not None:
            parts.append(f"queue {self.queue_s:.3f} s")
        if self.ttft_s is not None:
            parts.append(f"first token {self.ttft_s:.3f} s")
        parts.append(f"total {self.total_s:.3f} s")
        if self.preemptions:
            parts.append(f"preempted {self.preemptions}x")
        if self.num_replays:
            parts.append(f"replayed {self.num_replays}x")
        parts += filter(None, (self.finish_reason, self.error))
        return ", ".join(parts)

    @property
    def finish_reason(self) -> str:
        """The different ones of all choices, most often one; "" where nothing was generated."""
        return "+".join(sorted(set(self.finish_reasons)))


_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~:-]+")
_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current() -> RequestRecord:
    """Of the request that is worked for; one that nobody reads where there is none."""
    return _current.get() or RequestRecord()


def set_current(record: RequestRecord) -> None:
    """From here on, in this task and those it starts. It need not be taken back: a request's task does nothing else."""
    _current.set(record)


def log_context() -> Mapping[str, str]:
    """What every line says that is logged while a request is worked for."""
    record = _current.get()
    if record is None:
        return {}
    ids = {"request_id": record.request_id}
    if record.trace_id:
        ids["trace_id"] = record.trace_id
    return ids
