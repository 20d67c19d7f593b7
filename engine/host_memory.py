"""Memory that this process may have, and may still take: what the machine has free, and what its control groups leave it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_SELF_CGROUP = Path("/proc/self/cgroup")


def available_bytes(cgroup_root: Path = _CGROUP_ROOT, self_cgroup: Path = _SELF_CGROUP) -> int:
    """Bytes that can be taken without swapping, never below zero. Where there are no control groups (macOS) the machine's."""
    left = int(psutil.virtual_memory().available)
    for folder in cgroups("memory", cgroup_root, self_cgroup):
        limit = _read_int(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _read_int(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left = min(left, limit - max(0, used - _reclaimable(folder / "memory.stat")))
    return max(0, left)


def total_bytes(cgroup_root: Path = _CGROUP_ROOT, self_cgroup: Path = _SELF_CGROUP) -> int:
    """Bytes that this process could have in all: the machine's, or less where a control group has a limit."""
    limits = (_read_int(f / "memory.max", f / "memory.limit_in_bytes") for f in cgroups("memory", cgroup_root, self_cgroup))
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def cgroups(controller: str, cgroup_root: Path = _CGROUP_ROOT, self_cgroup: Path = _SELF_CGROUP) -> Iterator[Path]:
    """The process's cgroup of a controller and all above it (a parent's limit binds too), version 2 and version 1.

    Inside a container the path may name a place outside its view; the walk then still ends at the visible root.
    """
    try:
        lines = self_cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroup_root / controller if controllers else cgroup_root
        folder = root / path.lstrip("/")
        while folder != root and root in folder.parents:
            yield folder
            folder = folder.parent
        yield root


def _read_int(*paths: Path) -> int | None:
    """The first file that holds a number; None where none does ("max" means no limit)."""
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return None


def _reclaimable(stat: Path) -> int:
    """File pages counted as used that the kernel gives back before it refuses memory."""
    try:
        fields = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
