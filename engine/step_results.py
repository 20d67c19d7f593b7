"""A step's results on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.messages import TokenLogprobs
from engine.sampler import LogprobsTensors
from engine.step import ModelRunnerOutput


class HostCopies:
    """Results on their way to the host, on a stream of their own, awaited by one event: the next step need not wait."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._event = torch.cuda.Event() if stream is not None else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def copy_logprobs(self, tensors: LogprobsTensors) -> LogprobsTensors:
        return LogprobsTensors(*(self.copy(x) for x in (tensors.chosen, tensors.ranks, tensors.top_ids, tensors.top_values)))

    def record(self) -> None:
        if self._event is not None:
            self._event.record(self._stream)

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def done(self) -> bool:
        return self._event is None or self._event.query()


@dataclass(slots=True)
class PendingStep:
    """See step.PendingOutput. logprobs: of the rows `logprobs_rows`, of which row i wants num_logprobs[i] best tokens.
    pooled: [P, hidden size] of the rows `pooled_rows`."""

    step_id: int
    token_ids: torch.Tensor | None
    logprobs_rows: list[int]
    num_logprobs: list[int]
    logprobs: LogprobsTensors | None
    prompt_logprobs: dict[int, list[LogprobsTensors]]
    pooled_rows: list[int]
    pooled: torch.Tensor | None
    copies: HostCopies

    def done(self) -> bool:
        """Whether the device is done with it."""
        return self.copies.done()

    def wait(self) -> ModelRunnerOutput:
        """The step's result; blocks until the device is done with it."""
        self.copies.wait()
        token_ids: list[int] = [] if self.token_ids is None else self.token_ids.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self.logprobs is not None:
            for row, entry in zip(self.logprobs_rows, _entries(self.logprobs, self.num_logprobs), strict=True):
                logprobs[row] = entry
        prompt_logprobs = {
            row: [entry for part in parts for entry in _entries(part, [part.top_ids.shape[1]] * len(part.chosen))]
            for row, parts in self.prompt_logprobs.items()
        }
        pooled = {} if self.pooled is None else dict(zip(self.pooled_rows, self.pooled.numpy(), strict=True))
        return ModelRunnerOutput(self.step_id, token_ids, logprobs, prompt_logprobs, pooled, self._bad_rows())

    def _bad_rows(self) -> list[int]:
        bad = [row for row, parts in self.prompt_logprobs.items() if any(bool(part.chosen.isnan().any()) for part in parts)]
        if self.pooled is not None:
            is_sound = self.pooled.isfinite().all(dim=1).tolist()
            bad += [row for row, sound in zip(self.pooled_rows, is_sound, strict=True) if not sound]
        return bad


def _entries(tensors: LogprobsTensors, num_best: Sequence[int]) -> list[TokenLogprobs]:
    columns = (x.tolist() for x in (tensors.chosen, tensors.ranks, tensors.top_ids, tensors.top_values))
    return [
        TokenLogprobs(logprob, rank, ids[:k], values[:k])
        for k, logprob, rank, ids, values in zip(num_best, *columns, strict=True)
    ]
