"""Cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores this process may run on, where the system tells (all of them elsewhere), and no more than its container's quota
    pays for: threads beyond it would be stopped in the middle of a step, and the others wait for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup_root / "cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no control groups of version 2, or "max": no quota
        return cores
