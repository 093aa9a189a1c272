"""Paths that people name: checked again when they are opened, and hanging storage delays no other call."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from coordinator_fakes import Cluster, make_recipe, report_checkpoint, report_validation, step_report

from gradstream.core.errors import ConfigError, DataError, UnreachableError
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


class Stranger:
    """A host of the submitter's choice: it takes connections and says nothing until `release`."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self._released = threading.Event()
        self.url = f"ftp://127.0.0.1:{self._listener.getsockname()[1]}/x"
        self.num_connections = 0
        self.full = threading.Semaphore(0)
        self._kept: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            if self.num_connections == 8:
                self.full.release()
            if self._released.is_set():
                connection.close()
            else:
                self._kept.append(connection)

    def release(self) -> None:
        """Hang up on everyone, from now on too."""
        self._released.set()
        while self._kept:
            self._kept.pop().close()

    def close(self) -> None:
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    host = Stranger()
    yield host
    host.close()


async def submit(cluster: Cluster, path: str) -> str:
    recipe = make_recipe(cluster.directory)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": path})})
    request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json())
    return (await cluster.jobs.SubmitJob(request, timeout=60)).job.job_id


async def fetched(cluster: Cluster, job_id: str, file: str) -> bytes:
    request = coordinator_pb2.FetchDataShardRequest(job_id=job_id, file=file)
    return b"".join([piece.payload async for piece in cluster.stub.FetchDataShard(request)])


async def test_no_request_has_the_coordinator_connect_to_a_host_of_the_submitters_choice(
    cluster: Cluster, stranger: Stranger
) -> None:
    for url in (stranger.url, f"simplecache::{stranger.url}", stranger.url.replace("ftp", "http")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await submit(cluster, url)
        error = error_from_rpc(caught.value, "coordinator")
        assert isinstance(error, ConfigError)
        assert "is a URL, and this service opens local paths alone" in str(error)
    assert stranger.num_connections == 0


async def test_storage_that_hangs_holds_up_nobody_else(
    cluster: Cluster, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await cluster.submit()
    (leader, _), (worker,) = await cluster.running(job_id)
    monkeypatch.setenv("GRADSTREAM_SCHEMES", "ftp")
    await cluster.coordinator.stop()
    await cluster.start()
    for node in (leader, worker):
        await node.reconnect(cluster.address)
    hung = [asyncio.create_task(submit(cluster, stranger.url)) for _ in range(40)]
    await asyncio.wait_for(asyncio.to_thread(stranger.full.acquire), 30)
    # What is read of other places, and what needs no storage, is answered meanwhile.
    begun = time.monotonic()
    assert list((await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))).checkpoints) == []
    assert len(await fetched(cluster, job_id, "tokenizer.json")) > 10
    assert (await cluster.job(job_id)).job_id == job_id
    assert await cluster.submit() == "tiny-2"
    assert time.monotonic() - begun < 5
    assert stranger.num_connections == 8, "the others wait for a thread of this place"
    stranger.release()
    errors = await asyncio.gather(*hung, return_exceptions=True)
    for error in errors:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert isinstance(error_from_rpc(error, "coordinator"), DataError | UnreachableError), str(error)


async def test_a_file_that_was_replaced_after_submission_goes_nowhere(
    tmp_path: Path, transformers_imported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into a checkpoint nor to a worker: where it lies, and what it holds, are not what was recorded."""
    allowed, secret = tmp_path / "allowed", tmp_path / "key.pem"
    allowed.mkdir()
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    monkeypatch.setenv("GRADSTREAM_PATHS", str(allowed))
    cluster = Cluster(allowed)
    await cluster.start()
    try:
        job_id = await cluster.submit()
        (leader, _), (worker,) = await cluster.running(job_id)
        await worker.slots(2)
        recorded = await fetched(cluster, job_id, "tokenizer.json")
        tokenizer = allowed / "data" / "tokenizer.json"
        for replace in (lambda: tokenizer.symlink_to(secret), lambda: tokenizer.write_text("another one")):
            tokenizer.unlink()
            replace()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fetched(cluster, job_id, "tokenizer.json")
            assert "which is not below" in str(caught.value) or "not the file that was recorded" in str(caught.value)
        for file in ("train-00000.tokens", "train-00000.index"):
            (allowed / "data" / file).unlink()
            (allowed / "data" / file).symlink_to(secret)
            with pytest.raises(grpc.aio.AioRpcError, match="which is not below"):
                await fetched(cluster, job_id, file)
        tokenizer.unlink()
        tokenizer.symlink_to(secret)
        await report_validation(worker, job_id, 0)
        for step in range(2):
            await cluster.stub.ReportStep(step_report(job_id, step))
        await report_checkpoint(leader, 2)
        await cluster.event(job_id, "which is not below")
        assert not [path for path in allowed.rglob("tokenizer.json") if "runs" in str(path)]
        # Put back, the checkpoint is made.
        tokenizer.unlink()
        tokenizer.write_bytes(recorded)
        await report_checkpoint(leader, 2)
    finally:
        await cluster.stop()
