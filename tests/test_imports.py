"""Who may import whom: the layers of the house, read from the source with `ast`, so that nothing needs to be importable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower layers first and, within a layer, in the order in which files may see each other: a file imports only what stands before
# it. A package stands for all its files. A new file of the engine gets its place here and in the architecture page.
LAYERS: dict[str, tuple[str, ...]] = {
    "L0": ("errors", "logs", "config", "sampling_params", "histogram", "messages", "step"),
    "L1": (
        "flight_recorder",
        "crash_points",
        "jit_watch",
        "request",
        "block_pool",
        "memory_plan",
        "host_cores",
        "host_memory",
        "model_cache",
        "weight_files",
        "hub_errors",
        "hub_download",
        "hub",
        "framed_process",
        "chat_template",
        "detokenizer",
        "tokenizer",
    ),
    "L2": (
        "grammar",
        "grammar_compiler",
        "grammar_trial",
        "kv_cache_manager",
        "step_budget",
        "waiting_queue",
        "request_output",
        "deadlines",
        "siblings",
        "in_flight_step",
        "step_too_large",
        "scheduler",
    ),
    "L3": (
        "kernels",
        "transformers_import",
        "attention",
        "philox",
        "linear",
        "stand_in_tokenizer",
        "model_files",
        "model_support",
        "model_loader",
        "fused_decoder",
        "native_decoder",
        "fusion",
        "step_feed",
        "token_masks",
        "sampling_slots",
        "input_batch",
        "sampler",
        "pooler",
        "cuda_graphs",
        "split_model",
        "step_results",
        "scratch_steps",
        "model_runner",
    ),
    "L4": ("step_clock", "core", "engine_limits", "build", "usage_meter", "process", "self_check"),
    "L5": (
        "log_relay",
        "watchdog",
        "supervisor",
        "request_stream",
        "suspects",
        "lives",
        "open_requests",
        "recovery",
        "engine_connection",
        "step_probe",
        "client",
    ),
}
ORDER = [name for names in LAYERS.values() for name in names]
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

# The device side knows one border, step.py, and nothing of queues and pages.
HIDDEN_FROM_L3 = {
    "request",
    "block_pool",
    "grammar",
    "grammar_compiler",
    "grammar_trial",
    "kv_cache_manager",
    "step_budget",
    "waiting_queue",
    "request_output",
    "deadlines",
    "siblings",
    "in_flight_step",
    "step_too_large",
    "scheduler",
}
SEEN_BY_SERVER = {
    "supervisor",
    "client",
    "request_stream",
    "config",
    "sampling_params",
    "histogram",
    "messages",
    "errors",
    "tokenizer",
    "chat_template",
    "detokenizer",
    "memory_plan",
    "host_memory",
    "model_cache",
    "framed_process",
    "logs",
}
HEAVY = {"torch", "transformers"}


class Import(NamedTuple):
    target: str  # dotted module as written, relative imports resolved
    line: int
    runtime: bool  # False under `if TYPE_CHECKING:`


def module_files(package: str) -> dict[str, Path]:
    """Dotted module name -> file, for every Python file of a top-level package."""
    files = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = {**module_files("engine"), **module_files("server")}


def walk_imports(node: ast.AST, runtime: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, runtime
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from walk_imports(ast.Module([part], []), False)
            for part in child.orelse:
                yield from walk_imports(ast.Module([part], []), runtime)
        else:
            yield from walk_imports(child, runtime)


def parse_imports(source: str, module: str, is_package: bool) -> list[Import]:
    found = []
    for node, runtime in walk_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, runtime) for alias in node.names]
            continue
        base = node.module or ""
        if node.level:
            up = node.level - is_package
            parents = module.split(".")[: len(module.split(".")) - up]
            base = ".".join([*parents, base] if base else parents)
        # `from engine import scheduler` names a module, `from engine.step import X` a name in one.
        found += [
            Import(f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base, node.lineno, runtime)
            for alias in node.names
        ]
    return found


IMPORTS = {
    module: parse_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    for module, path in FILES.items()
}
ENGINE_MODULES = [module for module in FILES if module.startswith("engine.")]
SERVER_MODULES = [module for module in FILES if module.split(".")[0] == "server"]


def room(module: str) -> str | None:
    """`engine.attention.base` -> `attention`; None for what is not inside the engine."""
    parts = module.split(".")
    return parts[1] if parts[0] == "engine" and len(parts) > 1 else None


def where(module: str, item: Import) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{item.line} imports {item.target}"


def may_see(importer: str, imported: str) -> str | None:
    """Why the engine's room `importer` may not import the room `imported`; None where it may."""
    if importer == imported:
        return None
    if LAYER_OF[importer] == "L3" and imported in HIDDEN_FROM_L3:
        return "the device side sees only step.py, never requests, pages or the scheduler"
    if ORDER.index(imported) > ORDER.index(importer):
        return f"{imported} ({LAYER_OF[imported]}) stands after {importer} ({LAYER_OF[importer]})"
    return None


