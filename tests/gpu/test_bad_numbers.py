"""Bad numbers on a GPU, graphs on and off: the sampling kernel and the general path end that request and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run scripts/gpu_check on one", allow_module_level=True)

from tests import device_harness
from tests.engine.test_bad_numbers import KINDS, POISON, ids, message, poisoned, prompt


@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["own pages", "fp8 pages"])
@torch.inference_mode()
def test_every_way_to_sample(tmp_path: Path, use_graphs: bool, kv_dtype: torch.dtype | None) -> None:
    if kv_dtype is not None and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a card that converts to FP8")
    device, dtype = torch.device("cuda"), torch.bfloat16
    engine = device_harness.build(poisoned(tmp_path), device, dtype, budget=64, use_graphs=use_graphs, kv_dtype=kv_dtype)
    while engine.runner.idle():
        pass
    clean, poison = prompt(21, seed=1), [*prompt(70, seed=2), POISON, *prompt(7, seed=3)]
    for kind, options in KINDS.items():
        if kind == "grammar":
            continue  # the harness's grammars have no end token, and so their own tests
        outputs = engine.run([message("bad", poison, **options), message("good", clean, **options)])
        errors = [output.error.code for output in outputs["bad"] if output.error is not None]
        assert errors == ["bad_numbers"] and ids(outputs["bad"]) == [], kind
        tokens = ids(outputs["good"])
        assert len(tokens) == 6 * int(options.get("n", 1)) and min(tokens) >= 0, kind  # type: ignore[call-overload]
    engine.run([message("r", clean)])
    torch.cuda.synchronize()
    pages = engine.backend._pages  # type: ignore[attr-defined]
    assert not any(bool(part.float().isnan().any()) for layer in pages.values() for part in layer)
    engine.core.close()
