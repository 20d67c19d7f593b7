"""What Triton needs to compile with, found missing before anything is loaded, and tried for real where it is there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import build
from engine.config import EngineConfig
from engine.engine_limits import EngineLimits
from engine.errors import ConfigError
from engine.kernels import toolchain
from engine.kernels.toolchain import check_toolchain, try_toolchain

HAS_BOTH = shutil.which("gcc") is not None and (toolchain._include_folder() / "Python.h").is_file()


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    return tmp_path / "include"


def compiler(folder: Path, name: str) -> Path:
    path = folder / name
    path.touch()
    path.chmod(0o755)
    return path


def test_triton_s_order_of_compilers(tmp_path: Path, headers: Path) -> None:
    environ = {"PATH": str(tmp_path)}
    clang = compiler(tmp_path, "clang")
    assert check_toolchain(environ, include=headers) == (str(clang), headers)
    gcc = compiler(tmp_path, "gcc")
    assert check_toolchain(environ, include=headers) == (str(gcc), headers)
    mine = compiler(tmp_path, "mine")
    assert check_toolchain({**environ, "CC": str(mine)}, include=headers) == (str(mine), headers)


def test_one_sentence_names_what_is_missing(tmp_path: Path, headers: Path) -> None:
    bare = {"PATH": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"^serving on a GPU needs a C compiler \(gcc or clang\), because .*apt install gcc libc6-dev\)$"
    ):
        check_toolchain(bare, include=headers)
    with pytest.raises(ConfigError, match="the C compiler nowhere that CC names"):
        check_toolchain({**bare, "CC": "nowhere"}, include=headers)
    with pytest.raises(
        ConfigError, match=r"needs a C compiler .* and Python\.h in .*apt install gcc libc6-dev python3\.\d+-dev"
    ):
        check_toolchain(bare, include=tmp_path)
    compiler(tmp_path, "gcc")
    with pytest.raises(
        ConfigError, match=r"^serving on a GPU needs Python\.h in [^ ]+, because .*apt install python3\.\d+-dev\)$"
    ):
        check_toolchain(bare, include=tmp_path)


def test_the_start_fails_with_it_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = EngineLimits.of(EngineConfig(device="cpu"))
    on_gpu = dataclasses.replace(limits, device=torch.device("cuda"))
    monkeypatch.setattr(EngineLimits, "of", lambda _config: on_gpu)
    monkeypatch.setattr(build, "HAS_TRITON", True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "torch", SimpleNamespace(set_num_threads=lambda _number: None))  # nothing else of it is reached

    def report(*_: Any) -> None:
        pytest.fail("it went on")

    with pytest.raises(ConfigError, match="serving on a GPU needs a C compiler"):
        build.build_engine(EngineConfig(device="cpu"), report)


@pytest.mark.skipif(not HAS_BOTH, reason="there is no gcc, or no Python.h")
def test_a_tiny_extension_is_compiled_loaded_and_called() -> None:
    assert "Compiled and loaded a tiny extension with " in try_toolchain()


@pytest.mark.skipif(not HAS_BOTH, reason="there is no gcc, or no Python.h")
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = compiler(tmp_path, "cc")
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(ConfigError, match="cannot compile an extension of Python: no such header"):
        try_toolchain()
