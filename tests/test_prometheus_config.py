"""configs/prometheus.yml as it is shipped, in a real Prometheus beside a server with a key: the target is up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.compose import GPU, ROOT, resolve
from tests.crashes import make_model
from tests.prometheus import Prometheus, running
from tests.test_server_with_demo_model import free_port

LIMIT_S = 120.0
KEY = "sesame-open"
CONFIGS = ROOT / "configs"

needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} (Debian: apt install prometheus) is not installed")
    for name in ("prometheus", "promtool")
}


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a server with the key as Compose passes it on."""
    port = free_port()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OCTAVO_")}
    environ["OCTAVO_API_KEY"] = resolve(GPU, {"OCTAVO_API_KEY": KEY})["services"]["octavo"]["environment"]["OCTAVO_API_KEY"]
    command = [sys.executable, "-m", "tests.serve_fake_engine", str(make_model(tmp_path / "model")), "--device", "cpu"]
    with subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=environ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: status(f"{url}/health/ready") == 200)
            assert status(f"{url}/metrics") == 401
            assert status(f"{url}/metrics", KEY) == 200
            yield port
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.1)


def status(url: str, key: str | None = None) -> int:
    try:
        return httpx.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60).status_code
    except httpx.HTTPError:
        return 0


def folder_of_prometheus(folder: Path, port: int, key: str) -> Path:
    """The shipped files side by side, unchanged but for the list of targets and the key: what Compose mounts."""
    folder.mkdir()
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(CONFIGS / name, folder)
    targets = (CONFIGS / "prometheus-targets.yml").read_text()
    assert targets.count("octavo:8000") == 1
    (folder / "prometheus-targets.yml").write_text(targets.replace("octavo:8000", f"127.0.0.1:{port}"))
    (folder / "octavo-api-key").write_text(key)
    return folder / "prometheus.yml"


def target(prometheus: Prometheus) -> dict[str, Any]:
    """The one that it reads, once it has tried."""
    found: list[dict[str, Any]] = []

    def tried() -> bool:
        found[:] = [each for each in prometheus.get("targets")["activeTargets"] if each["health"] != "unknown"]
        return bool(found)

    until(tried)
    (only,) = found
    return only


@needs["prometheus"]
@pytest.mark.timeout(400)
def test_prometheus_reads_the_server_with_the_key(port: int, tmp_path: Path) -> None:
    key = resolve(GPU, {"OCTAVO_API_KEY": KEY})["configs"]["metrics-key"]["content"]
    with running(folder_of_prometheus(tmp_path / "right", port, key)) as prometheus:
        found = target(prometheus)
        assert (found["health"], found["lastError"]) == ("up", "")
        assert (found["labels"]["job"], found["labels"]["instance"]) == ("octavo", f"127.0.0.1:{port}")
        until(lambda: prometheus.query('{__name__=~"octavo_.+"}', instant=True))
    with running(folder_of_prometheus(tmp_path / "wrong", port, "another")) as prometheus:
        found = target(prometheus)
        assert found["health"] == "down" and "401" in found["lastError"]


@needs["promtool"]
@pytest.mark.parametrize("as_shipped", [True, False], ids=["as shipped", "as mounted"])
def test_promtool_finds_nothing_wrong(as_shipped: bool, tmp_path: Path) -> None:
    config = CONFIGS / "prometheus.yml" if as_shipped else folder_of_prometheus(tmp_path / "checked", 8000, KEY)
    done = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_are_where_compose_mounts_them() -> None:
    config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    named = {*config["rule_files"], *job["file_sd_configs"][0]["files"], job["authorization"]["credentials_file"]}
    service = resolve(GPU, {})["services"]["prometheus"]
    mounted = {volume.split(":")[1] for volume in service["volumes"]} | {each["target"] for each in service["configs"]}
    assert {f"/etc/prometheus/{name}" for name in named} <= mounted
