"""Messages of peers that decode but are invalid: used or refused in one line, within the stated memory."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import example, given
from hypothesis import strategies as st
from support.fuzzing import WORDS, allocating_at_most, fuzzed, mutated_message, taken
from support.micro import micro_plan
from support.pipelines import simulated_timelines, stage_costs, timeline_message

from gradstream.client import _fine_tuning_types as fine_tuning_types
from gradstream.client._job_types import Job
from gradstream.client._node_types import Node
from gradstream.client._watch_types import Checkpoint, watch_item
from gradstream.coordinator.jobs.residuals import check_residual
from gradstream.coordinator.servicers.nodes import check_registration
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.telemetry.timelines import TimelineFiles, check_timeline
from gradstream.core import __version__
from gradstream.core.checkpoint.manifest import ResidualEntry
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import ConfigError, DataError, ProtocolError, StaleEpochError
from gradstream.core.node.faults import Faults
from gradstream.core.pipeline.schedule import make_schedule
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.telemetry.timeline import Timeline
from gradstream.core.telemetry.trace import chrome_trace
from gradstream.core.wire.frames import Assembler, frames, parse, verify
from gradstream.proto.v1 import coordinator_pb2, fine_tuning_pb2, jobs_pb2, plan_pb2, worker_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server import autocodec
from gradstream.services.parameter_server.commit import Decision, decide_commit
from gradstream.services.parameter_server.leader import Leader
from gradstream.services.parameter_server.tuner import Tuner
from gradstream.worker.pipeline.inbound import FORWARD
from gradstream.worker.pipeline.neighbours import Neighbours, check_hello
from gradstream.worker.pipeline.place import Place
from gradstream.worker.timeline import Timeline as Spans
from gradstream.worker.weights import pulled_codec

M = TypeVar("M", bound=Message)
MIB = 1 << 20
PLAN = micro_plan()
SHAPE = (2, 8, 16)  # samples, tokens, hidden size of the micro model


# -- plans -------------------------------------------------------------------------------------------------------------


@fuzzed(2)
@given(mutated_message(PLAN.to_proto()))
def test_a_plan_is_taken_or_refused(message: plan_pb2.Plan) -> None:
    plan = taken(lambda: Plan.from_proto(message), ProtocolError, ConfigError, DataError)
    if plan is None:
        return
    assert Plan.from_proto(plan.to_proto()) == plan
    # What nodes ask of it next.
    assert len(plan.fragments) == len(plan.placement)
    assert sum(bundle.num_elements for bundle in plan.bundles) == plan.num_parameters
    uses = [use for worker in range(plan.replica_size) for use in plan.uses_of_worker(worker)]
    assert {tensor for tensor, _ in uses} <= set(range(len(plan.tensors)))
    assert plan.architecture is not None
    assert plan.source


@pytest.mark.parametrize("shape", [[2**63, 2**63], [2**40], [2**64 - 1] * 8])
def test_a_plan_of_huge_tensors_is_refused_before_it_is_cut(shape: list[int]) -> None:
    message = PLAN.to_proto()
    message.tensors[0].shape[:] = shape
    with allocating_at_most(4 * MIB):
        assert taken(lambda: Plan.from_proto(message), ProtocolError) is None


# -- the data plane ----------------------------------------------------------------------------------------------------


@fuzzed(2)
@given(st.lists(st.binary(max_size=30) | st.sampled_from(WORDS), max_size=8))
def test_nothing_is_allocated_for_what_is_announced_elsewhere(pieces: list[bytes]) -> None:
    """A header is believed only once it was checked: pieces alone never make the buffer larger."""
    with allocating_at_most(MIB):
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        assembler.begin(pb.WeightsHeader(payload_bytes=50))

        def add_all() -> None:
            for piece in pieces:
                _, payload = parse(b"\x7a" + bytes([len(piece) % 128]) + piece[:127])
                whole = assembler.add(payload)
                if whole is not None:
                    verify(*whole, "payload")

        taken(add_all, ProtocolError)


def test_a_message_of_nothing_is_refused_at_once() -> None:
    """Two bytes a field: in a message of 4 MiB two million of them."""
    empty = b"\x7a\x00" * (2 << 20)
    assert taken(lambda: parse(empty), ProtocolError) is None
    assert taken(lambda: parse(b"\x0a\x00" * (2 << 20)), ProtocolError) is None


BUNDLE = PLAN.bundles[0]


@fuzzed(2)
@given(data=st.data(), pull=st.sampled_from(["fp32", "delta-int8", "int8", "fp32-zstd", "auto", "xor-bf16"]))
def test_headers_of_weights_are_taken_or_refused(data: Any, pull: str) -> None:
    book = CodecBook(PLAN.tensors, "int8")
    right = pb.WeightsHeader(version=3, bundle=0, codec=plan_pb2.CODEC_FP32, payload_bytes=BUNDLE.num_elements * 4)
    right.fragment_bytes[:] = [4 * fragment.num_elements for fragment in BUNDLE.fragments]
    header = data.draw(mutated_message(right))

    def check() -> int:
        pulled_codec(book, BUNDLE, pull, header).check_sizes(header.fragment_bytes, header.payload_bytes)
        return header.payload_bytes

    found = taken(check, ProtocolError)
    assert found is None or found <= 4 * BUNDLE.num_elements + 64 * len(BUNDLE.fragments)


# -- the commit --------------------------------------------------------------------------------------------------------

COMPLETE = pb.CompleteStepRequest(job_id="j", epoch=1, step=0, squared_norms=[1.0, 2.0], num_tokens=8, pushed_bytes=9)


@fuzzed(2)
@given(st.lists(mutated_message(COMPLETE), min_size=1, max_size=4), st.floats())
@example(reports=[pb.CompleteStepRequest(num_tokens=1, squared_norms=[-1.0])], loss=0.0)
@example(reports=[pb.CompleteStepRequest(num_tokens=1, squared_norms=[1e308, 1e308])], loss=0.0)
@example(reports=[pb.CompleteStepRequest(num_tokens=1, pushed_bytes=2**64 - 1)] * 2, loss=0.0)
def test_a_leader_decides_or_refuses(reports: list[pb.CompleteStepRequest], loss: float) -> None:
    """And an odd report does not keep the right ones, which come after it, from being decided on."""

    async def run() -> None:
        def decide(step: int, found: Any) -> Decision:
            return decide_commit(step, found, loss, 1.0, 0)[0]

        leader = Leader(2, 0, decide)
        waiting = []
        for report in reports:
            task = asyncio.ensure_future(leader.complete(report))
            await asyncio.sleep(0)
            if task.done():
                taken(task.result, ProtocolError)
            waiting.append(task)
        for server in range(2):
            waiting.append(asyncio.ensure_future(leader.complete(pb.CompleteStepRequest(server=server, num_tokens=8))))
        for task in waiting:
            await asyncio.sleep(0)
            decision = taken(task.result, ProtocolError) if task.done() else None
            if decision is not None:
                assert 0 <= decision.clip_scale <= 1
                assert decision.skip or math.isfinite(decision.grad_norm)
                assert Decision.from_proto(decision.to_proto(), decision.step).skip == decision.skip
        leader.close(ProtocolError("over"))
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())


AUTO = micro_plan(codec={"push": "auto", "pull": "auto"})
MEASURED = pb.LinkMeasurement(compute_seconds=0.1, push_bytes_per_second=2e6, pull_bytes_per_second=3e6)
DECISION = pb.CompleteStepResponse(
    step=3, clip_scale=0.5, num_tokens=8, push_codec=plan_pb2.CODEC_INT8, pull_codec=plan_pb2.CODEC_INT8
)


@fuzzed()
@given(mutated_message(DECISION))
def test_a_leaders_decision_is_taken_or_refused(answer: pb.CompleteStepResponse) -> None:
    decision = taken(lambda: Decision.from_proto(answer, 3), ProtocolError)
    if decision is not None:
        assert math.isfinite(decision.clip_scale / decision.num_tokens)
        assert decision.step == 3


@fuzzed()
@given(st.lists(mutated_message(MEASURED), max_size=30))
@example([MEASURED] * 10 + [pb.LinkMeasurement(compute_seconds=1, push_bytes_per_second=2)] + [MEASURED] * 10)
def test_measurements_of_links_are_taken(found: list[pb.LinkMeasurement]) -> None:
    tuner = Tuner(AUTO)
    for step, one in enumerate(found):
        tuner.measured("a", one)
        tuner.committed(float(step))
        assert tuner.codec in autocodec.LADDER
        assert tuner.reason


# -- neighbours in a pipeline ------------------------------------------------------------------------------------------

HEADERS = {
    "begin": worker_pb2.StageHeader(begin=worker_pb2.StageAttempt(number=1, version=0, slots=[0, 1])),
    "tensor": worker_pb2.StageHeader(
        tensor=worker_pb2.StageTensor(attempt_number=1, stage=0, microbatch=0, shape=SHAPE, codec=plan_pb2.CODEC_FP32),
        payload_bytes=4 * math.prod(SHAPE),
    ),
    "reduction": worker_pb2.StageHeader(
        reduction=worker_pb2.StageReduction(attempt_number=2, inner_step=0), payload_bytes=152
    ),
    "abandon": worker_pb2.StageHeader(abandon=worker_pb2.StageAbandon(number=1, reason="so")),
    "hello": worker_pb2.StageHeader(hello=worker_pb2.StageHello(job_id="job", epoch=1, table=1, worker=0, direction=1)),
}


async def second_worker() -> Neighbours:
    """The last of two workers; the first one is nowhere."""
    workers = [plan_pb2.PipelineWorker(node_id=name, name=name, address="127.0.0.1:1") for name in ("w0", "w1")]
    place = Place(plan_pb2.Replica(number=1, workers=workers), 1)
    # Version 0 begins an ordinary step, version 1 a round.
    plan = micro_plan(sections={"local": {"steps": 2, "after": 1}, "pipeline": {"stages": 2}}, num_steps=5)
    plan = dataclasses.replace(plan, stage_ends=(2, 6), pipeline_schedule="1f1b")
    return Neighbours(plan, place, SHAPE[2], Faults(""), Spans(), lambda error: None, lambda: None)


def test_what_neighbours_say_is_taken_or_refused() -> None:
    with asyncio.Runner() as runner:
        neighbours = runner.run(second_worker())
        inbound = neighbours.inbounds[FORWARD]
        most = 4 * math.prod(SHAPE)

        @fuzzed(3)
        @given(st.sampled_from(sorted(HEADERS)).flatmap(lambda kind: mutated_message(HEADERS[kind])))
        def check(header: worker_pb2.StageHeader) -> None:
            wanted = taken(lambda: neighbours.check(inbound, header), ProtocolError)
            if wanted is None:
                return
            assert header.payload_bytes <= most
            if header.WhichOneof("content") == "begin":
                runner.run(neighbours.take(inbound, header, np.empty(0, np.uint8)))
                assert len(neighbours._upcoming) <= 65
                if neighbours._upcoming:
                    neighbours.took(neighbours._upcoming[0])

        check()
        runner.run(neighbours.close())


def test_hellos_are_taken_or_refused() -> None:
    with asyncio.Runner() as runner:
        neighbours = runner.run(second_worker())

        @fuzzed()
        @given(mutated_message(HEADERS["hello"].hello))
        def check(hello: worker_pb2.StageHello) -> None:
            taken(lambda: check_hello(neighbours, hello), ProtocolError, StaleEpochError)

        check()
        runner.run(neighbours.close())


def changed(message: M, **fields: Any) -> M:
    """A message with other values in some fields."""
    found = type(message)()
    found.CopyFrom(message)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


# -- what nodes report -------------------------------------------------------------------------------------------------

REGISTRATION = coordinator_pb2.RegisterRequest(
    kind=coordinator_pb2.NODE_KIND_WORKER,
    name="worker-0",
    address="10.0.0.1:7000",
    memory_bytes=1 << 30,
    flops_per_second=1e12,
    version=__version__,
    incarnation="1f",
    machine_id="7a0c5a3e-5d4b-4a53-9d30-3c0f4f6d8a11",
)


@fuzzed(2)
@given(mutated_message(REGISTRATION))
@example(changed(REGISTRATION, name="worker-0\n"))
@example(changed(REGISTRATION, address="10.0.0.1:7000\n"))
@example(changed(REGISTRATION, address="\x1b[2J:7000"))
@example(changed(REGISTRATION, incarnation="\x1b[2J"))
def test_a_registration_is_taken_or_refused(request: coordinator_pb2.RegisterRequest) -> None:
    if taken(lambda: check_registration(request) or True, ConfigError, ProtocolError):
        assert request.name.isprintable()
        assert request.address.isprintable()
        assert math.isfinite(request.flops_per_second)


RESIDUAL = coordinator_pb2.ReportResidualRequest(
    job_id="job", epoch=1, version=2, slot=1, file="epoch-0001-residual-slot-001-w.1.safetensors", num_bytes=4
)
RESIDUAL.sha256 = "0" * 64


class _Active:
    """What check_residual asks of the active job."""

    recipe = PLAN.recipe.model_copy(update={"codec": PLAN.recipe.codec.model_copy(update={"push": "topk"})})
    rounds = Rounds(3)

    class record:  # noqa: N801
        start_version = 0


@fuzzed()
@given(mutated_message(RESIDUAL))
@example(coordinator_pb2.ReportResidualRequest(version=1, file=RESIDUAL.file + "\n", sha256="0" * 64))
@example(coordinator_pb2.ReportResidualRequest(version=1, file=RESIDUAL.file, sha256="0" * 64 + "\n"))
def test_a_residuals_report_is_taken_or_refused(report: coordinator_pb2.ReportResidualRequest) -> None:
    if taken(lambda: check_residual(report, _Active()) or True, ProtocolError) and report.file:  # type: ignore[arg-type]
        ResidualEntry(file=report.file, num_bytes=report.num_bytes, sha256=report.sha256, slot=report.slot)


SCHEDULE = make_schedule("1f1b", 2, 2)
REPORT = timeline_message(simulated_timelines(SCHEDULE, stage_costs(SCHEDULE))[0]).timeline


@fuzzed(2)
@given(st.lists(mutated_message(REPORT), min_size=1, max_size=5))
def test_timelines_are_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, reports: list[Any]) -> None:
    """And what was taken is kept, measured and shown; without spans there is nothing to show."""
    files = TimelineFiles(tmp_path_factory.mktemp("timeline"))
    kept = []
    for report in reports:
        if taken(lambda report=report: check_timeline(report, Rounds(10)) or True, ProtocolError):
            files.append(jobs_pb2.GetTimelineResponse(worker="worker-0", timeline=report))
            kept.append(Timeline.from_proto("worker-0", report))
    assert len(files.index()) == min(64, sum(bool(timeline.spans) for timeline in kept))
    chrome_trace(kept)


@fuzzed(0.5)
@given(
    mutated_message(coordinator_pb2.ReportStepRequest(job_id="j", epoch=1, step=1, num_tokens=3, loss=2.0)),
    mutated_message(coordinator_pb2.ReportValidationRequest(job_id="j", epoch=1, loss_sum=2.0, num_tokens=3)),
    mutated_message(coordinator_pb2.ReportCheckpointRequest(job_id="j", epoch=1, version=1, file="f")),
    mutated_message(coordinator_pb2.ReportResidualRequest(job_id="j", epoch=1, version=1)),
    mutated_message(jobs_pb2.Validation(version=1, loss=2.0)),
    st.integers(0, 2**64 - 1),
)
def test_any_report_can_be_stored_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, step: Any, part: Any, file: Any, residual: Any, whole: Any, cursor: int
) -> None:
    state = SqliteState(tmp_path_factory.mktemp("state"))
    try:
        taken(lambda: state.record_step(step), ProtocolError)
        if taken(lambda: state.record_validation_part(part), ProtocolError):
            (found,) = state.validation_parts(part.job_id, part.version).values()
            assert found[1] == part.num_tokens
        taken(lambda: state.record_checkpoint_file(file), ProtocolError)
        taken(lambda: state.record_residual(residual), ProtocolError)
        taken(lambda: state.record_validation(step.job_id, whole), ProtocolError)
        state.read_history("j", cursor, 10)
        state.step_totals(step.job_id, min(step.epoch, 2**63 - 1), 0)
    finally:
        state.close()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.0, 1e308])
def test_a_validation_pass_that_diverged_is_stored(tmp_path: Path, loss: float) -> None:
    """SQLite has no NaN: a part that had one was lost, and its pass never came to an end."""
    state = SqliteState(tmp_path)
    part = coordinator_pb2.ReportValidationRequest(job_id="j", epoch=1, version=2, slot=0, loss_sum=loss, num_tokens=3)
    assert state.record_validation_part(part)
    assert not state.record_validation_part(part)
    found, num_tokens = state.validation_parts("j", 2)[0]
    assert (found, num_tokens) == (pytest.approx(loss, nan_ok=True), 3)
    state.close()


# -- what clients are told ---------------------------------------------------------------------------------------------

ANSWERS: list[tuple[Any, Message]] = [
    (Job.from_proto, jobs_pb2.Job(job_id="j", state=3, submitted_unix_ms=1, ended_unix_ms=2, recipe_json="{}")),
    (Node.from_proto, jobs_pb2.Node(name="w", last_heartbeat_unix_ms=5)),
    (Checkpoint.from_proto, jobs_pb2.Checkpoint(version=1, unix_ms=4)),
    (watch_item, jobs_pb2.WatchJobResponse(cursor=1, event=jobs_pb2.Event(unix_ms=3, message="m"))),
    (watch_item, jobs_pb2.WatchJobResponse(cursor=1, step=coordinator_pb2.ReportStepRequest(step=1))),
    (
        fine_tuning_types.FineTuning.from_proto,
        fine_tuning_pb2.FineTuning(name="n", state=1, created_unix_ms=3, recipe_json="{}"),
    ),
    (fine_tuning_types.ExamplesPreview.from_proto, fine_tuning_pb2.PreviewExamplesResponse()),
    (fine_tuning_types.GeneratedText.from_proto, fine_tuning_pb2.GenerateResponse(text="t", finish_reason=1)),
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_a_services_answer_is_taken_or_refused(number: int) -> None:
    read, right = ANSWERS[number]
    assert read(right) is not None

    @fuzzed()
    @given(mutated_message(right))
    def check(message: Any) -> None:
        taken(lambda: read(message) or True, ProtocolError)

    check()


@fuzzed()
@given(st.binary(max_size=300))
def test_payloads_come_back_as_they_were_sent(payload: bytes) -> None:
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    header = pb.WeightsHeader(payload_bytes=len(payload))
    found = None
    for message in frames(header, [np.frombuffer(payload, np.uint8)], 64):
        encoded, piece = parse(message)
        if encoded is not None:
            assembler.begin(pb.WeightsHeader.FromString(bytes(encoded)))
        found = assembler.add(piece)
    assert found is not None
    assert found[1].tobytes() == payload
