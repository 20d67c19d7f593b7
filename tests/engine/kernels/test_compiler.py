"""An install without Triton (a CPU, a Mac) imports everything that serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_engine_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import engine.build, engine.attention.triton; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "imported", done.stderr
