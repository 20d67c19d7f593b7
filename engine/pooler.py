"""Hidden states to embeddings: what a step's chunk adds to the vector of each pooled row.

The host puts the chunks of a prompt together: of "mean" it adds up the sums, of "last" it keeps the last one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.messages import Pooling
from engine.step import NewRow, SchedulerOutput
from engine.token_masks import IntArray


class Pooler:
    """Knows of each slot how its hidden states are pooled."""

    def __init__(self) -> None:
        self._pooling: dict[int, Pooling] = {}

    def fill(self, rows: Iterable[NewRow]) -> None:
        for row in rows:
            if row.pooling is not None:
                self._pooling[row.slot] = row.pooling
            else:
                self._pooling.pop(row.slot, None)

    def pool(self, step: SchedulerOutput, row_ends: IntArray, hidden: torch.Tensor) -> torch.Tensor | None:
        """float32 [P, E] of the step's P pooled rows, from final hidden states [T, E]; None where there are none.

        "mean": the sum over the chunk's positions. "last": the chunk's last position. row_ends: one past each row's last token.
        """
        vectors = []
        for row in step.pooled_rows:
            end = int(row_ends[row])
            chunk = hidden[end - step.num_tokens[row] : end]
            vectors.append(chunk[-1].float() if self._pooling[step.slots[row]] == "last" else chunk.sum(0, dtype=torch.float32))
        return torch.stack(vectors) if vectors else None
