"""What Triton compiles its launchers with on this machine: a C compiler, and Python's headers.

Where one is missing, Triton says so in a traceback at its first kernel, after the weights have been read; here it is one
sentence before. `python -m engine.kernels.toolchain` compiles a tiny extension in Triton's manner, loads and calls it:
scripts/build_image runs it in the image, as the image's user.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ConfigError

COMPILE_LIMIT_S = 60.0
_ANSWER = 16
_SOURCE = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, 0}, {0, 0, 0, 0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "octavo_tiny", 0, -1, methods};
PyMODINIT_FUNC PyInit_octavo_tiny(void) { return PyModule_Create(&module); }
"""


def check_toolchain(environ: Mapping[str, str] = os.environ, *, include: Path | None = None) -> tuple[str, Path]:
    """The C compiler that Triton will call, and the folder with Python.h.

    include: that folder, where it is not this Python's own. Raises ConfigError with one sentence that says what is missing.
    """
    compiler = _compiler(environ)
    include = include or _include_folder()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    missing, packages = [], []
    if compiler is None:
        named = environ.get("CC")
        missing.append(f"the C compiler {named} that CC names" if named else "a C compiler (gcc or clang)")
        packages.append("gcc libc6-dev")
    if not (include / "Python.h").is_file():
        missing.append(f"Python.h in {include}")
        packages.append(f"python{version}-dev")
    if compiler is None or missing:
        raise ConfigError(
            f"serving on a GPU needs {' and '.join(missing)}, because Triton compiles with it at run time: install it "
            f"(Debian/Ubuntu: apt install {' '.join(packages)})"
        )
    return compiler, include


def _compiler(environ: Mapping[str, str]) -> str | None:
    """Triton's own choice: CC, else gcc, else clang."""
    path = environ.get("PATH")
    if named := environ.get("CC"):
        return shutil.which(named, path=path)
    return shutil.which("gcc", path=path) or shutil.which("clang", path=path)


def _include_folder() -> Path:
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's own, which has no headers
        scheme = "posix_prefix"
    return Path(sysconfig.get_path("include", scheme))


def try_toolchain() -> str:
    """Compiles, loads and calls a tiny extension, and says with what. Raises ConfigError where that does not work."""
    compiler, include = check_toolchain()
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="octavo-toolchain-") as folder:
        source, library = Path(folder) / "tiny.c", Path(folder) / f"octavo_tiny{sysconfig.get_config_var('EXT_SUFFIX')}"
        source.write_text(_SOURCE % _ANSWER, encoding="utf-8")
        command = [compiler, str(source), "-O3", "-shared", "-fPIC", f"-I{include}", "-o", str(library)]
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{compiler} does not work: {error}") from error
        if made.returncode:
            raise ConfigError(f"{compiler} cannot compile an extension of Python: {' '.join(made.stderr.split())[:400]}")
        _load_and_call(library)
    return (
        f"Compiled and loaded a tiny extension with {compiler}, as user {os.getuid()}, in {time.perf_counter() - start_s:.2f} s"
    )


def _load_and_call(library: Path) -> None:
    spec = importlib.util.spec_from_file_location("octavo_tiny", library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"what was compiled does not load: {error}") from error
    assert module.answer() == _ANSWER


if __name__ == "__main__":
    try:
        print(try_toolchain())
    except ConfigError as failure:
        sys.exit(f"toolchain: {failure.message}")
