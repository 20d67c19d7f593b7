"""NaN stays NaN on its way into FP8. A device's minimum and maximum drop it, which the interpreter's do not: so what is looked
at without a card is the code that is made for one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import fp8, rotary

ROOT = Path(__file__).parents[3]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.kernels import fp8, rotary

def show(kernel, types, constants):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    print(compile(ASTSource(fn=kernel, signature=signature, constexprs=values), target=GPUTarget("cuda", 90, 32)).asm["ptx"])
    print("----")

rows = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
for tile in (64, 128):
    show(fp8._quantize_rows_kernel, rows, {"CHANNELS": 100, "TILE": tile, "LARGEST": 448.0, "SMALLEST": 1e-12})
pages = {"k_pages_ptr": "*fp8e4nv", "v_pages_ptr": "*fp8e4nv", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
pages |= {name: "*i32" for name in ("positions_ptr", "token_slots_ptr", "tables_ptr")}
sizes = {"NUM_KV_HEADS": 2, "HEAD_DIM": 64, "BLOCK_SIZE": 16, "ROWS": 4, "HAS_SCALE": True}
show(rotary._write_kv_kernel, pages | {"k_ptr": "*bf16", "v_ptr": "*bf16"}, sizes | {"TILE": 64})
"""


def test_no_bound_of_the_compiled_kernels_drops_it() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    programs = done.stdout.split("----")[:-1]
    assert len(programs) == 3
    for program in programs:
        assert "e4m3x2" in program
        bounds = re.findall(r"\bmin[\w.]*\.f32", program)
        assert bounds and all(".NaN" in bound for bound in bounds), bounds


@pytest.mark.skipif(not HAS_FP8, reason="needs a card that converts to FP8")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_bad_numbers_says_so_on_a_card(bad: float) -> None:
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    x[1, 7] = bad
    stored, scales = fp8.quantize_rows(x)
    back = stored.float() * scales
    assert back[1].isnan().any() and not back[0].isnan().any() and not back[2].isnan().any()


@pytest.mark.skipif(not HAS_FP8, reason="needs a card that converts to FP8")
def test_pages_keep_it_on_a_card() -> None:
    heads = torch.ones(2, 2, 64, device="cuda", dtype=torch.bfloat16)
    heads[0, 1, 5] = float("nan")
    one = torch.ones(1, device="cuda")
    pages = [torch.zeros(2, 2, 16, 64, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)]
    positions, slots = (torch.tensor(ids, device="cuda", dtype=torch.int32) for ids in ([0, 1], [0, 0]))
    tables = torch.ones(1, 1, device="cuda", dtype=torch.int32)
    rotary.write_kv(heads, heads, positions, slots, tables, *pages, k_scale=one, v_scale=one)
    for part in pages:
        assert part.float().isnan().nonzero().tolist() == [[1, 1, 0, 5]]
