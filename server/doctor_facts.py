"""What `octavo doctor` looks at, as plain facts. Each reader may fail, or hang: `server.doctor` runs it with a time limit."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from server.file_limit import wanted_files

ROOT = Path(__file__).parent.parent
NVIDIA_SMI_LIMIT_S = 15.0
PROBE_LIMIT_S = 90.0
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class System:
    name: str
    release: str
    machine: str
    python: tuple[int, int, int]


@dataclass(frozen=True)
class Cores:
    """usable: that the process may run on. quota: what its control groups allow, in cores; None is no limit."""

    online: int
    usable: int
    quota: float | None = None
    num_threads: int | None = None


@dataclass(frozen=True)
class Memory:
    """limit: of the control groups, where that is below the machine's total."""

    total: int
    available: int
    limit: int | None = None


@dataclass(frozen=True)
class Disk:
    """setting: what names another folder in its place. device: the file system, by its number."""

    purpose: str
    path: str
    free: int
    is_writable: bool
    setting: str
    device: int = 0


@dataclass(frozen=True)
class ProcessLimits:
    """None is no limit. open_files: the hard limit (ulimit -Hn). cpu_s, address_bytes: ulimit -t and -v."""

    open_files: int | None
    cpu_s: int | None
    address_bytes: int | None
    wanted_files: int


@dataclass(frozen=True)
class SharedMemory:
    exists: bool
    is_writable: bool = False
    total: int = 0
    free: int = 0


@dataclass(frozen=True)
class Gpu:
    index: str
    name: str
    driver: str
    total: int
    free: int
    capability: float
    persistence: str


@dataclass(frozen=True)
class Gpus:
    """wanted: auto, cpu or cuda. users: (pid, program, bytes or None) that have memory there."""

    wanted: str
    has_driver: bool
    visible: str | None = None
    error: str = ""
    cards: tuple[Gpu, ...] = ()
    users: tuple[tuple[str, str, int | None], ...] = ()
    torch: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    name: str
    pinned: str
    installed: str | None


@dataclass(frozen=True)
class Port:
    """error: an errno of binding it, 0 where that worked. holder: who listens there, as far as one may know."""

    setting: str
    host: str
    number: int
    error: int = 0
    reason: str = ""
    holder: str = ""


def read_system() -> System:
    name, release = platform.system(), platform.release()
    if name == "Linux":
        try:
            pretty = platform.freedesktop_os_release().get("PRETTY_NAME", "")
        except OSError:
            pretty = ""
        name = f"{pretty} (Linux {release})" if pretty else f"Linux {release}"
    else:
        name = f"{name} {release}"
    return System(name, release, platform.machine(), sys.version_info[:3])


def read_cores(num_threads: int | None) -> Cores:
    online = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    return Cores(online, usable, cpu_quota(), num_threads)


