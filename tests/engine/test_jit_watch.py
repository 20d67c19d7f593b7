"""Compilations within a step are told, each by itself; by Triton's own compiler, for a card that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KERNEL = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.jit_watch import watch_compiles

class Card:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

@triton.jit
def fill(out, VALUE: tl.constexpr):
    tl.store(out + tl.program_id(0), VALUE)

driver.set_active(Card())
watch_compiles(lambda: print("begin"), lambda: print("end"))
for value in (1.0, 1.0, 2.0):
    print("launch")
    fill.warmup(triton.MockTensor(torch.float32), value, grid=(1,))
"""


def test_first_launches_are_told_and_others_are_not(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "script.py"  # Triton reads a kernel's source
    script.write_text(KERNEL)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environ |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environ, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["launch", "begin", "end", "launch", "launch", "begin", "end"]


def test_without_triton_nothing_is_watched() -> None:
    code = (
        "import sys, types\n"
        "from engine.jit_watch import watch_compiles\n"
        "watch_compiles(print, print)\n"
        "assert 'triton' not in sys.modules\n"
        "other = sys.modules['triton.runtime.jit'] = types.SimpleNamespace(JITFunction=type('JITFunction', (), {}))\n"
        "watch_compiles(print, print)\n"
        "assert not hasattr(other.JITFunction, '_do_compile')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
