"""Kernel tests draw the same numbers whichever tests ran before them in the process: some errors depend on the draw."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)
