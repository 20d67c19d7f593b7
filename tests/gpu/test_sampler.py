"""The general sampling path on a GPU: a row is the same alone and in a crowd, and what its knobs keep is what they keep on a
CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.sampler import sample
from tests.engine.test_sampler import batch_of, crowd_columns, finite, random_logits

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run scripts/gpu_check on one", allow_module_level=True)

CUDA = torch.device("cuda")
VOCAB = 128_256


def masks_of(rows: int) -> dict[str, Any]:
    """Bans for every third row, permissions for every fifth."""
    rng = np.random.default_rng(2)
    words = {row: rng.integers(-(2**31), 2**31, size=-(-VOCAB // 32)).astype(np.int32) for row in range(0, rows, 5)}
    return {"banned": [(row, rng.choice(VOCAB, 9, replace=False)) for row in range(0, rows, 3)], "allowed": words}


def row_of(masks: dict[str, Any], row: int) -> dict[str, Any]:
    allowed = {0: masks["allowed"][row]} if row in masks["allowed"] else {}
    return {"banned": [(0, ids) for owner, ids in masks["banned"] if owner == row], "allowed": allowed}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@torch.inference_mode()
def test_a_row_is_the_same_alone_and_in_a_crowd(scale: float):
    rows = 65
    logits = random_logits(rows, VOCAB, scale).bfloat16().float().to(CUDA)  # ties at every cut
    columns, masks = crowd_columns(rows), masks_of(rows)
    crowd = logits.clone()
    together = sample(crowd, batch_of(rows, **columns, **masks)).tolist()
    for row in range(rows):
        one = logits[row : row + 1].clone()
        drawn = sample(one, batch_of(1, **{k: v[row] for k, v in columns.items()}, **row_of(masks, row)))
        assert int(drawn) == together[row]


@torch.inference_mode()
def test_cuts_keep_what_they_keep_on_a_cpu():
    """All rows are random, so that what falls out shows in the logits they were given."""
    rows = 24
    logits = random_logits(rows, 5000, 3.0)
    columns = crowd_columns(rows)
    columns["temperature"] = np.where(columns["temperature"] > 0, columns["temperature"], 0.7)
    on_cpu, on_gpu, reversed_crowd = logits.clone(), logits.to(CUDA), logits.flip(0).to(CUDA)
    for given, order in ((on_cpu, 1), (on_gpu, 1), (reversed_crowd, -1)):
        sample(given, batch_of(rows, **{name: values[::order] for name, values in columns.items()}))
    assert finite(on_gpu.cpu()) == finite(reversed_crowd.flip(0).cpu())
    for row, (theirs, ours) in enumerate(zip(finite(on_cpu), finite(on_gpu.cpu()), strict=True)):
        # softmax rounds differently on the two: the last token in may be another
        assert len(theirs ^ ours) <= 1, f"row {row}: {len(theirs)} and {len(ours)} tokens"
