"""The sentences that users may meet, read from the source: what is raised as a start's error, and what is logged as wrong.

Each is given as its fixed text, with an ellipsis where a value stands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS_ERRORS = {"ConfigError", "ModelLoadError", "ModelNotSupported"}
LOGGED = {"warning", "error", "critical", "exception"}
_MAKERS = {"_require": 2, "_fail": 0}  # helpers that raise, and which argument is the sentence


def fixed_text(node: ast.expr | None) -> str:
    """'…' for everything that is no literal; a conditional counts by its longer branch, a sum by its parts."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)  # type: ignore[misc]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return fixed_text(left) + fixed_text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return max(fixed_text(body), fixed_text(orelse), key=len)
        case _:
            return "…"


def _calls(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def _sources() -> list[Path]:
    return sorted(path for package in ("engine", "server") for path in (ROOT / package).rglob("*.py"))


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""


def startup_errors() -> dict[str, str]:
    """Fixed text of each error that can end a start -> where it is written."""
    found = {}
    for path in _sources():
        for call in _calls(path):
            name = _name(call.func)
            index = 0 if name in STARTS_ERRORS else _MAKERS.get(name)
            if index is not None and len(call.args) > index:
                found[fixed_text(call.args[index])] = f"{path.relative_to(ROOT)}:{call.lineno}"
    return found


def logged_troubles() -> dict[str, str]:
    """The same of what is logged as a warning or worse."""
    return {
        fixed_text(call.args[0]): f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in _sources()
        for call in _calls(path)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in LOGGED
        and _name(call.func.value) in ("logger", "_logger", "log")
        and call.args
    }
