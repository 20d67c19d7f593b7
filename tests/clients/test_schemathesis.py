"""Schemathesis sends what our own OpenAPI document allows, and what it does not, and holds the answers against it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.workers import ENVIRONMENT, PYTHON, ROOT, why_missing

SEED = 5


@pytest.fixture
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.clients.fake_app"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.timeout(1800)  # whole, with --run-all
def test_our_document_is_kept(url: str, tmp_path: Path, run_all: bool) -> None:
    if reason := why_missing("schemathesis"):
        pytest.skip(reason)
    phases, examples = ("examples,coverage,fuzzing,stateful", 100) if run_all else ("examples,fuzzing,stateful", 10)
    config = ["--config-file", str(Path(__file__).parent / "schemathesis.toml")]
    command = [str(PYTHON.parent / "schemathesis"), *config, "--no-color", "run", f"{url}/openapi.json"]
    options = {
        "--seed": SEED,
        "--phases": phases,
        "--max-examples": examples,
        "--warnings": "off",
        "--generation-database": "none",
        "--suppress-health-check": "all",
        "--request-timeout": 60,
    }
    flat = [str(word) for option in options.items() for word in option]
    run = subprocess.run([*command, *flat], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-12000:] + run.stderr[-2000:]
