"""Nothing that comes from elsewhere is unpickled: no such call is in the sources, read with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"})
CALLS = frozenset(
    {"torch.load", "torch.hub.load", "np.load", "numpy.load", "recv_pyobj", "send_pyobj", "eval", "exec", "yaml.load"}
)

# The load generator's worker processes are its own, and talk over pipes that nobody else has.
OWN_PROCESSES = frozenset({"server/bench_workers.py"})
FILES = sorted(path for package in ("engine", "server") for path in (ROOT / package).rglob("*.py"))


def unpickles(source: str) -> Iterator[str]:
    """Every import and call in the source that could read a pickle, or run what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if (
                module.split(".")[0] in MODULES or module == "concurrent.futures.process"
            ):
                yield module
            case ast.ImportFrom(module="concurrent.futures", names=names):
                yield from (alias.name for alias in names if alias.name == "ProcessPoolExecutor")
            case ast.Call(func=func):
                name = ast.unparse(func)
                if name in CALLS or name.rsplit(".", 1)[-1] in {"recv_pyobj", "send_pyobj"}:
                    yield name
            case ast.keyword(arg="allow_pickle" | "weights_only" as name, value=value) if ast.unparse(value) != (
                "False" if name == "allow_pickle" else "True"
            ):
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in OWN_PROCESSES:
        assert list(unpickles(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from multiprocessing import Pool", "torch.load(f)", "np.load(f, allow_pickle=True)", "s.recv_pyobj()",
     "from concurrent.futures import ProcessPoolExecutor", "f(weights_only=False)", "eval('1')", "import torch, marshal"],
)  # fmt: skip
def test_what_would_is_found(source: str) -> None:
    assert list(unpickles(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "json.load(f)", "f(allow_pickle=False)", "import torch", "yaml.safe_load(f)"]
)
def test_and_nothing_else(source: str) -> None:
    assert not list(unpickles(source))
