"""The shipped Grafana dashboard as Grafana reads it: its panels, and its queries with the variables put in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parent.parent / "configs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "octavo.json").read_text(encoding="utf-8"))
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@dataclass(frozen=True)
class Query:
    """where: what of the dashboard it belongs to. instant: asked for now, not for the time shown. labels: those that the
    legend names."""

    where: str
    expr: str
    instant: bool
    labels: frozenset[str]


def queries() -> Iterator[Query]:
    """Those of the panels and of the annotations."""
    for panel in PANELS:
        for target in panel["targets"]:
            labels = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield Query(f"{panel['title']}, {target['refId']}", target["expr"], target.get("instant", False), labels)
    for annotation in DASHBOARD["annotations"]["list"]:
        if "target" in annotation:
            labels = frozenset(re.findall(r"\{\{(\w+)\}\}", annotation["titleFormat"] + annotation["textFormat"]))
            yield Query(f"annotation {annotation['name']}", annotation["target"]["expr"], False, labels)


def variables() -> dict[str, dict[str, Any]]:
    """By name."""
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def put_in(text: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """Replaces `$name` and `${name}`; of several values it makes a regular expression. Raises KeyError on an unknown name."""

    def value(match: re.Match[str]) -> str:
        chosen = values[match[1] or match[2]]
        if isinstance(chosen, str):
            return chosen
        escaped = [re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", one) for one in chosen]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)
