"""Tells when Triton compiles a kernel: at a kernel's first launch with new constants, which may be in the middle of a step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def watch_compiles(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """From now on begin and end are called around every compilation, and at no other launch. Nothing happens where this process
    has not imported Triton, or where that compiles elsewhere than it does now."""
    # Not Triton's own hooks (knobs.runtime): for those it writes all constants down as JSON, which not all can be.
    function: Any = getattr(sys.modules.get("triton.runtime.jit"), "JITFunction", None)
    compile_now = getattr(function, "_do_compile", None)
    if compile_now is None:
        return

    def compile_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin()
        try:
            return compile_now(self, *args, **kwargs)
        finally:
            end()

    function._do_compile = compile_and_tell
