"""Imports transformers, which reads the source of all its 500 models to know their names, once instead of twice.

The package does that for itself and again, under another key of the same cache, for `transformers.models`. Its first answer
serves for both: a tenth of the engine's start.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def import_transformers() -> None:
    """To be called before anything else of transformers is imported; harmless to repeat or to leave out."""
    import transformers
    from transformers.utils import import_utils

    scan: Any = import_utils.define_import_structure
    found = scan(Path(transformers.__file__).parent / "models", prefix="models")
    models = {needs: dict(_in_models(files)) for needs, files in found.items()}

    def answer(module_path: str, prefix: str | None = None) -> Any:
        is_models = prefix is None and Path(module_path).parent.name == "models"
        return models if is_models else scan(module_path, prefix)

    vars(import_utils)["define_import_structure"] = answer
    try:
        importlib.import_module("transformers.models")
    finally:
        vars(import_utils)["define_import_structure"] = scan
    # What it has to say goes where everything goes, instead of to stderr by a handler of its own.
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()


def _in_models(files: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Without the package's other modules, which it has added to the answer."""
    for name, names in files.items():
        if name.startswith("models."):
            yield name.removeprefix("models."), names
