"""This process's CPU kernels: loaded, and built if need be, when first asked for."""

from __future__ import annotations

import functools
import logging

import torch

from engine.kernels.cpu_build import CpuLibraryUnavailable, load_cpu_library
from engine.kernels.cpu_ops import CpuKernels

logger = logging.getLogger(__name__)


@functools.cache
def _load() -> CpuKernels | str:
    try:
        found = load_cpu_library()
    except CpuLibraryUnavailable as error:
        return str(error)
    kernels = CpuKernels(found.library, torch.get_num_threads())
    how = f"compiled with {found.compiler} in {found.seconds:.1f} s" if found.built else "from the cache"
    logger.info("CPU kernels for %s, %d threads, %s", kernels.isa, kernels.num_threads, how)
    return kernels


def cpu_kernels() -> CpuKernels:
    """Raises CpuLibraryUnavailable where there are none. Its team has as many threads as torch had at the first call."""
    found = _load()
    if isinstance(found, str):
        raise CpuLibraryUnavailable(found)
    return found


def unavailable_reason() -> str | None:
    """Why there are none; None where there are."""
    found = _load()
    return found if isinstance(found, str) else None
