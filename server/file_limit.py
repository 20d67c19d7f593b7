"""How many files, connections among them, a server may have open."""

from __future__ import annotations

import contextlib
import resource

from engine.errors import ConfigError

OWN_FILES = 256  # beside its connections: those of --metrics-port and those that are being refused are among them
METRICS_CONNECTIONS = 32
FEWEST_CONNECTIONS = 4096


def wanted_files(max_open_requests: int) -> int:
    """Files that a server may have open at once: a connection for each request, and its own. 0 requests is no limit of them."""
    return (max_open_requests or 4096) + OWN_FILES


def wanted_connections(max_connections: int | None, max_open_requests: int) -> int:
    """How many connections a server is to serve at once: as given, or four for each request, since clients keep some open that
    they do not use, and many however few requests there may be: those beyond are to hear that from Admission."""
    return max_connections or max(FEWEST_CONNECTIONS, 4 * (max_open_requests or 4096))


def possible_connections(max_connections: int | None, max_open_requests: int) -> int:
    """The same, as far as this process may open files. Raises ConfigError where that is less than was asked for."""
    wanted = wanted_connections(max_connections, max_open_requests)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return wanted
    possible = max(most - OWN_FILES, most // 2)
    if max_connections is not None and max_connections > possible:
        needed = max_connections + OWN_FILES
        raise ConfigError(
            f"{max_connections} connections need {needed} open files, and this process may have {most}: raise its "
            f"limit (ulimit -Hn), or lower --max-connections",
            param="max_connections",
        )
    return min(wanted, possible)


def raise_file_limit(wanted: int) -> None:
    """Lets the process have so many files open, as far as it may: systems hand out 1,024, and a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below the one it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
