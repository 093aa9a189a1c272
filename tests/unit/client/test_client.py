"""The client against a real gRPC server with canned answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from canned_fine_tunings import CannedFineTunings, serving_fine_tunings
from canned_jobs import SUBMITTED_MS, CannedJobs, canned_forecast, canned_job, canned_metrics, piece, serving

import gradstream.client
from gradstream.client import (
    AsyncClient,
    Checkpoint,
    CheckpointError,
    Client,
    ConfigError,
    DataError,
    Event,
    GradstreamError,
    JobFailedError,
    JobState,
    LogLine,
    NodeKind,
    Pipeline,
    PlanError,
    ProtocolError,
    ServerMemory,
    Span,
    SpanKind,
    Step,
    UnreachableError,
    Validation,
    _connection,
)
from gradstream.client import _errors as client_errors
from gradstream.core import errors
from gradstream.proto.v1 import jobs_pb2

RECIPE = Path(__file__).parents[3] / "recipes" / "stdlib-gpt.yaml"


@pytest.fixture
def free_address() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_public_names_are_pinned() -> None:
    assert gradstream.client.__all__ == [
        "AccessError",
        "Activity",
        "AsyncClient",
        "AsyncFineTuningClient",
        "BusyError",
        "Checkpoint",
        "CheckpointError",
        "Client",
        "ConfigError",
        "CredentialsError",
        "DataError",
        "Evaluation",
        "Event",
        "ExamplesPreview",
        "ExamplesReport",
        "ExchangeOption",
        "ExportProgress",
        "FineTuning",
        "FineTuningClient",
        "FineTuningFailedError",
        "FineTuningRecipe",
        "FineTuningState",
        "FineTuningWatchItem",
        "Forecast",
        "GeneratedText",
        "Generation",
        "GradstreamError",
        "Job",
        "JobFailedError",
        "JobState",
        "LinkForecast",
        "LogLine",
        "Node",
        "NodeKind",
        "Pipeline",
        "PlaceForecast",
        "PlanError",
        "ProtocolError",
        "Recipe",
        "RemovedJob",
        "RenderedExample",
        "RenderedPiece",
        "Sample",
        "ServerForecast",
        "ServerMemory",
        "Span",
        "SpanKind",
        "StageForecast",
        "StaleEpochError",
        "Step",
        "StepBreakdown",
        "StepMetrics",
        "StepParts",
        "Timeline",
        "UnreachableError",
        "Validation",
        "Wait",
        "WatchItem",
        "WorkerTimes",
        "chrome_trace",
        "default_address",
        "default_fine_tuning_address",
        "load_fine_tuning_recipe",
        "load_recipe",
    ]
    assert all(hasattr(gradstream.client, name) for name in gradstream.client.__all__)


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, gradstream.client; "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'matplotlib', 'typer', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sync_and_async_have_the_same_methods() -> None:
    def names(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert names(Client) - {"address"} == names(AsyncClient)


def test_a_recipe_is_planned(jobs: CannedJobs, address: str) -> None:
    with Client(address) as client:
        assert client.plan(RECIPE, ["seed=7"], num_workers=4, memory_bytes=1 << 30) == canned_forecast()
        asked = jobs.requests[-1]
        assert (asked.num_servers, asked.num_workers, asked.memory_bytes) == (0, 4, 1 << 30)
        assert (asked.link_bits_per_second, json.loads(asked.recipe_json)["seed"]) == (10e9, 7)
        jobs.refuse = PlanError("worker-0 is too small")
        with pytest.raises(PlanError, match="too small"):
            client.plan(RECIPE)
        for numbers in ({"num_servers": -1}, {"num_workers": 2**32}, {"memory_bytes": 2**63}):
            with pytest.raises(ConfigError, match=f"{next(iter(numbers))} is "):
                client.plan(RECIPE, **numbers)


def test_a_jobs_model_generates_by_way_of_a_fine_tuning_service(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = CannedFineTunings()
    with serving_fine_tunings(service) as generating, Client(address) as client:
        pieces = list(client.generate("tiny-1", "def", version=12, temperature=0.5, seed=3, service=generating))
        assert "".join(piece.text for piece in pieces) == "return a + b"
        asked = service.requests[-1]
        assert (asked.base, asked.prompt, asked.temperature, asked.seed) == ("job:tiny-1@12", "def", 0.5, 3)
        # The newest job, at the service that the environment names; left before its end.
        monkeypatch.setenv("GRADSTREAM_FINE_TUNING", generating)
        more = client.generate(None, [{"role": "user", "content": "hello"}])
        assert next(more).text == "return"
        more.close()
        assert (service.requests[-1].base, service.requests[-1].messages[0].content) == ("job:tiny-1", "hello")
        with pytest.raises(ConfigError, match="no job 'nope'"):
            list(client.generate("nope", "def"))
    with pytest.raises(UnreachableError, match=r"fine-tuning service .* does not answer"), Client(address) as client:
        list(client.generate("tiny-1", "def"))


def test_job_is_typed(address: str) -> None:
    with Client(address) as client:
        job = client.job()
    assert job.state is JobState.RUNNING
    assert not job.state.ended
    assert job.eta == timedelta(seconds=125)
    assert job.submitted == datetime.fromtimestamp(SUBMITTED_MS / 1000, UTC)
    assert job.ended is None
    assert job.waits[0].whom == "worker-1"
    assert job.recipe == {"name": "tiny"}
    assert job.hidden_share == pytest.approx(0.634)
    assert job.server_memory == (ServerMemory("server-0", 2_000_000, 36 << 20, 38_000_000, 1 << 20, 8 << 20),)
    document = json.loads(json.dumps(job.to_dict(), allow_nan=False))
    assert job.pipeline == Pipeline(4, 4, "1f1b", 0.2125, 0.2)
    assert document["pipeline"]["ideal_bubble"] == pytest.approx(0.2)
    assert document["server_memory"][0]["early_bytes"] == 1 << 20
    assert document["state"] == "running"
    assert document["eta_seconds"] == 125
    assert document["submitted"] == "2023-11-14T22:13:20.000+00:00"
    assert document["waits"][0]["since"].startswith("2023-11-14T22:14:20")


def test_absent_values_are_none(jobs: CannedJobs, address: str) -> None:
    jobs.jobs = [jobs_pb2.Job(job_id="new-1")]
    with Client(address) as client:
        (job,) = client.jobs()
    assert (job.loss, job.validation_loss, job.eta, job.submitted) == (None, None, None, None)
    assert (job.hidden_share, job.server_memory, job.pipeline) == (None, (), None)
    assert job.state is JobState.UNSPECIFIED


def test_nodes(address: str) -> None:
    with Client(address) as client:
        (node,) = client.nodes()
    assert node.kind is NodeKind.WORKER
    assert node.activity.waiting_for == "version 13 from server-0"
    assert node.to_dict()["activity"]["phase"] == "waiting"


async def test_timeline(jobs: CannedJobs, address: str) -> None:
    async with AsyncClient(address) as client:
        timelines = await client.timeline("tiny-1")
        assert [(timeline.worker, timeline.version) for timeline in timelines] == [
            ("worker-0", 7),
            ("worker-0", 8),
            ("worker-1", 8),
        ]
        begin_us = SUBMITTED_MS * 1000
        assert timelines[0].spans == (
            Span(SpanKind.SEND, begin_us, 20, slot=1, item=0, num_bytes=64),
            Span(SpanKind.COMPUTE, begin_us, 10, slot=1),
        )
        assert (timelines[0].communication_us, timelines[0].hidden_us) == (20, 10)
        jobs.timelines = []
        with pytest.raises(DataError, match="no timeline of job tiny-1 yet"):
            await client.timeline()


async def test_metrics(jobs: CannedJobs, address: str) -> None:
    async with AsyncClient(address) as client:
        first, second, third, last = [row async for row in client.metrics("tiny-1", first_step=2, every=5)]
        (request,) = jobs.requests
        assert (request.job_id, request.first_step, request.every) == ("tiny-1", 2, 5)
        assert (first.step, first.epoch, first.loss, first.num_tokens) == (0, 1, 8.0, 1000)
        assert (first.step_time, first.pulled_bytes, first.validation_loss) == (None, None, None)
        assert (second.step_time, second.pulled_bytes, second.skipped) == (timedelta(seconds=0.5), 2 << 20, True)
        # NaN is no JSON.
        assert (second.to_dict()["loss"], second.to_dict()["step_time_seconds"]) == (None, 0.5)
        assert third.time == datetime.fromtimestamp(SUBMITTED_MS / 1000 + 1, UTC)
        assert (last.step, last.num_tokens, last.validation_loss) == (3, 3000, 6.25)
        assert (last.epoch, last.time, last.loss, last.learning_rate, last.grad_norm) == (None, None, None, None, None)
        with pytest.raises(ConfigError, match="no job 'x'"):
            _ = [row async for row in client.metrics("x")]


def test_metrics_of_a_long_job(jobs: CannedJobs, address: str) -> None:
    jobs.metrics = canned_metrics(2500)
    with Client(address) as client:
        assert [row.step for row in client.metrics()] == list(range(2501))
        # Left early, nothing goes on.
        assert next(iter(client.metrics())).step == 0


async def test_watch_gives_each_item_once_over_a_break(jobs: CannedJobs, address: str) -> None:
    jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FINISHED)]
    jobs.break_watch_after = [2, 5]
    async with AsyncClient(address) as client:
        items = [item async for item in client.watch("tiny-1", kinds=["event", "log"])]
    assert [type(item) for item in items] == [Event, Step, Validation, LogLine, Checkpoint]
    assert [item.cursor for item in items] == [1, 2, 3, 5, 6]
    asked = [request.after_cursor for request in jobs.requests if isinstance(request, jobs_pb2.WatchJobRequest)]
    assert asked == [0, 2, 5]
    assert [tuple(request.kinds) for request in jobs.requests if isinstance(request, jobs_pb2.WatchJobRequest)] == [
        ("event", "log")
    ] * 3
    # NaN is no JSON.
    assert items[1].to_dict()["loss"] is None
    assert items[3].to_dict()["type"] == "log"
    json.dumps([item.to_dict() for item in items], allow_nan=False)


async def test_watch_without_follow_does_not_hide_a_break(jobs: CannedJobs, address: str) -> None:
    jobs.break_watch_after = [2]
    async with AsyncClient(address) as client:
        with pytest.raises(UnreachableError):
            _ = [item async for item in client.watch(follow=False)]


def test_watch_survives_a_restart_of_the_coordinator(jobs: CannedJobs, free_address: str) -> None:
    del jobs  # Two coordinators with the same history.
    port_holder = CannedJobs()
    port_holder.break_watch_after = [3]
    seen = []
    with serving(port_holder) as first:
        client = Client(first)
        items = client.watch()
        for _ in range(3):
            seen.append(next(items).cursor)
    again = CannedJobs()
    again.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FINISHED)]
    with serving(again, first):
        seen += [item.cursor for item in items]
    client.close()
    assert seen == [1, 2, 3, 5, 6]


def test_sync_watch_may_be_left_early(address: str) -> None:
    with Client(address) as client:
        for item in client.watch(after_cursor=2):
            assert item.cursor == 3
            break
        assert client.job().job_id == "tiny-1"


def test_wait_reports_progress_and_returns(jobs: CannedJobs, address: str) -> None:
    states = iter([jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_FINISHED])
    jobs.on_get_job = lambda: setattr(jobs, "jobs", [canned_job(state=next(states))])
    seen: list[str] = []
    with Client(address) as client:
        job = client.wait(on_progress=lambda job: seen.append(job.state), poll_seconds=0.01)
    assert job.state == "finished"
    assert seen == ["running", "running", "finished"]


def test_wait_goes_on_when_the_coordinator_is_busy(jobs: CannedJobs, address: str) -> None:
    asked = []

    def answer() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise errors.BusyError("512 calls of these credentials are under way; wait for one to end")
        if len(asked) == 3:
            jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FINISHED)]

    jobs.on_get_job = answer
    with Client(address) as client:
        assert client.wait(poll_seconds=0.01).state == "finished"
    assert len(asked) == 3


def test_wait_raises_when_the_job_failed(jobs: CannedJobs, address: str) -> None:
    jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FAILED, reason="the loss is not finite")]
    with Client(address) as client, pytest.raises(JobFailedError, match="tiny-1 failed at step 12 of 100") as caught:
        client.wait("tiny-1")
    assert caught.value.reason == "the loss is not finite"
    assert caught.value.job.version == 12
    assert caught.value.exit_code == 8


def test_submit_takes_path_mapping_and_recipe(jobs: CannedJobs, address: str) -> None:
    recipe = gradstream.client.load_recipe(RECIPE)
    with Client(address) as client:
        job = client.submit(RECIPE, ["training.num_steps=7"])
        client.submit(recipe)
        client.submit(recipe.model_dump(mode="json"))
        with pytest.raises(ConfigError, match="did you mean 'training'"):
            client.submit({**recipe.model_dump(), "trainig": {}})
        with pytest.raises(ConfigError, match="overrides go with the path"):
            client.submit(recipe, ["seed=3"])
    assert job.state is JobState.QUEUED
    sent = [json.loads(request.recipe_json) for request in jobs.requests]
    assert sent[0]["training"]["num_steps"] == 7
    assert Path(sent[0]["data"]["path"]).is_absolute()
    assert sent[1] == sent[2]


def every_error() -> list[type[GradstreamError]]:
    """All classes that a server's answer can name."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GradstreamError)]
    assert len(kinds) > 10
    return kinds


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_that_a_server_can_answer_is_public(
    jobs: CannedJobs, address: str, kind: type[GradstreamError]
) -> None:
    jobs.refuse = kind("because")
    with Client(address) as client, pytest.raises(GradstreamError, match="because") as caught:
        client.submit(RECIPE)
    assert type(caught.value) is kind
    assert getattr(gradstream.client, kind.__name__) is kind
    assert kind.__name__ in gradstream.client.__all__
    assert f" {kind.__name__} " in f"{errors.__doc__} ".replace("\n", " ")
    assert f" {kind.__name__} " in f"{client_errors.__doc__} ".replace("\n", " ")
    assert kind.__name__ in client_errors.__all__
    assert len(jobs.requests) == 1, "a refusal is an answer: nothing is made again"


