"""The shipped dashboard: its layout, and every query of it asked of a real Prometheus that watches a real server.

The server has the fake engine behind it, keys, a queue too short for its load, an engine that dies, and clients that leave or
run out of time: every series that there can be is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml

from engine.messages import CrashPoint
from tests import grafana
from tests.crashes import make_model
from tests.prometheus import SHIPPED, Prometheus, configuration, needs_prometheus, running
from tests.test_alerts import ALERTS
from tests.test_crash_with_tiny_model import wait_until_ready
from tests.test_server_with_demo_model import Server, free_port

ROOT = Path(__file__).parent.parent
KEYS = "ann-key ann\nbob-key bob\nscrape-key prometheus metrics\n"
POISON = 95
"""A token that kills the engine, as often as a request is tried."""
LIMIT_S = 120.0
WIDTH = 24  # of Grafana's grid
MAX_TITLE = {3: 16, 6: 24, 8: 36, 12: 50, 24: 100}
"""Letters that fit above a panel of so many columns, on a screen of 1,440 points."""


@pytest.mark.parametrize("panel", grafana.PANELS, ids=lambda panel: panel["title"])
def test_every_panel_can_be_read(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"] and defaults["thresholds"]["steps"][0]["value"] is None
    assert len(panel["description"]) > 20 and panel["description"].endswith(".")
    assert len(panel["title"]) <= MAX_TITLE[panel["gridPos"]["w"]]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"] and all(target["legendFormat"] for target in panel["targets"])


def test_a_number_of_an_idle_server_is_a_dash() -> None:
    """Quantiles and shares of nothing are NaN, which Grafana would write so."""
    numbers = [panel["fieldConfig"]["defaults"] for panel in grafana.PANELS if panel["type"] == "stat"]
    for defaults in numbers:
        (mapping,) = defaults["mappings"]
        assert (mapping["type"], mapping["options"]["match"]) == ("special", "nan")
        assert mapping["options"]["result"]["text"] == defaults["noValue"] == "–"
    assert len(numbers) == 8


def test_the_grid() -> None:
    panels = grafana.DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids) and len({panel["title"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= WIDTH for place in places)
    for one, other in combinations(places, 2):
        apart = [one[at] + one[size] <= other[at] or other[at] + other[size] <= one[at] for at, size in ("xw", "yh")]
        assert any(apart), (one, other)
    assert sum(place["w"] * place["h"] for place in places) == WIDTH * max(place["y"] + place["h"] for place in places), (
        "a hole"
    )


def test_each_panel_stands_in_a_row() -> None:
    titles = [row["title"] for row in grafana.ROWS]
    assert titles == ["Service level at a glance", "Engine", "Device and processes", "Keys"]
    assert grafana.DASHBOARD["panels"][0]["type"] == "row"


def test_the_page_names_what_there_is() -> None:
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z][\w ]+) \|.*\?", text, re.MULTILINE)
    assert rows == [row["title"] for row in grafana.ROWS]
    questions = " ".join(text.partition("## Questions")[2].partition("## Alerts")[0].split())
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", questions))
    assert len(named) > 15
    assert named <= {panel["title"] for panel in grafana.PANELS}


def test_what_is_provisioned() -> None:
    provisioning = grafana.GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "octavo.yml").read_text())["providers"]
    scrape_interval = yaml.safe_load(SHIPPED.read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape_interval and source["isDefault"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert grafana.variables()["datasource"]["query"] == source["type"]


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """`octavo serve` with the fake engine, ready."""
    (folder / "keys").write_text(KEYS)
    model, log, port = make_model(folder / "model", step_s=0.005), folder / "log", free_port()
    flags = ["--api-key-file", str(folder / "keys"), "--max-waiting-requests", "4", "--served-model-name", "fake/model-1.5"]
    point = CrashPoint(place="before_step", kind="memory_error", token_id=POISON, epochs=None)
    command = [sys.executable, "-m", "tests.serve_fake_engine", msgspec.json.encode(point).decode(), str(model)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--port", str(port), *flags], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


class Load:
    """What clients do: a wave has more of them than the queue takes, with prompts that begin alike, and more answers at once
    than there are pages for; one leaves, one has no time, one no key."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)

    def complete(self, key: str, **fields: Any) -> int:
        """The status."""
        body = {"prompt": [*range(3, 43)], "max_tokens": 100, **fields}
        return self._http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).status_code

    def leave(self) -> None:
        headers, body = {"Authorization": "Bearer ann-key"}, {"prompt": [5], "max_tokens": 300, "stream": True}
        with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            next(response.iter_raw())

    def wave(self) -> set[int]:
        """The statuses that came."""
        with ThreadPoolExecutor(24) as pool:
            keys = ["ann-key", "bob-key"] * 12
            statuses = set(pool.map(self.complete, keys))
        self.leave()
        return statuses | {self.complete("ann-key", timeout=0.001), self.complete("wrong-key")}


