"""A real gRPC server that implements JobsService with canned answers, for tests of the client and of the CLI."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from grpc import StatusCode

from gradstream.coordinator.servicers.lists import checked_filter
from gradstream.core.errors import CheckpointError, ConfigError, DataError, GradstreamError
from gradstream.core.node import probe
from gradstream.core.plan.forecast import ExchangeOption, Forecast, LinkForecast, PlaceForecast, ServerForecast
from gradstream.core.rpc import access, channel
from gradstream.core.rpc import errors as rpc_errors
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, jobs_pb2_grpc

SUBMITTED_MS = 1_700_000_000_000


def canned_job(job_id: str = "tiny-1", **changes: Any) -> jobs_pb2.Job:
    """A running job with every field set."""
    fields: dict[str, Any] = {
        "job_id": job_id,
        "name": "tiny",
        "state": jobs_pb2.JOB_STATE_RUNNING,
        "reason": "steps are committed",
        "epoch": 2,
        "version": 12,
        "num_steps": 100,
        "num_tokens": 12_000,
        "num_samples": 96,
        "loss": 4.25,
        "validation_loss": 4.5,
        "initial_validation_loss": 8.0,
        "num_skipped": 1,
        "tokens_per_second": 1234.5,
        "push_bytes_per_second": 3 << 20,
        "pull_bytes_per_second": 2 << 20,
        "eta_seconds": 125.0,
        "submitted_unix_ms": SUBMITTED_MS,
        "waits": [jobs_pb2.Wait(what="a worker for slots 1, 3", whom="worker-1", since_unix_ms=SUBMITTED_MS + 60_000)],
        "num_parameters": 10_000_000,
        "run_directory": "/runs/tiny-1",
        "recipe_json": json.dumps({"name": "tiny"}),
        "slot_holders": ["worker-0", "", "worker-0", "worker-1"],
        "decisions": ["placement: balanced [2 servers]"],
        "hidden_share": 0.634,
        "pipeline": jobs_pb2.Pipeline(num_stages=4, num_workers=4, schedule="1f1b", bubble=0.2125, ideal_bubble=3 / 15),
        "server_memory": [
            jobs_pb2.ServerMemory(
                name="server-0",
                num_parameters=2_000_000,
                state_bytes=36 << 20,
                predicted_state_bytes=38_000_000,
                early_bytes=1 << 20,
                most_early_bytes=8 << 20,
            )
        ],
    }
    fields.update(changes)
    return jobs_pb2.Job(**fields)


def canned_node(name: str = "worker-0", **changes: Any) -> jobs_pb2.Node:
    """A live worker that waits."""
    fields: dict[str, Any] = {
        "node_id": f"id-{name}",
        "name": name,
        "kind": coordinator_pb2.NODE_KIND_WORKER,
        "alive": True,
        "last_heartbeat_unix_ms": SUBMITTED_MS,
        "activity": coordinator_pb2.Activity(
            job_id="tiny-1",
            phase="waiting",
            step=12,
            waiting_for="version 13 from server-0",
            waiting_since_unix_ms=SUBMITTED_MS,
            sent_bytes=5 << 20,
        ),
        "memory_bytes": 1 << 30,
        "device": "cpu",
    }
    fields.update(changes)
    return jobs_pb2.Node(**fields)


def canned_cluster(num_servers: int, num_workers: int, num_dead: int = 0) -> tuple[jobs_pb2.Job, list[jobs_pb2.Node]]:
    """A job at step 31 and its nodes as they are now: each worker holds a slot, one computes slowly, the last
    `num_dead` workers are dead."""
    now_ms = int(1000 * time.time())
    nodes = [
        canned_node(
            f"server-{number}",
            kind=coordinator_pb2.NODE_KIND_PARAMETER_SERVER,
            activity=coordinator_pb2.Activity(
                job_id="stdlib-gpt-1",
                phase="accumulating",
                step=31,
                sent_bytes=812 << 20,
                received_bytes=1640 << 20,
                resident_bytes=(402 + number) << 20,
                num_parameters=10_000_000 // num_servers,
            ),
        )
        for number in range(num_servers)
    ]
    for number in range(num_workers):
        phase = ("computing", "computing", "waiting", "validating")[number % 4]
        activity = coordinator_pb2.Activity(
            job_id="stdlib-gpt-1",
            phase=phase,
            step=31 - (number == 1),
            sent_bytes=(410 + number) << 20,
            received_bytes=203 << 20,
            resident_bytes=(655 + number % 7) << 20,
        )
        if phase == "waiting":
            activity.waiting_for, activity.waiting_since_unix_ms = "version 32 from server-0", now_ms - 400
        dead = number >= num_workers - num_dead
        nodes.append(
            canned_node(
                f"gpu-machine-{number}",
                activity=coordinator_pb2.Activity(phase="idle") if dead else activity,
                alive=not dead,
                last_heartbeat_unix_ms=now_ms - (185_000 if dead else 300),
            )
        )
    live = [node.name for node in nodes[num_servers : num_servers + num_workers - num_dead]]
    decisions = [
        f"servers: all {num_servers} that were live, led by server-0",
        f"placement: 74 fragments on {num_servers} servers, largest first by bytes in each of 6 windows; 19.1 MiB of "
        f"weights a server",
        f"leases: {len(live)} workers, a slot each; slots of a dead worker go to the one with the fewest",
    ]
    breakdown = jobs_pb2.StepBreakdown(
        num_steps=20,
        mean=jobs_pb2.StepParts(
            compute_seconds=1.2, weights_seconds=0.1, send_seconds=0.2, slots_seconds=0.3, servers_seconds=0.1
        ),
        slowest_worker=live[-1],
        advice=f"most of a step is compute; {live[-1]} is the slowest worker",
    )
    job = canned_job(
        "stdlib-gpt-1",
        name="stdlib-gpt",
        version=31,
        epoch=1,
        num_skipped=0,
        reason="epoch 1 from version 0",
        slot_holders=live,
        decisions=decisions,
        waits=[],
        pipeline=None,
        step_breakdown=breakdown,
        submitted_unix_ms=now_ms - 72_000,
    )
    return job, nodes


def canned_history() -> list[jobs_pb2.WatchJobResponse]:
    """One item of each kind."""
    line = coordinator_pb2.LogLine(unix_ms=SUBMITTED_MS, level="warning", text="slow [link]", job_id="tiny-1")
    step = coordinator_pb2.ReportStepRequest(
        job_id="tiny-1", epoch=1, step=0, num_tokens=100, num_samples=4, loss=float("nan"), unix_ms=SUBMITTED_MS
    )
    return [
        jobs_pb2.WatchJobResponse(
            cursor=1, event=jobs_pb2.Event(unix_ms=SUBMITTED_MS, kind="submitted", message="by a person")
        ),
        jobs_pb2.WatchJobResponse(cursor=2, step=step),
        jobs_pb2.WatchJobResponse(cursor=3, validation=jobs_pb2.Validation(version=1, loss=4.0, num_tokens=64)),
        jobs_pb2.WatchJobResponse(cursor=5, log=jobs_pb2.NodeLogLine(node="worker-0", line=line)),
        jobs_pb2.WatchJobResponse(cursor=6, checkpoint=canned_checkpoint()),
    ]


def canned_timeline(worker: str = "worker-0", version: int = 7) -> jobs_pb2.GetTimelineResponse:
    """A worker's timeline: a send of which compute hid half."""
    begin_us = SUBMITTED_MS * 1000
    spans = [
        coordinator_pb2.Span(
            kind=coordinator_pb2.SPAN_KIND_SEND, begin_unix_us=begin_us, duration_us=20, slot=1, item=0, num_bytes=64
        ),
        coordinator_pb2.Span(kind=coordinator_pb2.SPAN_KIND_COMPUTE, begin_unix_us=begin_us, duration_us=10, slot=1),
    ]
    timeline = coordinator_pb2.ReportTimelineRequest(
        job_id="tiny-1", epoch=2, version=version, spans=spans, communication_us=20, hidden_us=10
    )
    return jobs_pb2.GetTimelineResponse(worker=worker, timeline=timeline)


