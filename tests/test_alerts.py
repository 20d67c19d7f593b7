"""configs/alerts.yml: each rule loads, fires and keeps silent when it should, and tells its reader what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RULES = ROOT / "configs" / "alerts.yml"
SCENES = ROOT / "tests" / "data" / "alerts_test.yml"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
OBSERVABILITY = ROOT / "docs" / "observability.md"
LIMIT_S = 60

SUMMARIES = {
    "OctavoDown": "bad does not answer Prometheus",
    "OctavoMissing": "Prometheus knows no Octavo server",
    "OctavoServerRestarting": "The server at bad has started 3 times in half an hour",
    "OctavoNotReady": "bad runs, and has not been ready for ten minutes",
    "OctavoEngineRestarted": "The engine of bad has died and been started again",
    "OctavoEngineCrashLoop": "The engine of bad has died 4 times in a quarter of an hour",
    "OctavoNoProgress": "bad has 3 requests running and computes nothing",
    "OctavoSlowFirstToken": "The first token of m takes 9.5s (95th percentile)",
    "OctavoSlowTokens": "Between two tokens of m pass 950ms (95th percentile)",
    "OctavoQueueGrowing": "bad gets more requests than it can answer: 18 or more wait all the time",
    "OctavoServerErrors": "4.762% of the answers of bad are 500 or 503",
    "OctavoRequestsFailing": "4.762% of the choices of m end with an error",
    "OctavoShedding": "bad refuses 12% of its requests with 429",
    "OctavoDeadlines": "10% of the requests to bad run out of their time",
    "OctavoWrongKeys": "bad gets 10 requests a second without a right key",
    "OctavoKvCacheFull": "bad: KV pages are 98% in use while requests wait",
    "OctavoPreemptionStorm": "bad computes 30% of its tokens for the second time",
    "OctavoDeviceMemory": "bad: cuda:0 has 99% of its memory in use",
    "OctavoFileDescriptors": "bad uses 97.66% of its file descriptors",
}
"""What each of the scenes' alerts says when it fires."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")


def read_alerts() -> dict[str, dict[str, Any]]:
    """By name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


ALERTS = read_alerts()


def read_scenes() -> dict[str, dict[str, Any]]:
    return {scene["name"]: scene for scene in yaml.safe_load(SCENES.read_text())["tests"]}


def promtool(*arguments: str) -> None:
    ended = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_promtool
def test_the_rules_load() -> None:
    promtool("check", "rules", str(RULES))


@needs_promtool
def test_each_fires_and_is_silent() -> None:
    promtool("test", "rules", str(SCENES))


@needs_promtool
def test_what_each_says_when_it_fires(tmp_path: Path) -> None:
    scenes = read_scenes()
    tests = []
    for name, alert in ALERTS.items():
        (firing,) = (test for test in scenes[name]["promql_expr_test"] if test["exp_samples"])
        labels = dict(re.findall(r'(\w+)="([^"]*)"', firing["exp_samples"][0]["labels"]))
        labels = {label: value for label, value in labels.items() if label not in ("alertname", "alertstate")}
        annotations = alert["annotations"] | {"summary": SUMMARIES[name]}
        expected = {"exp_labels": labels, "exp_annotations": annotations}
        test = {"eval_time": firing["eval_time"], "alertname": name, "exp_alerts": [expected]}
        scene = scenes[name]
        tests.append({"interval": scene["interval"], "input_series": scene["input_series"], "alert_rule_test": [test]})
    file = tmp_path / "summaries_test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))


def test_every_alert_has_a_scene_with_both() -> None:
    scenes = read_scenes()
    assert set(scenes) == set(ALERTS) == set(SUMMARIES)
    for name, scene in scenes.items():
        assert any(not test["exp_samples"] for test in scene["promql_expr_test"]), f"{name} is never silent"


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    annotations = alert["annotations"]
    assert re.fullmatch(r"Octavo([A-Z][a-z0-9]+)+", name)
    assert set(annotations) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert len(annotations["description"]) > 80 and "{{" not in annotations["description"]


@pytest.mark.parametrize("name", ALERTS)
def test_every_runbook_is_there(name: str) -> None:
    page, _, anchor = ALERTS[name]["annotations"]["runbook"].partition("#")
    assert ROOT / page == TROUBLESHOOTING
    assert anchor in anchors(TROUBLESHOOTING.read_text(encoding="utf-8"))


def test_the_page_lists_them() -> None:
    listed = re.findall(r"^\| `(Octavo\w+)` \|.*\| (\w+) \|$", OBSERVABILITY.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(name, alert["labels"]["severity"]) for name, alert in ALERTS.items()]


def anchors(text: str) -> set[str]:
    """Those that headings have on the usual sites, and those that are written out."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
