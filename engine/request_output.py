"""What a step brought for a choice, as it is told to the frontend."""

from __future__ import annotations

import time

from engine.errors import OctavoError, RequestFailed
from engine.messages import ErrorInfo, RequestOutput, TokenLogprobs
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


def make_failure(request: Request, error: OctavoError) -> RequestOutput:
    """The end of a request, all its choices, with an error."""
    return RequestOutput(
        request_id=request.request_id,
        choice_index=request.choice_index,
        first_token_index=request.num_output_tokens,
        finish_reason="error",
        error=ErrorInfo.of(error),
    )


def bad_numbers(request: Request) -> RequestFailed:
    """Where the model's numbers for a request went bad."""
    place = "its prompt" if request.num_output_tokens == 0 else f"output token {request.num_output_tokens}"
    allowed = "" if request.matcher is None else " for any token that is allowed there"
    sentence = f"the model gave no usable numbers (NaN or infinity) after {place}{allowed}; only this request is ended"
    return RequestFailed(sentence, code="bad_numbers")


def _embedding(request: Request) -> bytes | None:
    if request.pooled is None:
        return None
    vector = request.pooled / request.num_prompt_tokens if request.pooling == "mean" else request.pooled
    return vector.astype("<f4").tobytes()