def canned_metrics(num_steps: int = 3) -> list[jobs_pb2.StepMetrics]:
    """Steps whose loss falls by 0.5, the second of them skipped, and the last version's validation."""
    rows = [
        jobs_pb2.StepMetrics(
            step=step,
            epoch=1,
            unix_ms=SUBMITTED_MS + 500 * step,
            num_tokens=1000 * (step + 1),
            loss=float("nan") if step == 1 else 8.0 - 0.5 * step,
            learning_rate=1e-3,
            grad_norm=2.0,
            step_seconds=0.5 if step else None,
            pushed_bytes=3 << 20,
            pulled_bytes=2 << 20 if step else None,
            skipped=step == 1,
        )
        for step in range(num_steps)
    ]
    last = jobs_pb2.StepMetrics(step=num_steps, num_tokens=1000 * num_steps, validation_loss=6.25)
    return [*rows, last]


def canned_forecast() -> Forecast:
    """What a recipe will take: a model that cannot be cut, so its times are not known."""
    return Forecast(
        num_parameters=1000,
        num_replicas=2,
        num_microbatches=4,
        stages=(),
        places=(PlaceForecast(0, ("worker-0", "worker-1"), 8000, 1 << 30),),
        servers=(ServerForecast("server-0", 1000, 20_000, 16_000, 0),),
        links=(LinkForecast("push", "worker", "server-0", 2000),),
        schedule="",
        link_bits_per_second=1e9,
        compute_seconds=None,
        bubble=None,
        push_seconds=0.5,
        pull_seconds=0.25,
        exposed_seconds=None,
        step_seconds=None,
        tokens_per_second=None,
        reasons={"servers": "servers: all 1 that were live", "memory": "a server needs 20 kB"},
        warnings=("times are not known: it cannot be cut",),
        options=(ExchangeOption(30, "int4", "delta-int4", "shared", 0.96, 1000.5, advised=True),),
        advice="rounds of 30 steps; of all the fewest",
    )


