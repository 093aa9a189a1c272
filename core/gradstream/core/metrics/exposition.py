"""Writes readings as the text that Prometheus reads, by prometheus-client. Imported with the first scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from prometheus_client import metrics_core
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from gradstream.core.metrics.definition import Distribution, Metric, Reading


def expose(readings: Sequence[Reading], accept: str = "") -> tuple[bytes, str]:
    """Write readings, and the process' own usage, in the format that the Accept header prefers; return its type too."""
    encoder, content_type = choose_encoder(accept)
    return encoder(_Families(readings)), content_type


class _Families(Collector):
    """What an encoder of prometheus-client takes."""

    def __init__(self, readings: Sequence[Reading]):
        self._readings = readings

    def collect(self) -> Iterator[metrics_core.Metric]:
        """Yield the families of metrics."""
        yield from families(self._readings)
        yield from _process().collect()


@cache
def _process() -> ProcessCollector:
    """The collector of this process' usage: `process_cpu_seconds_total` and others, under Prometheus' own names."""
    return ProcessCollector(registry=None)


def families(readings: Iterable[Reading]) -> list[metrics_core.Metric]:
    """Group readings by metric, in the order of their first readings."""
    found: dict[str, metrics_core.Metric] = {}
    for metric, value, labels in readings:
        family = found.get(metric.name)
        if family is None:
            family = found[metric.name] = metrics_core.Metric(_family_name(metric), metric.help, _TYPES[metric.kind])
        names = dict(zip(metric.labels, labels, strict=True))
        if isinstance(value, Distribution):
            _add_distribution(family, value, names)
        else:
            family.add_sample(metric.name, names, value)
    return list(found.values())


_TYPES = {"counter": "counter", "gauge": "gauge", "histogram": "histogram", "info": "info"}


def _family_name(metric: Metric) -> str:
    """A family's name is that of its samples without the suffix of its type."""
    suffix = {"counter": "_total", "info": "_info"}.get(metric.kind, "")
    return metric.name.removesuffix(suffix)


def _add_distribution(family: metrics_core.Metric, value: Distribution, labels: dict[str, str]) -> None:
    counts = [*zip(map(str, value.bounds), value.cumulative, strict=True), ("+Inf", value.num_values)]
    for bound, count in counts:
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
    family.add_sample(f"{family.name}_count", labels, value.num_values)
    family.add_sample(f"{family.name}_sum", labels, value.total)
