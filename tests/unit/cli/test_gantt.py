"""The picture of a pipeline: every box has its label, or none has one."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from support.pipelines import simulated_timelines, stage_costs

from gradstream.coordinator.cli.pictures import gantt
from gradstream.coordinator.telemetry.pipeline_timeline import Pass, Run, newest, runs
from gradstream.core.pipeline.schedule import make_schedule
from gradstream.core.telemetry.timeline import SpanKind


def found(num_microbatches: int) -> list[Run]:
    schedule = make_schedule("1f1b", 4, num_microbatches)
    return newest(runs(simulated_timelines(schedule, stage_costs(schedule, latency_us=50), version=7), 4))


def texts(svg: bytes) -> list[str]:
    """All texts of a picture; matplotlib names each in a comment beside its outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.fromstring(svg, parser)
    return [element.text.strip() for element in tree.iter() if element.tag is ElementTree.Comment and element.text]


@pytest.mark.parametrize(("num_microbatches", "labelled"), [(12, True), (60, False)])
def test_all_boxes_are_labelled_or_none(num_microbatches: int, labelled: bool) -> None:
    chosen = found(num_microbatches)
    shown = texts(gantt.draw(chosen, "tiny-1, version 7: 1f1b", "svg"))
    # Of each microbatch a forward and a backward pass on four stages; an axis has numbers too, multiples of 10.
    boxes = [text for text in shown if text in {str(number) for number in range(1, num_microbatches) if number % 10}]
    assert len(boxes) == (8 * 10 if labelled else 0)
    (label,) = [text for text in shown if text.startswith("ms since the first pass")]
    assert ("numbers: microbatch" in label) == labelled


def test_a_pass_that_took_no_time_leaves_the_others_their_labels() -> None:
    """As of a first stage, whose backward pass for its input has nothing to do."""
    (run,) = found(12)
    nothing = Pass(run.end_us - 1, 1, SpanKind.BACKWARD_INPUT, 0, 0, 11)
    shown = texts(gantt.draw([replace(run, passes=((*run.passes[0], nothing), *run.passes[1:]))], "tiny-1", "svg"))
    assert shown.count("11") == 8


def test_the_picture_says_why_the_bubble_may_lie_below_the_ideal() -> None:
    shown = " ".join(texts(gantt.draw(found(12), "tiny-1", "svg")))
    assert "hands on its input's gradient before it ends: the bubble may lie below" in shown.replace("\n", " ")