def test_a_submission_whose_answer_is_lost_is_made_again_under_its_id(jobs: CannedJobs, address: str) -> None:
    jobs.lose_answers = 2
    with Client(address) as client:
        assert client.submit(RECIPE).job_id == "tiny-2"
        client.submit(RECIPE)
        client.submit(RECIPE, request_id="mine")
    ids = [request.request_id for request in jobs.requests]
    assert len(ids) == 5
    assert len(set(ids[:3])) == 1, "one submission, sent three times"
    assert len(set(ids)) == 3
    assert ids[4] == "mine"


def test_a_submission_that_is_never_answered_says_how_to_go_on(
    jobs: CannedJobs, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "AGAIN_SECONDS", 0.3)
    jobs.lose_answers = 1000
    with Client(address) as client, pytest.raises(UnreachableError) as caught:
        client.submit(RECIPE)
    sent = {request.request_id for request in jobs.requests}
    assert len(sent) == 1
    assert str(caught.value).endswith(
        f"; it may have been taken: make the request again with request id {sent.pop()}, which makes no second one"
    )


def test_a_coordinator_that_is_not_there_is_told_of_at_once(free_address: str) -> None:
    begun = time.monotonic()
    with Client(free_address) as client, pytest.raises(UnreachableError, match="does not answer") as caught:
        client.submit(RECIPE)
    assert "may have been taken" not in str(caught.value)
    assert time.monotonic() - begun < 8


