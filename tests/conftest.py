"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Without a GPU the Triton kernels are tested in Triton's interpreter, which is chosen when they are defined.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-all", action="store_true", help="run the long suites whole instead of a seeded share of them")


@pytest.fixture(scope="session")
def run_all(request: pytest.FixtureRequest) -> bool:
    """Whether the long suites run whole."""
    return bool(request.config.getoption("--run-all"))
