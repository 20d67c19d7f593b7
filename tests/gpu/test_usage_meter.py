"""The meter on a card: NVML finds it by its UUID, and its numbers are those of the CUDA runtime."""

from __future__ import annotations

import pytest
import torch

from engine.usage_meter import _Gpu

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run scripts/gpu_check on one", allow_module_level=True)


def test_memory_and_utilisation_are_the_card_s() -> None:
    held = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    usage = _Gpu("cuda").read(0)
    free, total = torch.cuda.mem_get_info()
    assert usage.name == "cuda:0"
    assert usage.memory_total_bytes == pytest.approx(total, rel=0.05)
    assert held.numel() <= usage.memory_used_bytes == pytest.approx(total - free, rel=0.1, abs=2**30)
    assert usage.utilization is None or 0 <= usage.utilization <= 1