def test_control_calls(jobs: CannedJobs, address: str) -> None:
    with Client(address) as client:
        client.pause("tiny-1")
        client.resume("tiny-1")
        client.stop("tiny-1", now=True)
        assert client.checkpoints()[0].num_bytes == 4096
        with pytest.raises(ConfigError, match="no job 'x'"):
            client.stop("x")
    assert jobs.requests[2].now


def test_export_writes_all_files(address: str, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    with Client(address) as client:
        path = client.export(
            "tiny-1",
            tmp_path / "a" / "b",
            on_progress=lambda p: progress.append((p.file, p.received_bytes, p.file_bytes)),
        )
    assert path == tmp_path / "a" / "b"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"abcdef",
        "empty.txt": b"",
    }
    assert ("model.safetensors", 6, 6) in progress
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_export_into_an_empty_directory(address: str, tmp_path: Path) -> None:
    with Client(address) as client:
        client.export(None, tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece("../evil", 1, b"x")], "not a plain file name"),
        ([piece("/etc/passwd", 1, b"x")], "not a plain file name"),
        ([piece(".hidden", 1, b"x")], "not a plain file name"),
        ([piece("a\nb", 1, b"x")], "not a plain file name"),
        ([piece("", 1, b"x")], "not a plain file name"),
        ([piece("a", 2, b"x")], "1 bytes came, 2 were announced"),
        ([piece("a", 1, b"xy")], "more bytes came"),
        ([piece("a", 1, b"x"), piece("b", 1, b"x"), piece("a", 1, b"x")], "twice"),
        ([piece("a", 3, b"x"), piece("a", 2, b"x")], "more bytes came"),
        ([], "no files"),
    ],
)
def test_export_trusts_nothing(
    jobs: CannedJobs, address: str, tmp_path: Path, pieces: list[jobs_pb2.ExportCheckpointResponse], message: str
) -> None:
    jobs.export = pieces
    with Client(address) as client, pytest.raises(ProtocolError, match=message):
        client.export("tiny-1", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_waited_for_without_a_deadline(jobs: CannedJobs, address: str) -> None:
    with Client(address, call_timeout_seconds=1.0) as client:
        assert client.checkpoint("tiny-1").version == 12
    assert jobs.requests == [None]


def test_export_refuses_a_full_directory(address: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with Client(address) as client:
        with pytest.raises(ConfigError, match="not empty"):
            client.export("tiny-1", tmp_path)
        with pytest.raises(ConfigError, match="is a file"):
            client.export("tiny-1", tmp_path / "mine")
        with pytest.raises(CheckpointError, match="no checkpoint of version 9"):
            client.export("tiny-1", tmp_path / "new", version=9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_unreachable_coordinator(free_address: str) -> None:
    started = time.monotonic()
    with Client(free_address) as client:
        with pytest.raises(UnreachableError, match=f"coordinator {free_address} does not answer .*Connection refused"):
            client.job()
        assert client.unreachable_since is not None
        with pytest.raises(UnreachableError, match=r"does not answer since \d\d:\d\d:\d\d"):
            client.jobs()
    assert time.monotonic() - started < 9


def test_silent_coordinator_fails_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with (
            Client(address, connect_timeout_seconds=0.5) as client,
            pytest.raises(UnreachableError, match="no answer within"),
        ):
            client.job()
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("bad", ["nonsense", "host:", "http://host:7000", "host:70000000", "a b:7"])
def test_bad_addresses(bad: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        Client(bad)


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTREAM_COORDINATOR", "example:1234")
    assert AsyncClient().address == "example:1234"
    monkeypatch.delenv("GRADSTREAM_COORDINATOR")
    assert AsyncClient().address == "127.0.0.1:7000"


def test_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    client.close()
    with pytest.raises(GradstreamError, match="closed"):
        client.job()
    assert not any(thread.name == "gradstream-client" for thread in threading.enumerate())
