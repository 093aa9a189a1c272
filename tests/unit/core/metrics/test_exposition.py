"""Readings as text, read again by prometheus-client's own parsers."""

from __future__ import annotations

import math

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gradstream.core.metrics.definition import Distribution, Metric, Reading
from gradstream.core.metrics.exposition import expose

STEPS = Metric("gradstream_steps_total", "counter", "Steps.", ("worker",), {"job": ""})
LOSS = Metric("gradstream_loss", "gauge", "Loss.", ("worker",))
BUILD = Metric("gradstream_build_info", "info", "Build.", ("worker",), {"version": ""})
LATENCY = Metric("gradstream_call_seconds", "histogram", "Latency.", ("worker",), {"method": ""})
READINGS = [
    Reading(STEPS, 7, ('a"b\\c\nd',)),
    Reading(LOSS, math.nan),
    Reading(STEPS, 8, ("other",)),
    Reading(BUILD, 1, ("0.1.0",)),
    Reading(LATENCY, Distribution((0.1, 1.0), (2, 5), 6, 3.5), ("Pull",)),
]
EXPECTED = {
    ("gradstream_steps_total", ('a"b\\c\nd',)): 7,
    ("gradstream_steps_total", ("other",)): 8,
    ("gradstream_build_info", ("0.1.0",)): 1,
    ("gradstream_call_seconds_bucket", ("0.1", "Pull")): 2,
    ("gradstream_call_seconds_bucket", ("1.0", "Pull")): 5,
    ("gradstream_call_seconds_bucket", ("+Inf", "Pull")): 6,
    ("gradstream_call_seconds_count", ("Pull",)): 6,
    ("gradstream_call_seconds_sum", ("Pull",)): 3.5,
}


@pytest.mark.parametrize(
    ("accept", "parse", "content_type"),
    [
        ("", parse_text, "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", parse_text, "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0,text/plain", parse_openmetrics, "application/openmetrics-text"),
    ],
)
def test_readings_are_read_again(accept: str, parse: object, content_type: str) -> None:
    body, found_type = expose(READINGS, accept)
    assert found_type.startswith(content_type)
    samples = [
        (sample.name, tuple(value for _, value in sorted(sample.labels.items())), sample.value)
        for family in parse(body.decode())  # type: ignore[operator]
        for sample in family.samples
    ]
    own = {(name, labels): value for name, labels, value in samples if name.startswith("gradstream")}
    assert math.isnan(own.pop(("gradstream_loss", ())))
    assert own == EXPECTED
    # The process' own usage, under Prometheus' names.
    usage = {name: value for name, _, value in samples}
    assert usage["process_resident_memory_bytes"] > 1 << 20
    assert usage["process_cpu_seconds_total"] > 0