def canned_checkpoint() -> jobs_pb2.Checkpoint:
    """A checkpoint."""
    return jobs_pb2.Checkpoint(
        version=1, path="/runs/tiny-1/checkpoints/1", num_bytes=4096, state_sha256="ab" * 32, unix_ms=SUBMITTED_MS
    )


def piece(file: str, file_bytes: int, payload: bytes) -> jobs_pb2.ExportCheckpointResponse:
    """A piece of an exported file."""
    return jobs_pb2.ExportCheckpointResponse(file=file, file_bytes=file_bytes, payload=payload)


class CannedJobs(jobs_pb2_grpc.JobsServiceServicer):
    """Answers from its attributes and keeps what it was asked."""

    def __init__(self) -> None:
        self.jobs = [canned_job()]
        self.nodes = [canned_node()]
        self.warnings: list[str] = []
        self.history = canned_history()
        self.timelines = [canned_timeline(), canned_timeline(version=8), canned_timeline("worker-1", 8)]
        self.metrics = canned_metrics()
        self.export = [
            piece("config.json", 2, b"{}"),
            piece("model.safetensors", 6, b"abc"),
            piece("model.safetensors", 6, b"def"),
            piece("empty.txt", 0, b""),
        ]
        self.break_watch_after: list[int] = []
        """Cursors after which a watch breaks, each once."""
        self.lose_answers = 0
        """Submissions that are taken and not answered."""
        self.refuse: GradstreamError | None = None
        """What a submission is refused with."""
        self.requests: list[Any] = []
        self.on_get_job: Callable[[], None] = lambda: None

    def _find(self, job_id: str) -> jobs_pb2.Job:
        for job in self.jobs:
            if job_id in ("", job.job_id):
                return job
        raise ConfigError(f"no job '{job_id}'; `gradstream ls` lists them")

    async def CheckpointJob(self, request: Any, context: Any) -> jobs_pb2.CheckpointJobResponse:
        self.requests.append(context.time_remaining())
        return jobs_pb2.CheckpointJobResponse(checkpoint=jobs_pb2.Checkpoint(version=12))

    async def SubmitJob(self, request: Any, context: Any) -> jobs_pb2.SubmitJobResponse:
        self.requests.append(request)
        if self.lose_answers:
            self.lose_answers -= 1
            await context.abort(StatusCode.UNAVAILABLE, "going down")
        async with rpc_errors.answering(context):
            if self.refuse is not None:
                raise self.refuse
            return jobs_pb2.SubmitJobResponse(job=canned_job("tiny-2", state=jobs_pb2.JOB_STATE_QUEUED))
        raise AssertionError

    async def PlanJob(self, request: Any, context: Any) -> jobs_pb2.PlanJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            if self.refuse is not None:
                raise self.refuse
            return jobs_pb2.PlanJobResponse(forecast=canned_forecast().to_proto())
        raise AssertionError

    async def ListJobs(self, request: Any, context: Any) -> jobs_pb2.ListJobsResponse:
        return jobs_pb2.ListJobsResponse(jobs=self.jobs)

    async def GetJob(self, request: Any, context: Any) -> jobs_pb2.GetJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            self.on_get_job()
            return jobs_pb2.GetJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        self.requests.append(request)
        # It sends items of all kinds, but selects by everything else.
        wanted = replace(checked_filter(request), kinds=())
        for item in [item for item in self.history if wanted.selects(item)][-request.tail :]:
            if item.cursor > request.after_cursor:
                yield jobs_pb2.WatchJobResponse(items=[item]) if request.paged else item
                if item.cursor in self.break_watch_after:
                    self.break_watch_after.remove(item.cursor)
                    await context.abort(StatusCode.UNAVAILABLE, "going down")

    async def PauseJob(self, request: Any, context: Any) -> jobs_pb2.PauseJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            return jobs_pb2.PauseJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def ResumeJob(self, request: Any, context: Any) -> jobs_pb2.ResumeJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            return jobs_pb2.ResumeJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def ReplayJob(self, request: Any, context: Any) -> jobs_pb2.ReplayJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            self._find(request.job_id)
            return jobs_pb2.ReplayJobResponse(job=canned_job("tiny-2", state=jobs_pb2.JOB_STATE_QUEUED))
        raise AssertionError

    async def ReplanJob(self, request: Any, context: Any) -> jobs_pb2.ReplanJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            return jobs_pb2.ReplanJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def RemoveJob(self, request: Any, context: Any) -> jobs_pb2.RemoveJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            job = self._find(request.job_id)
            return jobs_pb2.RemoveJobResponse(
                job_id=job.job_id, num_bytes=5, versions=[2], run_directory="/runs/tiny-1"
            )
        raise AssertionError

    async def StopJob(self, request: Any, context: Any) -> jobs_pb2.StopJobResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            return jobs_pb2.StopJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def ListCheckpoints(self, request: Any, context: Any) -> jobs_pb2.ListCheckpointsResponse:
        return jobs_pb2.ListCheckpointsResponse(checkpoints=[canned_checkpoint()])

    async def ExportCheckpoint(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.ExportCheckpointResponse]:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            if request.HasField("version") and request.version != 1:
                raise CheckpointError(f"no checkpoint of version {request.version}; `gradstream ckpt ls` lists them")
            for part in self.export:
                yield part

    async def GetTimeline(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.GetTimelineResponse]:
        async with rpc_errors.answering(context):
            job = self._find(request.job_id)
            if not self.timelines:
                raise DataError(f"there is no timeline of job {job.job_id} yet")
            for timeline in self.timelines:
                yield timeline

    async def GetMetrics(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.GetMetricsResponse]:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            self._find(request.job_id)
            for first in range(0, len(self.metrics), 1000):
                yield jobs_pb2.GetMetricsResponse(rows=self.metrics[first : first + 1000])

    async def ListNodes(self, request: Any, context: Any) -> jobs_pb2.ListNodesResponse:
        return jobs_pb2.ListNodesResponse(nodes=self.nodes, warnings=self.warnings)


def serving(servicer: CannedJobs, listen: str = "127.0.0.1:0") -> AbstractContextManager[str]:
    """Serve `servicer`. See serving_by."""

    def add(server: Any) -> None:
        jobs_pb2_grpc.add_JobsServiceServicer_to_server(servicer, server)
        probe.add_probe(server, access.COORDINATOR)

    return serving_by(add, listen)


@contextmanager
def serving_by(add: Callable[[Any], None], listen: str = "127.0.0.1:0") -> Iterator[str]:
    """Serve what `add` adds to a server, on a free port unless told otherwise, in an event loop on a thread; yield the
    address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Any, int]:
        server = channel.new_server()
        add(server)
        port = channel.listen(server, listen)
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
