"""The CPU kernels' library: what builds it, what is kept of it, and what is said where it cannot be had; with tiny sources."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels import cpu_build
from engine.kernels.cpu_build import CpuLibrary, CpuLibraryUnavailable, load_cpu_library

ROOT = Path(__file__).resolve().parents[3]
REAL_COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CAN_BUILD = (
    REAL_COMPILER is not None
    and platform.machine() == "x86_64"
    and torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
)
# For processes that build: they need of torch only what it says of the CPU, and importing it takes seconds.
WITHOUT_TORCH = """
import platform, sys
from pathlib import Path
from types import SimpleNamespace as Has
sys.modules["torch"] = Has(backends=Has(cpu=Has(get_cpu_capability=lambda: "AVX2")))
from engine.kernels import cpu_build
cpu_build._describe_cpu = lambda: ("a CPU", set())
platform.machine = lambda: "x86_64"
sources, cache = map(Path, sys.argv[1:])
"""
needs_compiler = pytest.mark.skipif(not CAN_BUILD, reason="needs a C++ compiler and a CPU with AVX2")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "the sources"
    folder.mkdir()
    (folder / "number.h").write_text("constexpr int NUMBER = 8;\n")
    (folder / "sheet.cpp").write_text('#include "number.h"\nextern "C" int leaves() { return NUMBER; }\n')
    (folder / "pages.cpp").write_text('#include "number.h"\nextern "C" int pages() { return 2 * NUMBER; }\n')
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "the cache"


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that comes first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def avx2_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "_describe_cpu", lambda: ("a CPU", set()))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def add_compiler(folder: Path, name: str, script: str) -> None:
    """A compiler that notes its arguments in `<name>.calls` and does what `script` says."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >>"{path}.calls"\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    log = folder / f"{name}.calls"
    return log.read_text().splitlines() if log.exists() else []


def reason(sources: Path, cache: Path, *, build: bool = True) -> str:
    with pytest.raises(CpuLibraryUnavailable) as caught:
        load_cpu_library(sources=sources, cache=cache, build=build)
    return str(caught.value)


@needs_compiler
def test_build_then_find(sources: Path, cache: Path, compilers: Path) -> None:
    add_compiler(compilers, "c++", f'exec {REAL_COMPILER} "$@"')
    assert reason(sources, cache, build=False) == "the CPU kernels are not compiled yet"
    first = load_cpu_library(sources=sources, cache=cache)
    second = load_cpu_library(sources=sources, cache=cache, build=False)
    assert isinstance(first, CpuLibrary)
    assert (first.built, second.built) == (True, False)
    assert (first.library.leaves(), first.library.pages(), second.library.pages()) == (8, 16, 16)
    assert (first.path, first.flags, first.compiler) == (second.path, second.flags, str(compilers / "c++"))
    assert len(calls(compilers, "c++")) == 1
    assert sorted(path.name for path in cache.iterdir()) == sorted(["build.log", "lock", first.path.parent.name])


@needs_compiler
@pytest.mark.parametrize("changed", ["sheet.cpp", "number.h"])
def test_changed_source(sources: Path, cache: Path, changed: str) -> None:
    old = load_cpu_library(sources=sources, cache=cache)
    path = sources / changed
    path.write_text(path.read_text().replace("NUMBER; }", "NUMBER + 1; }").replace("= 8", "= 9"))
    new = load_cpu_library(sources=sources, cache=cache)
    assert new.built
    assert (old.library.leaves(), new.library.leaves()) == (8, 9)


@needs_compiler
@pytest.mark.parametrize("size", [0, 100, 4096, -1])
def test_damaged_entry(sources: Path, cache: Path, size: int) -> None:
    whole = load_cpu_library(sources=sources, cache=cache)
    content = whole.path.read_bytes()
    whole.path.unlink()  # rather than writing into what is loaded here
    whole.path.write_bytes(content[:size])
    again = load_cpu_library(sources=sources, cache=cache)
    assert again.built
    assert again.library.leaves() == 8
    assert not load_cpu_library(sources=sources, cache=cache).built
    assert len(list(again.path.parent.iterdir())) == 1


@needs_compiler
def test_entry_of_the_right_name_that_does_not_load(sources: Path, cache: Path) -> None:
    path = load_cpu_library(sources=sources, cache=cache).path
    path.unlink()  # rather than writing into what is loaded here
    path.write_bytes(b"no library")
    path.rename(path.with_stem(cpu_build._content_hash(path)))
    assert load_cpu_library(sources=sources, cache=cache).library.leaves() == 8
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@needs_compiler
def test_cache_that_cannot_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(temporary))
    (tmp_path / "file").touch()
    library = load_cpu_library(sources=sources, cache=tmp_path / "file" / "kernels")
    assert library.library.leaves() == 8
    assert "compiled for this process only, because their cache cannot be written" in caplog.text
    assert not list(temporary.iterdir())


