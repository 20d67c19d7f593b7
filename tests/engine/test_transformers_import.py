"""Transformers is imported with one look at its models' sources, and knows what it knows after two."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from engine.transformers_import import import_transformers

import_transformers()
import_transformers()
import transformers
from transformers.utils.import_utils import define_import_structure

scans = define_import_structure.cache_info().misses
models = sys.modules["transformers.models"]
plain = transformers.utils.import_utils._LazyModule(
    "plain", models.__file__, define_import_structure(models.__file__), module_spec=models.__spec__
)
assert models.__all__ == plain.__all__ and models._class_to_module == plain._class_to_module
assert transformers.models.llama.LlamaConfig is transformers.LlamaConfig
sys.exit(scans != 1)
"""


def test_one_scan_and_the_same_names() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
