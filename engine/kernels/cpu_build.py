"""The CPU kernels: C++ sources compiled for this machine into one shared library, kept in a cache and loaded with ctypes.

A home may be shared by machines, and one CPU's code must never reach another, so an entry's key takes in the sources, the
flags, the CPU and the compiler. The compiler stands there by path, size and modification time instead of by what `--version`
prints: asking costs a process or two at every start, and code from another version of it would still be right, only older.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("c++", "g++", "clang++")
BUILD_LIMIT_S = 120.0  # all compilers together; also how long to wait for another process that builds
UNUSED_LIMIT_S = 30 * 24 * 3600.0

_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_AVX2_LEVEL = "x86-64-v3"
_AVX2_SPELLED_OUT = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")  # for compilers that know no levels
_AVX2_FEATURES = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}  # what that level allows, as /proc/cpuinfo names it

# $1 is a folder for temporary files, the rest is the compiler's command line. stdin is the sign of life of the process that
# waits: when it closes, the compiler and all it started end too. (Descriptor 3, because sh gives background commands no stdin.)
_SUPERVISED = """
exec 3<&0
TMPDIR=$1 LC_ALL=C
export TMPDIR LC_ALL
shift
"$@" </dev/null 3<&- &
compiler=$!
{ read -r line <&3; kill -9 -$$; } &
watch=$!
wait $compiler
status=$?
kill -9 $watch
exit $status
"""


class CpuLibraryUnavailable(Exception):
    """There is no library of CPU kernels; the message is the reason, a part of a sentence for the log."""


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The loaded library, where it lies, and what made it."""

    library: ctypes.CDLL
    path: Path  # no longer there where no cache could be written
    compiler: str
    flags: tuple[str, ...]
    built: bool  # now, not found in the cache
    seconds: float  # that finding or building, and loading, took


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to build, and the name of its entry in the cache."""

    compiler: str
    flags: tuple[str, ...]
    key: str


_Loaded = tuple[_Candidate, Path, ctypes.CDLL]


def load_cpu_library(*, sources: Path = SOURCES, cache: Path | None = None, build: bool = True) -> CpuLibrary:
    """The library of all `*.cpp` in `sources`, from `cache` (else the user's) or, with `build`, compiled now.

    A compiler that fails gives way to the next. Where the cache cannot be written, the library is built for this process alone.
    Raises CpuLibraryUnavailable where there is no library for this CPU or nothing to make it with.
    """
    start_s = time.perf_counter()
    root = cache or _user_cache()
    candidates = _candidates(sources)
    loaded = _find(candidates, root)
    built = False
    if loaded is None and not build:
        raise CpuLibraryUnavailable("the CPU kernels are not compiled yet")
    if loaded is None:
        try:
            folder = _writable_folder(root)
            with _locked(folder):
                loaded = _find(candidates, folder)  # another process may have built it meanwhile
                if loaded is None:
                    loaded, built = _build(candidates, sources, folder), True
        except OSError as error:
            raise CpuLibraryUnavailable(f"the CPU kernels could not be compiled: {error}") from error
        if folder != root:
            shutil.rmtree(folder, ignore_errors=True)  # what is loaded stays, as any unlinked file that is in use
    candidate, path, library = loaded
    return CpuLibrary(library, path, candidate.compiler, candidate.flags, built, time.perf_counter() - start_s)


def _user_cache() -> Path:
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry, as in some containers: nothing can be written there and nothing will be
        home = Path("/")
    return home / ".cache" / "octavo" / "kernels"


def _candidates(sources: Path) -> list[_Candidate]:
    """All ways to build here, the preferred first."""
    cpu, features = _describe_cpu()
    instruction_sets = _instruction_sets(features)
    try:
        files = sorted(path for path in sources.iterdir() if path.suffix in {".cpp", ".h"})
        contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    except OSError as error:
        raise CpuLibraryUnavailable(f"the sources of the CPU kernels cannot be read: {error}") from error
    if not any(path.suffix == ".cpp" for path in files):
        raise CpuLibraryUnavailable(f"there are no sources of CPU kernels in {sources}")
    candidates = []
    for compiler, identity in _compilers():
        for instructions in instruction_sets:
            flags = (*_FLAGS, *instructions)
            parts = (contents, compiler, identity, flags, cpu, sorted(features))
            candidates.append(_Candidate(compiler, flags, hashlib.sha256(repr(parts).encode()).hexdigest()[:32]))
    return candidates


def _describe_cpu() -> tuple[str, set[str]]:
    """The CPU's model, and its features where the system lists them."""
    described: dict[str, str] = {}
    try:
        # Small reads, up to the first processor's end: the list of a large machine takes the kernel milliseconds to write.
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace", buffering=4096) as lines:
            for line in lines:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                described[name.strip()] = value.strip()
    except OSError:
        return platform.processor(), set()
    return f"{described.get('vendor_id')} {described.get('model name')}", set(described.get("flags", "").split())


def _instruction_sets(features: set[str]) -> tuple[tuple[str, ...], ...]:
    """Flags for the instructions that torch uses on this CPU (it can be told to use fewer); later ones for older compilers."""
    if os.name != "posix":
        raise CpuLibraryUnavailable("the CPU kernels are compiled on Linux and macOS only")
    if platform.machine() not in {"x86_64", "amd64"}:
        raise CpuLibraryUnavailable(f"the CPU kernels need an x86-64 CPU and this one is {platform.machine()}")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return (("-march=native",),)
    if capability != "AVX2":
        raise CpuLibraryUnavailable(f"the CPU kernels need AVX2 and torch's report of this CPU is {capability!r}")
    if features and not features >= _AVX2_FEATURES:
        raise CpuLibraryUnavailable(f"this CPU has AVX2 but not {', '.join(sorted(_AVX2_FEATURES - features))}")
    return (f"-march={_AVX2_LEVEL}",), _AVX2_SPELLED_OUT


def _compilers() -> list[tuple[str, str]]:
    """Path of each C++ compiler here, one that has two names once, and what tells its version from others."""
    found: dict[str, str] = {}
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            file = Path(path).resolve()
            stat = file.stat()
            found.setdefault(f"{file} {stat.st_size} {stat.st_mtime_ns}", path)
    if not found:
        raise CpuLibraryUnavailable(
            f"there is no C++ compiler ({', '.join(COMPILERS)}) to make the CPU kernels with: "
            "install one (Debian/Ubuntu: apt install g++)"
        )
    return [(path, identity) for identity, path in found.items()]


def _find(candidates: list[_Candidate], root: Path) -> _Loaded | None:
    """The first candidate that is in the cache, whole, and loads."""
    for candidate in candidates:
        entry = root / candidate.key
        for path in entry.glob("*.so"):
            # A file's name is its content's hash. Not left to the loader: a cut-off file can end the process there (SIGBUS).
            with suppress(OSError):
                if _content_hash(path) == path.stem:
                    library = ctypes.CDLL(str(path))
                    with suppress(OSError):  # the cache may be read-only
                        os.utime(entry)  # in use: see _drop_unused
                    return candidate, path, library
    return None


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _writable_folder(root: Path) -> Path:
    """`root`, or a temporary folder where nothing can be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        logger.warning("the CPU kernels are compiled for this process only, because their cache cannot be written: %s", error)
        return Path(tempfile.mkdtemp(prefix="octavo-kernels-"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time, as far as locks go: what is built is moved into place in one piece, so two do no harm."""
    import fcntl  # POSIX only, as is all that builds

    with open(folder / "lock", "w", encoding="utf-8") as lock:
        deadline_s = time.monotonic() + BUILD_LIMIT_S
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield


def _build(candidates: list[_Candidate], sources: Path, folder: Path) -> _Loaded:
    """Compile with the first candidate that can, keep the library in `folder` and load it."""
    deadline_s = time.monotonic() + BUILD_LIMIT_S
    log = folder / "build.log"
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work, log.open("w", encoding="utf-8") as log_file:
        for candidate in candidates:
            if candidate.compiler in failed and _AVX2_LEVEL not in failed[candidate.compiler]:
                continue  # it was not for want of that name
            logger.info("compiling the CPU kernels with %s", candidate.compiler)
            output = Path(work) / "library.so"
            error = _compile(candidate, sources, output, log_file, deadline_s)
            if error is None:
                path = _keep(output, folder / candidate.key)
                try:
                    loaded = candidate, path, ctypes.CDLL(str(path))
                except OSError as why:
                    error = f"the library does not load: {why}"
                else:
                    _drop_unused(folder)
                    return loaded
            failed[candidate.compiler] = error
    said = _gist(next(iter(failed.values())))
    raise CpuLibraryUnavailable(f"{' and '.join(failed)} could not compile the CPU kernels ({said}); the whole log is in {log}")


def _compile(candidate: _Candidate, sources: Path, output: Path, log: TextIO, deadline_s: float) -> str | None:
    """Compile `sources` into `output`, until `deadline_s` of time.monotonic(). What went wrong, None where nothing did."""
    files = [str(path) for path in sorted(sources.glob("*.cpp"))]
    command = [candidate.compiler, *candidate.flags, "-o", str(output), *files]
    said = output.with_name("said")
    with said.open("wb") as said_file:
        # A group of its own, so that what the compiler starts can be ended with it.
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SUPERVISED, "sh", str(output.parent), *command],
            stdin=subprocess.PIPE,
            stdout=said_file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status: int | None = process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:
                with suppress(OSError):  # it ended just now
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
    error = said.read_text(encoding="utf-8", errors="replace")
    if status is None:
        error += f"\nstopped after the {BUILD_LIMIT_S:g} s that compiling may take"
    log.write(f"{shlex.join(command)}\n{error}\n")
    log.flush()
    return None if status == 0 else error or f"it ended with status {status}"


