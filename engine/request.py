"""Request: one choice on its way through the engine. `n` choices of one API request are `n` Requests with one request_id."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.messages import Pooling, TokenLogprobs
from engine.sampling_params import SamplingParams

_uids = itertools.count(1)


class RequestStatus(enum.Enum):
    """WAITING in the queue; PENDING_FORK until its sibling has computed the prompt; RUNNING in a slot; PREEMPTED: pages given
    back, a step still in flight; FINISHED, whatever the reason."""

    WAITING = enum.auto()
    PENDING_FORK = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


class FinishReason(enum.StrEnum):
    """Why a choice ended, in the words of the API."""

    STOP = "stop"
    LENGTH = "length"


class TokenMatcher(Protocol):
    """Follows a choice's tokens and knows which may come next; see `grammar`."""

    def accept(self, token_id: int) -> bool:
        """Take in the choice's next token; returns whether nothing may follow. Raises RequestFailed where it cannot go on."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """One choice. `token_ids` holds prompt and output; `num_computed_tokens` (positions whose keys and values are in pages or
    scheduled to be) catches up with it, and that is all there is to prefill and decode.

    stop_token_ids: those that end it (the model's and the user's). num_inflight_steps: scheduled, result not yet known.
    num_tokens_ahead: known tokens and those that steps in flight will bring. pending_forks: siblings that wait for this one's
    prompt. block_hashes: chained hashes of the full blocks, as far as known. matcher: follows the output, where its tokens are
    restricted by those before them. pooled: what the steps so far have brought of the embedding.
    alone: its next step is to be one of its own. first_token_deadline_s, deadline_s: of time.monotonic(). rank: its place in
    the queue, the lowest first; see `waiting_queue`.
    Kept by KVCacheManager: page_capacity, positions that its block table covers; next_mark, the number of computed tokens
    from which on `mark_computed` has something to do.
    """

    request_id: str
    choice_index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    cache_salt: str = ""
    wants_prompt_logprobs: bool = False
    priority: int = 0
    pooling: Pooling | None = None
    matcher: TokenMatcher | None = None
    alone: bool = False
    first_token_deadline_s: float | None = None
    deadline_s: float | None = None
    uid: int = field(default_factory=lambda: next(_uids))
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1
    num_computed_tokens: int = 0
    num_inflight_steps: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    page_capacity: int = 0
    next_mark: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    pending_forks: list[Request] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: npt.NDArray[np.float32] | None = None
    arrival_time_s: float = 0.0
    rank: float = 0.0
    first_scheduled_time_s: float | None = None
    num_tokens_ahead: int = field(init=False)
    max_total_tokens: int = field(init=False)
    num_tokens_to_compute: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens_ahead = len(self.token_ids)
        # Tokens after which it ends, stop token or not. The last of them is never an input.
        self.max_total_tokens = self.num_prompt_tokens + self.sampling.max_tokens
        self.num_tokens_to_compute = max(self.num_prompt_tokens, self.max_total_tokens - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens whose value is known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
