"""Resolves a model as the engine does, in a process of its own: `python -m tests.resolve_in_child MODEL_CONFIG_AS_JSON`.

Prints its progress and the folder, or the error's sentence and exits with 1, each as a line of JSON. Waits between tries are
short. RESOLVE_MAX_FILE_BYTES: what a file may have at most. RESOLVE_MAX_HTTP_BYTES: what is fetched without the library.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from pathlib import Path

import msgspec

from engine import hub_download
from engine.config import ModelConfig
from engine.errors import ModelNotSupported, OctavoError
from engine.model_files import resolve_model

hub_download.FIRST_WAIT_S = 0.05
hub_download.MAX_BACKOFF_S = 0.2
hub_download.REPORT_INTERVAL_S = 0.1


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def refuse_alien(folder: Path) -> None:
    """As model_support does, without transformers."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "alien":
        raise ModelNotSupported("nobody knows the model type 'alien'")


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    if limit := os.environ.get("RESOLVE_MAX_FILE_BYTES"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    hub_download.MAX_HTTP_BYTES = int(os.environ.get("RESOLVE_MAX_HTTP_BYTES", hub_download.MAX_HTTP_BYTES))
    config = msgspec.json.decode(sys.argv[1], type=ModelConfig)
    try:
        folder = resolve_model(
            config,
            lambda phase, detail, fraction: tell(phase=phase, detail=detail, fraction=fraction),
            check_config=refuse_alien,
        )
    except OctavoError as error:
        tell(error=error.message)
        return 1
    tell(folder=str(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