def heavy_path(module: str) -> list[str] | None:
    """The chain of run-time imports, lazy ones too, from a module to torch or transformers; None where there is none."""
    seen = {module}
    queue = [[module]]
    while queue:
        path = queue.pop(0)
        for item in IMPORTS[path[-1]]:
            if not item.runtime:
                continue
            if item.target.split(".")[0] in HEAVY:
                return [*path, item.target]
            if item.target in IMPORTS and item.target not in seen:
                seen.add(item.target)
                queue.append([*path, item.target])
    return None


def test_every_engine_file_has_its_place() -> None:
    strangers = sorted({str(room(module)) for module in ENGINE_MODULES} - set(ORDER))
    assert not strangers, f"no layer for engine/{', engine/'.join(strangers)}: add them to LAYERS in {Path(__file__).name}"


def test_engine_packages_start_empty() -> None:
    # Code in a package's __init__ would run for every importer of anything in it.
    assert not IMPORTS["engine"], "engine/__init__.py imports nothing"


@pytest.mark.parametrize("module", ENGINE_MODULES)
def test_engine_layers(module: str) -> None:
    importer = room(module)
    assert importer is not None
    if importer not in LAYER_OF:
        pytest.fail(f"{module} has no layer: see test_every_engine_file_has_its_place")
    broken = []
    for item in IMPORTS[module]:
        assert item.target.split(".")[0] != "server", f"{where(module, item)}: the engine knows nothing of the server"
        imported = room(item.target)
        if imported in LAYER_OF and (why := may_see(importer, imported)):
            broken.append(f"{where(module, item)}: {why}")
    assert not broken, "\n".join(broken)


LIGHT_MODULES = [module for module in ENGINE_MODULES if LAYER_OF.get(str(room(module))) in ("L0", "L1", "L2", "L5")]


@pytest.mark.parametrize("module", LIGHT_MODULES + SERVER_MODULES)
def test_frontend_and_scheduler_stay_light(module: str) -> None:
    path = heavy_path(module)
    assert path is None, (
        f"only the device side and the engine process import {path[-1] if path else ''}: {' -> '.join(path or [])}"
    )


@pytest.mark.parametrize("module", SERVER_MODULES)
def test_server_sees_only_the_engine_s_front(module: str) -> None:
    broken = [where(module, item) for item in IMPORTS[module] if room(item.target) and room(item.target) not in SEEN_BY_SERVER]
    assert not broken, f"{'; '.join(broken)}: the server may import engine.{{{', '.join(sorted(SEEN_BY_SERVER))}}}"


def test_one_importer_of_prometheus_client() -> None:
    importers = {
        module for module, items in IMPORTS.items() for item in items if item.target.split(".")[0] == "prometheus_client"
    }
    others = {module for module in importers if module.split(".")[:2] != ["server", "metrics"]}
    assert not others, f"only server/metrics imports prometheus_client, got {sorted(others)}"


def test_one_importer_of_opentelemetry() -> None:
    # It is an extra, so nothing else may import the one that does, but where traces are asked for.
    importers = {module for module, items in IMPORTS.items() for item in items if item.target.split(".")[0] == "opentelemetry"}
    assert importers == {"server.tracing"}
    of_it = [where(module, item) for module, items in IMPORTS.items() for item in items if item.target == "server.tracing"]
    assert all(at.startswith("server/app.py:") for at in of_it), of_it


def test_the_reader_of_imports() -> None:
    source = (
        "import torch.nn as nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import transformers\n"
        "def f():\n    from .attention.base import X\n"
        "from engine import scheduler\n"
    )
    assert parse_imports(source, "engine.core", False) == [
        Import("torch.nn", 1, True),
        Import("typing", 2, True),
        Import("transformers", 4, False),
        Import("engine.attention.base", 6, True),
        Import("engine.scheduler", 7, True),
    ]


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("scheduler", "kv_cache_manager", True),
        ("kv_cache_manager", "scheduler", False),
        ("step", "request", False),
        ("model_runner", "step", True),
        ("model_runner", "request", False),
        ("core", "scheduler", True),
        ("client", "core", True),  # by its place; test_frontend_and_scheduler_stay_light refuses what brings torch
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (may_see(importer, imported) is None) == allowed