def _gist(error: str) -> str:
    """The last lines of what a compiler said, without the source lines and notes that it puts under them."""
    lines = [line for line in error.splitlines() if line.strip() and not line[0].isspace() and " note: " not in line]
    return " / ".join(lines[-3:])[-500:]


def _keep(built: Path, entry: Path) -> Path:
    """Move a library that was built into its entry, in place of damaged ones."""
    entry.mkdir(exist_ok=True)
    path = entry / f"{_content_hash(built)}.so"
    os.replace(built, path)
    for other in entry.glob("*.so"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _drop_unused(root: Path) -> None:
    """Remove the entries, and what an interrupted build left, that nobody used for long."""
    for entry in root.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}|build-\w+", entry.name):
            with suppress(OSError):
                if time.time() - entry.stat().st_mtime > UNUSED_LIMIT_S:
                    shutil.rmtree(entry, ignore_errors=True)


def main() -> None:
    """Compile ahead, for scripts/install, and say in one line what was done or why not."""
    try:
        made = load_cpu_library()
    except CpuLibraryUnavailable as error:
        print(f"No CPU kernels, plain torch runs instead: {error}")
        return
    said = subprocess.run([made.compiler, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    version = re.search(r"\d+(\.\d+)+", said)
    compiler = " ".join([Path(made.compiler).name, *([version[0]] if version else [])])
    if made.built:
        print(f"Compiled the CPU kernels with {compiler} in {made.seconds:.0f} s")
    else:
        print(f"The CPU kernels are there already, compiled with {compiler}")


if __name__ == "__main__":
    main()
