"""Masks of grammars on a GPU, with a step in flight while they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.test_structured_answers import check_random_schemas

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_tiny_model_answers_random_schemas_in_a_crowd(depth: int, tmp_path: Path) -> None:
    check_random_schemas(tiny_models.build("llama", tmp_path), "cuda", depth)
