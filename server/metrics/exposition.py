"""The formats in which metrics are given, and which of them a scraper gets.

Written here, for the event loop stands still meanwhile and the library's writers take twice as long; tests hold these to the
same bytes. There are no exemplars, timestamps or units among our metrics, and every name is legal as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_1_0_0
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Write = Callable[[Iterable[Metric]], bytes]

_OPENMETRICS = "application/openmetrics-text"
# What a type must say, if it says a version, to mean what is given here.
_VERSIONS = {_OPENMETRICS: {"1.0.0", "0.0.1"}, "text/plain": {"0.0.4", "1.0.0"}, "text/*": set(), "*/*": set()}
# Of the text format, which puts suffixes into the families' names and knows fewer types.
_SUFFIXES = {"counter": "_total", "info": "_info"}
_TYPES = {"info": "gauge"}
_number: Callable[[float], str] = floatToGoString


def choose_format(accept: str) -> tuple[Write, str]:
    """How to write the metrics for a scraper with this Accept header, and the content type: OpenMetrics 1.0.0 for one that
    likes it best, else the text format 0.0.4, which all know."""
    wishes = dict.fromkeys(_VERSIONS, 0.0)
    for entry in accept.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        given = dict(part.split("=", 1) for part in parameters if "=" in part)
        if name in wishes and given.get("version", "") in {"", *_VERSIONS[name]}:
            wishes[name] = max(wishes[name], _quality(given.get("q", "1")))
    openmetrics = wishes.pop(_OPENMETRICS)
    if openmetrics > 0 and openmetrics >= max(wishes.values()):
        return write_openmetrics, OPENMETRICS_1_0_0
    return write_text, CONTENT_TYPE_PLAIN_0_0_4


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def write_text(families: Iterable[Metric]) -> bytes:
    """The Prometheus text format 0.0.4."""
    lines = []
    for family in families:
        name = family.name + _SUFFIXES.get(family.type, "")
        lines.append(f"# HELP {name} {_escaped(family.documentation)}")
        lines.append(f"# TYPE {name} {_TYPES.get(family.type, family.type)}")
        lines.extend(_lines(family.samples))
    return "\n".join([*lines, ""]).encode()


def write_openmetrics(families: Iterable[Metric]) -> bytes:
    """OpenMetrics 1.0.0."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escaped(family.documentation)}")
        lines.append(f"# TYPE {family.name} {family.type}")
        lines.extend(_lines(family.samples))
    return "\n".join([*lines, "# EOF", ""]).encode()


def _lines(samples: Iterable[Sample]) -> Iterator[str]:
    for name, labels, value, *_ in samples:
        if labels:
            pairs = ",".join([f'{label}="{_quoted(text)}"' for label, text in sorted(labels.items())])
            yield f"{name}{{{pairs}}} {_number(value)}"
        else:
            yield f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
