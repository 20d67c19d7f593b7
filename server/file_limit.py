"""How many files, connections among them, a server may have open."""

from __future__ import annotations

import contextlib
import resource

OWN_FILES = 256  # beside its connections


def wanted_files(max_open_requests: int) -> int:
    """Files that a server may have open at once: a connection for each request, and its own. 0 requests is no limit of them."""
    return (max_open_requests or 4096) + OWN_FILES


def raise_file_limit(wanted: int) -> None:
    """Lets the process have so many files open, as far as it may: systems hand out 1,024, and a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below the one it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
