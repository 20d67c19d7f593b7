"""Transformers is imported with one look at its models' sources, and knows what it knows after two."""

from __future__ import annotations

import json
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


def test_its_log_lines_are_like_all_others() -> None:
    program = (
        "from engine.logs import LogConfig, set_up_logging; set_up_logging(LogConfig('info', 'json'), 'engine')\n"
        "from engine.transformers_import import import_transformers; import_transformers()\n"
        "from transformers.utils import logging; logging.get_logger('transformers.x').warning('it\\nis so')"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
    (line,) = [entry for entry in map(json.loads, done.stderr.splitlines()) if entry["logger"].startswith("transformers")]
    assert (line["level"], line["message"]) == ("warning", "it\nis so")
