"""The formats in which metrics are given, and which of them a scraper gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_1_0_0
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

Encode = Callable[[CollectorRegistry], bytes]

# All names are legal, and so nothing is escaped: the library would make an underscore of the colon in vllm:.
_encode_text = partial(generate_latest, escaping=ALLOWUTF8)
_encode_openmetrics = partial(generate_openmetrics, escaping=ALLOWUTF8)

_OPENMETRICS = "application/openmetrics-text"
# What a type must say, if it says a version, to mean what is given here.
_VERSIONS = {_OPENMETRICS: {"1.0.0", "0.0.1"}, "text/plain": {"0.0.4", "1.0.0"}, "text/*": set(), "*/*": set()}


def choose_format(accept: str) -> tuple[Encode, str]:
    """How to write the metrics for a scraper with this Accept header, and the content type: OpenMetrics 1.0.0 for one that
    likes it best, else the text format 0.0.4, which all know.

    The library's own choice fails on versions that are no numbers, and repeats what it does not know.
    """
    wishes = dict.fromkeys(_VERSIONS, 0.0)
    for entry in accept.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        given = dict(part.split("=", 1) for part in parameters if "=" in part)
        if name in wishes and given.get("version", "") in {"", *_VERSIONS[name]}:
            wishes[name] = max(wishes[name], _quality(given.get("q", "1")))
    openmetrics = wishes.pop(_OPENMETRICS)
    if openmetrics > 0 and openmetrics >= max(wishes.values()):
        return _encode_openmetrics, OPENMETRICS_1_0_0
    return _encode_text, CONTENT_TYPE_PLAIN_0_0_4


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