@dataclass(frozen=True)
class Scene:
    prometheus: Prometheus
    server: Server
    load: Load

    def values(self) -> dict[str, Any]:
        """Of the dashboard's variables, as Grafana finds them for All, and of its own at a time range of some minutes."""
        chosen: dict[str, Any] = {"prefix": "octavo_", "__rate_interval": "4s", "__range": "5m"}
        for name in ("model_name", "instance"):
            query = grafana.put_in(grafana.variables()[name]["query"]["query"], chosen)
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
            chosen[name] = self.prometheus.label_values(label, selector)
        return chosen


def until(condition: Callable[[], Any], what: Callable[[], object]) -> None:
    """Until the condition holds. what: is said where it does not come to that."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.1)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Everything has happened once, before the eyes of Prometheus."""
    with serving(tmp_path) as server:
        config = configuration(tmp_path, server.url.removeprefix("http://"), "scrape-key")
        with running(config) as prometheus:
            seen = 'octavo_num_requests_running{job="octavo"}'
            until(lambda: prometheus.query(seen, instant=True), lambda: prometheus.get("targets"))
            load = Load(server.url)
            assert load.complete("ann-key", prompt=[POISON]) == 500
            assert load.wave() == {200, 401, 429, 504}
            yield Scene(prometheus, server, load)


@needs_prometheus
def test_a_server_watched(scene: Scene) -> None:
    """One test, since each that needs the scene would make one of its own where tests run side by side."""
    check_queries(scene)
    for name in ALERTS:
        check_series(scene, name)
    check_rules(scene)


def check_queries(scene: Scene) -> None:
    """Every one of the dashboard returns data, with the labels that its legend names."""
    values = scene.values()
    assert values["model_name"] == ["fake/model-1.5"] and len(values["instance"]) == 1
    missing = list(grafana.queries())
    assert len(missing) > 70

    def all_there() -> bool:
        scene.load.wave()
        for query in list(missing):
            if found := scene.prometheus.query(grafana.put_in(query.expr, values), instant=query.instant):
                assert all(query.labels <= set(labels) for labels, _ in found), f"{query.where}: the legend names other labels"
                missing.remove(query)
        return not missing

    until(all_there, lambda: [(query.where, grafana.put_in(query.expr, values)) for query in missing])


def check_series(scene: Scene, alert: str) -> None:
    """All that the alert's expression is about exist."""
    selectors = re.findall(r"\b(?:octavo_|process_|up\b)\w*(?:\{[^}]*\})?", ALERTS[alert]["expr"])
    assert selectors
    for selector in selectors:
        until(lambda selector=selector: scene.prometheus.series(selector), lambda selector=selector: f"{alert}: no {selector}")


def check_rules(scene: Scene) -> None:
    """Prometheus evaluates them all, and tells of the engine that died."""

    def rules() -> dict[str, dict[str, Any]]:
        groups = scene.prometheus.get("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    until(lambda: all(rule["health"] == "ok" for rule in rules().values()), rules)
    assert set(rules()) == set(ALERTS)
    until(lambda: rules()["OctavoEngineRestarted"]["state"] == "firing", rules)
    (alert,) = rules()["OctavoEngineRestarted"]["alerts"]
    instance = scene.server.url.removeprefix("http://")
    assert alert["annotations"]["summary"] == f"The engine of {instance} has died and been started again"
