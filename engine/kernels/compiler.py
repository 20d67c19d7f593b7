"""Triton where it is installed: kernels import `triton` and `tl` from here.

A CPU install has no Triton. The modules must still import there, because each kernel's plain-torch reference lives beside it;
the kernels themselves are then never called (`HAS_TRITON` is False and the dispatchers take the reference).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, a launch only compiles its kernel, all of them side by side in threads; they are ready at the end.

    Compilers release the interpreter's lock, so a cold start takes as long as the slowest kernel, not as their sum. Where this
    Triton cannot do so, nothing changes: kernels then compile at their first launch.
    """
    try:
        from triton.runtime import _async_compile
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with (
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="compile") as pool,
        _async_compile.AsyncCompileMode(pool, ignore_errors=True),
    ):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run


def is_compiled(launched: Any) -> bool:
    """Whether what a launch returned can be launched again by itself: not in the interpreter, nor within `compiling_ahead`."""
    return type(launched).__name__ == "CompiledKernel"


__all__ = ["HAS_TRITON", "compiling_ahead", "is_compiled", "tl", "triton"]