def cpu_quota(root: Path = _CGROUPS, of: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the process's control groups allow, the tightest of them; None where none limits it."""
    from engine.host_memory import cgroups

    quotas = [quota for folder in cgroups("cpu", root, of) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(quota) / int(period) if quota not in ("max", "-1") else None


def read_memory() -> Memory:
    import psutil

    from engine.host_memory import available_bytes

    total = int(psutil.virtual_memory().total)
    available = available_bytes()
    machine_free = int(psutil.virtual_memory().available)
    return Memory(total, available, available if available < 0.9 * machine_free else None)


def read_disk(purpose: str, path: Path, setting: str) -> Disk:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            is_writable = True
    except OSError:
        is_writable = False
    return Disk(purpose, str(path), shutil.disk_usage(existing).free, is_writable, setting, existing.stat().st_dev)


def read_limits(max_open_requests: int) -> ProcessLimits:
    import resource

    def limit(kind: int, which: int = 0) -> int | None:
        value = resource.getrlimit(kind)[which]
        return None if value == resource.RLIM_INFINITY else value

    return ProcessLimits(
        limit(resource.RLIMIT_NOFILE, 1), limit(resource.RLIMIT_CPU), limit(resource.RLIMIT_AS), wanted_files(max_open_requests)
    )


def read_shared_memory(path: Path = Path("/dev/shm")) -> SharedMemory:
    if not path.is_dir():
        return SharedMemory(False)
    usage = shutil.disk_usage(path)
    return SharedMemory(True, os.access(path, os.W_OK), usage.total, usage.free)


def read_packages() -> list[Package] | None:
    """Every package that Octavo pins, for this system; None where Octavo itself is not installed."""
    try:
        pins = requires("octavo") or []
    except PackageNotFoundError:
        return None
    found = []
    for line in pins:
        matched = re.match(r"([\w.-]+)==([\w.]+)(.*)", line)
        if matched is None or "extra ==" in line or (sys.platform != "win32" and 'sys_platform == "win32"' in line):
            continue
        name, pinned = matched[1], matched[2]
        try:
            installed: str | None = version(name)
        except PackageNotFoundError:
            installed = None
        found.append(Package(name, pinned, installed))
    return found


def read_port(setting: str, host: str, number: int) -> Port:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except socket.gaierror as error:
        return Port(setting, host, number, error=-1, reason=str(error.strerror))
    except OSError as error:
        number_of = error.errno or -1
        holder = _holder(number) if number_of == errno.EADDRINUSE else ""
        return Port(setting, host, number, number_of, os.strerror(number_of) if number_of > 0 else str(error), holder)
    return Port(setting, host, number)


def _holder(port: int) -> str:
    """`name (process N)` of who listens; "" where that is not told to this user."""
    try:
        import psutil

        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and connection.pid and address and address.port == port:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except Exception:  # psutil has errors of its own, also for what may not be asked
        return ""
    return ""


def read_gpus(wanted: str, environ: Mapping[str, str]) -> Gpus:
    """has_driver: as `octavo serve` decides between GPU and CPU."""
    from server.config import has_nvidia_driver

    visible = environ.get("CUDA_VISIBLE_DEVICES")
    has_driver = has_nvidia_driver(environ)
    torch = ask_engine("torch")
    if not has_driver:
        return Gpus(wanted, False, visible, torch=torch)
    fields = "index,name,driver_version,memory.total,memory.free,compute_cap,persistence_mode"
    answer = _nvidia_smi(f"--query-gpu={fields}")
    if isinstance(answer, str):
        return Gpus(wanted, True, visible, answer, torch=torch)
    users = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory")
    return Gpus(
        wanted,
        True,
        visible,
        cards=tuple(map(_card, answer)),
        users=() if isinstance(users, str) else tuple((row[0], row[1], _bytes(row[2])) for row in users),
        torch=torch,
    )


def _card(row: list[str]) -> Gpu:
    index, name, driver, total, free, capability, persistence = row
    return Gpu(index, name, driver, _bytes(total) or 0, _bytes(free) or 0, _number(capability), persistence)


def _nvidia_smi(query: str) -> list[list[str]] | str:
    """Rows of cells, or what went wrong."""
    program = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_LIMIT_S,
            check=False,
        )
    except FileNotFoundError:
        return "nvidia-smi is not on the PATH"
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    if done.returncode:
        return f"nvidia-smi says: {' '.join((done.stdout + done.stderr).split())[:200]}"
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _bytes(cell: str) -> int | None:
    return int(cell) << 20 if cell.isdigit() else None


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return 0.0


def ask_engine(part: str, *arguments: str, limit_s: float = PROBE_LIMIT_S) -> dict[str, Any]:
    """What `engine.self_check` says of a part, from a process of its own; {"error": ...} where it does not."""
    # -P: a folder named engine where the user happens to be is not ours.
    command = [sys.executable, "-P", "-m", "engine.self_check", part, *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit_s:.0f} s"}
    except OSError as error:
        return {"error": f"{sys.executable} does not start: {error.strerror}"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines() or ["nothing"]
        return {"error": f"its process ended with code {done.returncode}, saying {said[-1][:300]}"}
    return answer if isinstance(answer, dict) else {"error": "it answered nonsense"}


def unknown_settings(environ: Mapping[str, str], known: Sequence[str]) -> list[str]:
    """OCTAVO_ variables that are set and are no setting."""
    names = {f"OCTAVO_{name.upper()}" for name in known} | {"OCTAVO_CONFIG"}
    return sorted(name for name, value in environ.items() if name.startswith("OCTAVO_") and value and name not in names)
