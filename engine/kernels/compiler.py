"""Triton where it is installed: kernels import `triton` and `tl` from here.

A CPU install has no Triton. The modules must still import there, because each kernel's plain-torch reference lives beside it;
the kernels themselves are then never called (`HAS_TRITON` is False and the dispatchers take the reference).
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands for triton and for triton.language while kernels are being defined."""

        def jit(self, function: Any = None, **_options: Any) -> Any:
            return self.jit if function is None else function

        def __getattr__(self, name: str) -> Any:
            return None

    triton = _Absent()
    tl = _Absent()

__all__ = ["HAS_TRITON", "tl", "triton"]
