"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Without a GPU the Triton kernels are tested in Triton's interpreter, which is chosen when they are defined.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Those that take about 20 s and more, begun first, so that none is left to one process in the end. From a run on two cores with
# --durations. The device path, third, starts no servers while the two before it do.
LONGEST_FIRST = (
    "tests/clients/test_clients.py",
    "tests/test_server_with_demo_model.py",
    "tests/engine/test_device_path.py",
    "tests/test_crash_with_tiny_model.py",
    "tests/scripts/test_bench_frontend.py",
    "tests/test_exactness.py",
    "tests/test_completions_with_demo_model.py",
    "tests/scripts/test_examples.py",
    "tests/test_crash_over_http.py",
    "tests/test_hub_serve.py",
    "tests/engine/test_linear.py",
    "tests/test_responses_with_demo_model.py",
    "tests/test_crash_replay.py",
    "tests/scripts/test_soak.py",
    "tests/test_exactness_demo.py",
    "tests/test_structured_answers.py",
    "tests/test_metrics_end_to_end.py",
    "tests/test_hub_download.py",
    "tests/scripts/test_overload.py",
    "tests/engine/test_supervisor.py",
    "tests/engine/test_bad_numbers.py",
    "tests/clients/test_schemathesis.py",
    "tests/test_fuzz.py",
    "tests/test_dashboard.py",
    "tests/server/test_shutdown.py",
    "tests/test_prometheus_config.py",
    "tests/engine/test_pooling.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-all", action="store_true", help="run the long suites whole instead of a seeded share of them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))  # stable


@pytest.fixture(scope="session")
def run_all(request: pytest.FixtureRequest) -> bool:
    """Whether the long suites run whole."""
    return bool(request.config.getoption("--run-all"))
