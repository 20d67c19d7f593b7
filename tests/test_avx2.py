"""On a CPU with AVX-512 the kernels' tests run once more as on one without: AVX2, no bfloat16 and no VNNI instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/engine/kernels/test_cpu_ops.py",
    "tests/engine/kernels/test_int8.py",
    "tests/engine/test_linear.py",
    "tests/engine/test_native_attention.py",
    "tests/engine/test_native_decoder.py",
)


@pytest.mark.timeout(600)
def test_the_kernels_tests_pass_with_avx2_alone():
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512: the other tests ran with what it has")
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
