"""What a step brought for a choice, as it is told to the frontend."""

from __future__ import annotations

import time

from engine.messages import RequestOutput, TokenLogprobs
from engine.request import FinishReason, Request


def make_output(
    request: Request,
    token_ids: list[int],
    logprobs: TokenLogprobs | None,
    reason: FinishReason | None,
    stop_token_id: int | None = None,
) -> RequestOutput:
    """The last tokens of `request.token_ids`, with what is told once: with the first of them, or at an end without any."""
    first_index = request.num_output_tokens - len(token_ids)
    is_first = first_index == 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    if request.wants_prompt_logprobs and is_first:
        prompt_logprobs = [None, *request.prompt_logprobs]
        request.wants_prompt_logprobs = False  # told once; if it is preempted from now on, it need not compute them again
    scheduled_s = request.first_scheduled_time_s if is_first else None
    return RequestOutput(
        request_id=request.request_id,
        choice_index=request.choice_index,
        first_token_index=first_index,
        token_ids=token_ids,
        logprobs=None if logprobs is None else [logprobs],
        prompt_logprobs=prompt_logprobs,
        finish_reason=None if reason is None else reason.value,
        stop_token_id=stop_token_id,
        num_cached_tokens=request.num_cached_tokens if is_first else 0,
        queue_s=None if scheduled_s is None else scheduled_s - request.arrival_time_s,
        prefill_s=None if scheduled_s is None else time.monotonic() - scheduled_s,
        embedding=_embedding(request),
        num_preemptions=request.num_preemptions,
    )


def _embedding(request: Request) -> bytes | None:
    if request.pooled is None:
        return None
    vector = request.pooled / request.num_prompt_tokens if request.pooling == "mean" else request.pooled
    return vector.astype("<f4").tobytes()