@needs_compiler
def test_found_in_a_read_only_cache(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_cpu_library(sources=sources, cache=cache)

    def refuse(_path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(cpu_build.os, "utime", refuse)
    assert not load_cpu_library(sources=sources, cache=cache).built


@needs_compiler
def test_a_failing_compiler_gives_way_to_the_next(sources: Path, cache: Path, compilers: Path) -> None:
    add_compiler(compilers, "c++", "echo broken; exit 1")
    add_compiler(compilers, "g++", f'exec {REAL_COMPILER} "$@"')
    library = load_cpu_library(sources=sources, cache=cache)
    assert library.compiler == str(compilers / "g++")
    assert not load_cpu_library(sources=sources, cache=cache).built
    assert len(calls(compilers, "c++")) == 1


@needs_compiler
def test_a_compiler_that_knows_no_levels(sources: Path, cache: Path, compilers: Path, avx2_machine: None) -> None:
    refuse = "case \"$*\" in *x86-64-v3*) echo \"error: bad value ('x86-64-v3') for '-march=' switch\"; exit 1 ;; esac"
    add_compiler(compilers, "c++", f'{refuse}\nexec {REAL_COMPILER} "$@"')
    library = load_cpu_library(sources=sources, cache=cache)
    assert library.compiler == str(compilers / "c++")
    assert library.flags[-7:] == ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
    assert not load_cpu_library(sources=sources, cache=cache).built


@needs_compiler
def test_sources_with_an_error(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "COMPILERS", ("c++",))
    (sources / "sheet.cpp").write_text("int leaves() { return NUMBER; }\n")
    said = reason(sources, cache)
    assert "could not compile the CPU kernels (" in said
    assert "NUMBER" in said
    assert said.endswith(f"the whole log is in {cache / 'build.log'}")
    assert "-O3" in (cache / "build.log").read_text()
    assert sorted(path.name for path in cache.iterdir()) == ["build.log", "lock"]


def test_all_compilers_fail(sources: Path, cache: Path, compilers: Path, avx2_machine: None) -> None:
    add_compiler(
        compilers, "c++", "printf 'a.cpp:1:1: error: no\\n    1 | int\\n      | ^\\ncompilation terminated.\\n'; exit 1"
    )
    add_compiler(compilers, "g++", "exit 3")
    add_compiler(compilers, "clang++", "kill -9 $$")
    assert reason(sources, cache) == (
        f"{compilers}/c++ and {compilers}/g++ and {compilers}/clang++ could not compile the CPU kernels "
        f"(a.cpp:1:1: error: no / compilation terminated.); the whole log is in {cache}/build.log"
    )


def test_no_compiler(sources: Path, cache: Path, avx2_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sources))
    assert reason(sources, cache).startswith("there is no C++ compiler (c++, g++, clang++)")
    assert not cache.exists()


def test_one_compiler_of_two_names(compilers: Path) -> None:
    add_compiler(compilers, "g++", "")
    (compilers / "c++").symlink_to("g++")
    add_compiler(compilers, "clang++", "")
    assert [path for path, _ in cpu_build._compilers()] == [str(compilers / "c++"), str(compilers / "clang++")]


def test_no_sources(tmp_path: Path, cache: Path, avx2_machine: None) -> None:
    assert reason(tmp_path, cache) == f"there are no sources of CPU kernels in {tmp_path}"
    assert reason(tmp_path / "nothing", cache).startswith("the sources of the CPU kernels cannot be read: ")


@pytest.mark.parametrize(
    ("machine", "capability", "features", "said"),
    [
        ("aarch64", "DEFAULT", set(), "the CPU kernels need an x86-64 CPU and this one is aarch64"),
        ("x86_64", "DEFAULT", set(), "the CPU kernels need AVX2 and torch's report of this CPU is 'DEFAULT'"),
        ("x86_64", "NO AVX", set(), "the CPU kernels need AVX2 and torch's report of this CPU is 'NO AVX'"),
        ("x86_64", "AVX2", cpu_build._AVX2_FEATURES - {"movbe", "abm"}, "this CPU has AVX2 but not abm, movbe"),
        ("x86_64", "AVX2", cpu_build._AVX2_FEATURES, ("-march=x86-64-v3",)),
        ("x86_64", "AVX2", set(), ("-march=x86-64-v3",)),
        ("x86_64", "AVX512", set(), ("-march=native",)),
    ],
)
def test_instruction_sets(
    machine: str, capability: str, features: set[str], said: str | tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if isinstance(said, tuple):
        assert cpu_build._instruction_sets(features)[0] == said
        return
    with pytest.raises(CpuLibraryUnavailable) as caught:
        cpu_build._instruction_sets(features)
    assert str(caught.value) == said


def test_an_entry_is_for_one_cpu_and_one_compiler(
    sources: Path, compilers: Path, avx2_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_compiler(compilers, "c++", "")
    keys = {cpu_build._candidates(sources)[0].key}
    add_compiler(compilers, "c++", "# another version")
    keys.add(cpu_build._candidates(sources)[0].key)
    monkeypatch.setattr(cpu_build, "_describe_cpu", lambda: ("another CPU", set()))
    keys.add(cpu_build._candidates(sources)[0].key)
    monkeypatch.setattr(cpu_build, "_describe_cpu", lambda: ("another CPU", cpu_build._AVX2_FEATURES))
    keys.add(cpu_build._candidates(sources)[0].key)
    assert len(keys) == 4


@needs_compiler
def test_two_processes_build_once(sources: Path, cache: Path, compilers: Path) -> None:
    add_compiler(compilers, "c++", f'sleep 1\nexec {REAL_COMPILER} "$@"')
    code = (
        f"{WITHOUT_TORCH}print('ready', flush=True); sys.stdin.readline()\n"
        "made = cpu_build.load_cpu_library(sources=sources, cache=cache); print(made.built, made.library.pages())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(sources), str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["False 16", "True 16"]
    assert len(calls(compilers, "c++")) == 1


@pytest.fixture
def endless_compiler(compilers: Path) -> Iterator[Path]:
    """A compiler whose child never ends; gives the file with the child's process id."""
    child = compilers / "child"
    add_compiler(compilers, "c++", f'sleep 1000 & echo $! >"{child}.new"; mv "{child}.new" "{child}"; wait')
    yield child
    if child.exists() and is_alive(child):
        os.kill(int(child.read_text()), signal.SIGKILL)


def is_alive(child: Path) -> bool:
    """Whether the process runs; one that ended and waits for its new parent to look does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", child.read_text().strip()], capture_output=True, text=True, check=False)
    return shown.stdout.strip()[:1] not in {"", "Z"}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_time_limit(
    sources: Path, cache: Path, endless_compiler: Path, avx2_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_build, "COMPILERS", ("c++",))
    monkeypatch.setattr(cpu_build, "BUILD_LIMIT_S", 1.0)
    start = time.monotonic()
    assert "(stopped after the 1 s that compiling may take)" in reason(sources, cache)
    assert time.monotonic() - start < 10
    wait_for(lambda: not is_alive(endless_compiler))
    assert sorted(path.name for path in cache.iterdir()) == ["build.log", "lock"]


def test_the_compiler_ends_with_the_process_that_builds(sources: Path, cache: Path, endless_compiler: Path) -> None:
    code = f"{WITHOUT_TORCH}cpu_build.load_cpu_library(sources=sources, cache=cache)"
    process = subprocess.Popen([sys.executable, "-c", code, str(sources), str(cache)], cwd=ROOT)
    try:
        wait_for(endless_compiler.exists)
        assert is_alive(endless_compiler)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not is_alive(endless_compiler))


def test_the_lock_of_a_builder_that_hangs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "BUILD_LIMIT_S", 0.2)
    cache.mkdir()
    held, done = threading.Event(), threading.Event()

    def hang() -> None:
        with cpu_build._locked(cache):
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hang)
    thread.start()
    assert held.wait(20)
    start = time.monotonic()
    with cpu_build._locked(cache):
        assert time.monotonic() - start >= 0.2
    done.set()
    thread.join()


@needs_compiler
def test_unused_entries_go(sources: Path, cache: Path) -> None:
    used = load_cpu_library(sources=sources, cache=cache).path.parent
    long_ago = time.time() - cpu_build.UNUSED_LIMIT_S - 100
    others = [cache / name for name in ("0" * 32, "build-x1_y", "mine", "1" * 32)]
    for folder in others:
        folder.mkdir()
        os.utime(folder, (long_ago, long_ago) if folder is not others[-1] else None)
    os.utime(used, (long_ago, long_ago))
    load_cpu_library(sources=sources, cache=cache)
    (sources / "number.h").write_text("constexpr int NUMBER = 7;\n")
    load_cpu_library(sources=sources, cache=cache)
    assert [folder.exists() for folder in [used, *others]] == [True, False, False, True, True]


@needs_compiler
def test_build_ahead(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_build, "load_cpu_library", lambda: load_cpu_library(sources=sources, cache=cache))
    cpu_build.main()
    assert capsys.readouterr().out.startswith("Compiled the CPU kernels with ")
    cpu_build.main()
    assert capsys.readouterr().out.startswith("The CPU kernels are there already, compiled with ")


def test_build_ahead_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpu_build.main()
    assert capsys.readouterr().out == (
        "No CPU kernels, plain torch runs instead: the CPU kernels need an x86-64 CPU and this one is aarch64\n"
    )
