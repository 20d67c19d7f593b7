#!/usr/bin/env python3
"""`octavo bench` (server/bench.py) from a checkout, with nothing installed; and its parts for the scripts beside it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from server.bench import main
from server.bench_http import HttpError
from server.bench_load import WORDS, Load, describe, path_of, probe, words
from server.bench_report import MARKDOWN_HEAD, Sample, format_markdown_row, format_table, percentile, summarize
from server.bench_workers import gather

__all__ = [
    "MARKDOWN_HEAD",
    "WORDS",
    "HttpError",
    "Load",
    "Sample",
    "describe",
    "format_markdown_row",
    "format_table",
    "gather",
    "path_of",
    "percentile",
    "probe",
    "summarize",
    "words",
]

if __name__ == "__main__":
    sys.exit(main(prog="scripts/bench_serving.py"))
