"""A Prometheus of a test's own, on the shipped configuration, and its HTTP API."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.test_server_with_demo_model import free_port

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = CONFIGS / "prometheus.yml"
START_TIMEOUT_S = 60

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus (Debian: apt install prometheus) is not installed"
)


def configuration(folder: Path, target: str, key: str) -> Path:
    """The shipped one and what lies beside it, in `folder`, for this server ("host:port") and this key, with all done once a
    second.
    """
    config = yaml.safe_load(SHIPPED.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(CONFIGS / "alerts.yml", folder)
    (folder / "prometheus-targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    (folder / "octavo-api-key").write_text(key)
    return folder / "prometheus.yml"


@dataclass(frozen=True)
class Prometheus:
    """One that runs. started_s: the time, as in time.time(), at which it did."""

    url: str
    started_s: float

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of the API's answer. Fails with Prometheus' own words."""
        response = httpx.post if path.startswith("query") else httpx.get
        options = {"data" if path.startswith("query") else "params": parameters}
        answer = response(f"{self.url}/api/v1/{path}", timeout=60, **options).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expr: str, *, instant: bool = False) -> list[tuple[dict[str, str], list[float]]]:
        """(labels, numbers) of each series that has a number, now or at any time since the start."""
        if instant:
            found = self.get("query", query=expr)["result"]
            series = [(one["metric"], [one["value"]]) for one in found]
        else:
            found = self.get("query_range", query=expr, start=self.started_s, end=time.time(), step=1)["result"]
            series = [(one["metric"], one["values"]) for one in found]
        numbers = [(labels, [float(value) for _, value in values]) for labels, values in series]
        finite = [(labels, [value for value in values if math.isfinite(value)]) for labels, values in numbers]
        return [(labels, values) for labels, values in finite if values]

    def series(self, selector: str) -> list[dict[str, str]]:
        """Labels of those that there have been since the start."""
        found: list[dict[str, str]] = self.get("series", **{"match[]": selector}, start=self.started_s)
        return found

    def label_values(self, label: str, selector: str) -> list[str]:
        found: list[str] = self.get(f"label/{label}/values", **{"match[]": selector}, start=self.started_s)
        return found


@contextmanager
def running(config: Path) -> Iterator[Prometheus]:
    """Prometheus with this configuration, its data beside that, ready."""
    url, log = f"http://127.0.0.1:{free_port()}", config.with_name("prometheus.log")
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.with_name('data')}"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, f"--web.listen-address={url.removeprefix('http://')}"], stdout=out, stderr=out)
    prometheus = Prometheus(url, time.time())
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(url):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
