"""Metric families of one server: how they are named and labelled, and counts cheap enough for every token.

The library's own counters and histograms take locks and walk through their buckets; these are counted and scraped on one
thread, the event loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.histogram import Histogram, HistogramCounts

Samples = Iterable[tuple[tuple[str, ...], float]]
"""The values of a family's own labels, and the number."""

_COMMON_LABELS = ("model_name", "engine")


class Families:
    """Makes families, each with the prefix and the labels that all have. Counters are named without `_total`, infos without
    `_info`; the library adds them."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._common = (model_name, "0")  # vLLM counts its engines; there is one here

    def gauge(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*_COMMON_LABELS, *labels])
        for values, number in samples:
            family.add_metric([*self._common, *values], number)
        return family

    def counter(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=[*_COMMON_LABELS, *labels])
        for values, number in samples:
            family.add_metric([*self._common, *values], number)
        return family

    def histogram(self, name: str, text: str, bounds: Sequence[float], found: HistogramCounts) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, text, labels=_COMMON_LABELS)
        counts = accumulate(found.counts or [0] * (len(bounds) + 1))
        buckets = list(zip(map(floatToGoString, (*bounds, float("inf"))), counts, strict=True))
        family.add_metric(self._common, buckets, found.sum)
        return family

    def info(self, name: str, text: str, facts: Mapping[str, str]) -> Metric:
        family = InfoMetricFamily(self._prefix + name, text, labels=_COMMON_LABELS)
        family.add_metric(self._common, dict(facts))
        return family


class LabelledCounter(Collector):
    """A counter with labels. known: the values of its labels that it starts with, at 0, so that a rate sees the first one."""

    def __init__(
        self, families: Families, name: str, text: str, labels: Sequence[str] = (), known: Iterable[tuple[str, ...]] = ()
    ) -> None:
        self._families, self._name, self._text, self._labels = families, name, text, tuple(labels)
        self._counts = dict.fromkeys(known, 0.0)

    def add(self, *values: str, amount: float = 1.0) -> None:
        self._counts[values] = self._counts.get(values, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        yield self._families.counter(self._name, self._text, self._counts.items(), self._labels)


class ObservedHistogram(Collector):
    """A histogram of what is observed here."""

    def __init__(self, families: Families, name: str, text: str, bounds: Sequence[float]) -> None:
        self._families, self._name, self._text, self._bounds = families, name, text, bounds
        self._histogram = Histogram(bounds)
        self.observe = self._histogram.observe  # called for every token, so without a call between

    def collect(self) -> Iterator[Metric]:
        yield self._families.histogram(self._name, self._text, self._bounds, self._histogram.counts())


class FixedInfo(Collector):
    """Facts that do not change while the server runs."""

    def __init__(self, families: Families, name: str, text: str, facts: Mapping[str, str]) -> None:
        self._families, self._name, self._text, self._facts = families, name, text, facts

    def collect(self) -> Iterator[Metric]:
        yield self._families.info(self._name, self._text, self._facts)


class ReadGauge(Collector):
    """A gauge that somebody else keeps, read when somebody scrapes."""

    def __init__(self, families: Families, name: str, text: str, read: Callable[[], float]) -> None:
        self._families, self._name, self._text, self._read = families, name, text, read

    def collect(self) -> Iterator[Metric]:
        yield self._families.gauge(self._name, self._text, [((), self._read())])
