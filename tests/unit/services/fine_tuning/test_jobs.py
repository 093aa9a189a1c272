"""The phases of a fine-tuning against a real gRPC coordinator with canned jobs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.canned_coordinator import CannedCoordinator, service
from support.tiny import LLAMA

from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.core.recipe.loading import parse_recipe
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.store import Record, Store

BASE = Base(kind="huggingface", path="/models/tiny", title="tiny", files=(), sha256="ab" * 32)
ASKED = parse_fine_tuning_recipe(
    {
        "name": "task",
        "base_model": "/models/tiny",
        "data": {"path": "/data/task.jsonl"},
        "validation": {"num_exact_match": 0},
    }
)
RECIPE = parse_recipe(
    {
        "name": "task",
        "model": {"config": LLAMA},
        "training": {"num_steps": 8, "num_slots": 1, "global_batch": 1, "microbatch": 1, "sequence_length": 8},
        "data": {"path": "/state/fine-tunings/task/data-1"},
        "validation": {"num_samples": 1},
    }
)


def note(directory: Path, **changes: Any) -> None:
    """Leave a record as a service that was killed has left it."""
    store = Store(directory)
    record = Record(name="task", created_unix_ms=1, recipe_json=ASKED.model_dump_json(), base=BASE)
    store.create(record.changed(job_recipe_json=RECIPE.model_dump_json(), **changes))
    store.close()


async def until(fine_tunings: FineTunings, state: str, best_version: int | None = None) -> Record:
    """The record once it is in a state and has a best version, if one is given."""
    async with asyncio.timeout(20):
        async for record in fine_tunings.follow("task"):
            if record.state == state and best_version in (None, record.best_version):
                return record
    raise AssertionError(f"it ended: {fine_tunings.find('task')}")


async def test_submitted_followed_and_finished(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        record = await until(fine_tunings, "training", best_version=4)
        # What is not finite is no loss to be compared.
        assert record.losses == {0: 3.0, 4: 1.5}
        assert fine_tunings.pushed_bytes(record) == 640
        assert fine_tunings.checkpoint("task") == (4, "/runs/4")
        with pytest.raises(CheckpointError, match="no checkpoint of version 9; there are: 4"):
            fine_tunings.checkpoint("task", 9)
        coordinator.end()
        record = await until(fine_tunings, "finished")
    assert record.checkpoints == {4: "/runs/4", 8: "/runs/8"}
    assert record.best_version == 4
    assert coordinator.submitted == 1


async def test_submitted_once_though_the_service_died_before_it_noted_so(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    # One of another recipe is not it.
    coordinator.add(RECIPE.model_copy(update={"seed": 1}))
    mine = coordinator.add(RECIPE)
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        assert (await until(fine_tunings, "training")).job_id == mine.job_id
    assert coordinator.submitted == 0


async def test_submitted_once_though_the_answer_was_lost(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    coordinator.lose_answers = 1
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training")
    assert coordinator.submitted == 1


async def test_the_next_service_goes_on(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training", best_version=4)
    coordinator.end()
    async with service(coordinator, tmp_path) as fine_tunings:
        assert (await until(fine_tunings, "finished")).best_version == 4
    assert coordinator.submitted == 1


async def test_cancelled_and_resumed(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training", best_version=4)
        record = await fine_tunings.cancel("task")
        assert (record.state, record.reason) == ("cancelled", "cancelled while training")
        assert coordinator.jobs[0].state == jobs_pb2.JOB_STATE_STOPPED
        with pytest.raises(ConfigError, match="task is already cancelled"):
            await fine_tunings.cancel("task")
        assert (await fine_tunings.resume("task")).state == "training"
        coordinator.end()
        await until(fine_tunings, "finished")
        with pytest.raises(ConfigError, match="task is finished; there is nothing to resume"):
            await fine_tunings.resume("task")
    assert (coordinator.submitted, coordinator.resumed) == (1, 1)


@pytest.mark.parametrize(("end", "state"), [("FINISHED", "finished"), ("FAILED", "failed"), ("", "cancelled")])
async def test_a_record_that_cannot_be_written_is_written_later(
    end: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is said with cause and since when, and it fails nothing that goes on without it."""
    monkeypatch.setattr("gradstream.services.fine_tuning.fine_tunings.MAX_RETRY_SECONDS", 0.01)
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training", best_version=4)
        directory = fine_tunings.store.directory("task")
        away = directory.rename(tmp_path / "away")
        with capture_logs() as lines:
            if end:
                coordinator.end(end)
            else:  # the caller is told, and the fine-tuning ends all the same
                with pytest.raises(GradstreamError, match="the record of 'task' cannot be written"):
                    await fine_tunings.cancel("task")
            async with asyncio.timeout(20):
                async for record in fine_tunings.follow("task"):
                    shown = fine_tunings.shown(record)
                    if "cannot be written" in shown.reason:
                        break
            assert (record.state, shown.state) == ("training", "training")
            assert re.search(r"No such file.*\); free space .*; retrying since \d\d:\d\d:\d\d", shown.reason)
            assert len([line for line in lines if "cannot be written" in line["event"]]) == 1
        away.rename(directory)
        record = await until(fine_tunings, state)
        assert fine_tunings.shown(record) == record


async def test_cancelled_though_nobody_knows_whether_it_was_submitted(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    job = coordinator.add(RECIPE)
    note(tmp_path, state="failed")
    async with service(coordinator, tmp_path) as fine_tunings:
        # As it is between the note of the recipe and that of the job.
        fine_tunings.store.save(fine_tunings.find("task").changed(state="preparing"))
        record = await fine_tunings.cancel("task")
    assert record.job_id == job.job_id
    assert job.state == jobs_pb2.JOB_STATE_STOPPED


@pytest.mark.parametrize(
    ("job_state", "state", "reason"),
    [("FAILED", "failed", "job task-1 failed"), ("STOPPED", "cancelled", "job task-1")],
)
async def test_the_jobs_end_is_its_own(job_state: str, state: str, reason: str, tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training")
        coordinator.end(job_state)
        assert reason in (await until(fine_tunings, state)).reason


async def test_a_repeated_request_to_create_is_the_same_fine_tuning(tmp_path: Path) -> None:
    """Also for the next service; a name that another request has taken is refused."""
    async with service(CannedCoordinator(), tmp_path) as fine_tunings:
        first = await fine_tunings.create(ASKED, "one")
        assert (await fine_tunings.create(ASKED, "one")).created_unix_ms == first.created_unix_ms
        await until(fine_tunings, "failed")
    async with service(CannedCoordinator(), tmp_path) as fine_tunings:
        again = await fine_tunings.create(ASKED, "one")
        assert (again.state, again.created_unix_ms) == ("failed", first.created_unix_ms)
        other = ASKED.model_copy(update={"seed": 9})
        with pytest.raises(ConfigError, match="request id one is that of 'task', which has another recipe"):
            await fine_tunings.create(other, "one")
        named_otherwise = ASKED.model_copy(update={"name": "other"})
        with pytest.raises(ConfigError, match="request id one is that of 'task', which has another recipe"):
            await fine_tunings.create(named_otherwise, "one")
        at_once = [fine_tunings.create(recipe, "three") for recipe in (named_otherwise, other)]
        found = await asyncio.gather(*at_once, return_exceptions=True)
        assert [isinstance(each, ConfigError) for each in found] == [False, True]
        # It has made nothing, so a new request may have its name.
        assert (await fine_tunings.create(other, "two")).created_unix_ms > first.created_unix_ms


async def test_the_job_of_a_fine_tuning_is_submitted_under_one_id(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    coordinator.lose_answers = 1
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training")
    assert len(set(coordinator.request_ids)) == 1
    assert len(coordinator.request_ids[0]) == 64


async def test_a_name_is_taken_once_there_was_a_job(tmp_path: Path) -> None:
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    asked = ASKED.model_copy(update={"data": ASKED.data.model_copy(update={"path": str(data)})})
    note(tmp_path / "state", state="cancelled", job_id="task-1")
    async with service(CannedCoordinator(), tmp_path / "state") as fine_tunings:
        with pytest.raises(ConfigError, match="'task' already, which is cancelled; choose another name, or go on"):
            await fine_tunings.create(asked)
        with pytest.raises(CheckpointError, match=r"task is cancelled and has no checkpoint .*; go on with it: "):
            fine_tunings.checkpoint("task")
        # One whose job was refused gives way, and so does one that failed before: its base is not there.
        fine_tunings.store.save(fine_tunings.find("task").changed(state="failed", job_id=""))
        for _ in range(2):
            await fine_tunings.create(asked)
            record = await until(fine_tunings, "failed")
            assert "/models/tiny" in record.reason
        with pytest.raises(ConfigError, match="there is no fine-tuning 'tusk'; did you mean 'task'"):
            await fine_tunings.pause("tusk")
        with pytest.raises(ConfigError, match="task is failed; it can be paused only while its job trains"):
            await fine_tunings.pause("task")


async def test_a_coordinator_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """The record says for whom it waits, and since when; jobs that trained are not forgotten."""
    note(tmp_path)
    store, jobs, serving = Store(tmp_path), CoordinatorJobs("127.0.0.1:9"), Serving("cpu", 1 << 30)
    fine_tunings = FineTunings(store, jobs, serving)
    fine_tunings.start()
    try:
        async with asyncio.timeout(20):
            async for record in fine_tunings.follow("task"):
                if "does not answer" in record.reason:
                    break
        assert record.state == "preparing"
        assert record.reason.startswith("waits for coordinator 127.0.0.1:9, which does not answer, since ")
    finally:
        await fine_tunings.close()
        await serving.close()
        await jobs.close()
        store.close()


async def test_a_result_is_held_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was removed since it was the best makes way for the better one; one that was asked for is an error."""
    coordinator = CannedCoordinator()
    note(tmp_path)
    async with service(coordinator, tmp_path) as fine_tunings:
        await until(fine_tunings, "training", best_version=4)
        async with fine_tunings.held_checkpoint("task") as chosen:
            assert chosen == (4, "/runs/4")
            assert coordinator.held == [4]
        coordinator.checkpoints = coordinator.checkpoints[1:]
        monkeypatch.setattr("gradstream.services.fine_tuning.fine_tunings.CHOICE_SECONDS", 0.01)
        with pytest.raises(CheckpointError, match="no checkpoint of version 4"):
            async with fine_tunings.held_checkpoint("task", 4):
                pass

        def better(name: str, version: int | None = None) -> tuple[int, str]:
            monkeypatch.undo()
            return 4, "/runs/4"

        fine_tunings._note("task", checkpoints={4: "/runs/4", 8: "/runs/8"}, losses={4: 1.5, 8: 1.0}, best_version=8)
        monkeypatch.setattr(fine_tunings, "checkpoint", better)
        async with fine_tunings.held_checkpoint("task") as chosen:
            assert chosen == (8, "/runs/8")
        # A coordinator that does not know the job removes nothing of it.
        coordinator.jobs.clear()
        async with fine_tunings.held_checkpoint("task") as chosen:
            assert chosen == (8, "/runs/8")
        coordinator.end()
