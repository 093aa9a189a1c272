"""Wrong recipes, data and options: one clear line with cause and remedy, a documented exit code, nothing left behind.

All tests of this module share one cluster. Its worker spoils the gradients of steps 4, 8 and 9, so jobs that must not
have a spoiled step are shorter.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import yaml
from support.cluster import Cluster, running
from support.tiny import LLAMA, tiny_recipe

from gradstream.client import Client, Event, Job, Step, UnreachableError
from gradstream.core import __version__
from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.errors import ConfigError
from gradstream.core.node.session import NodeIdentity, NodeSession, SessionSettings
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.wire.frames import frames
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from gradstream.proto.v1 import parameter_server_pb2 as pb

pytestmark = pytest.mark.timeout(180)

COMMAND = [sys.executable, "-m", "gradstream.coordinator.cli"]
SPOILED_STEPS = [4, 8, 9]
# As `gradstream --help` lists them.
CONFIG, DATA, CHECKPOINT, UNREACHABLE, JOB_FAILED = 2, 3, 4, 7, 8


# ---- The cluster and the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator, two small servers, one worker."""
    with running(tmp_path_factory.mktemp("bad-input")) as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0", "server-1", memory="8MiB")
        cluster.start_workers("worker-0", faults=";".join(f"nan@step={step}" for step in SPOILED_STEPS))
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The module's cluster; jobs that a test leaves running are stopped."""
    yield shared_cluster
    for job in shared_cluster.client.jobs():
        if not job.state.ended:
            shared_cluster.client.stop(job.job_id, now=True)


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def gradstream(*arguments: str | Path, address: str = "127.0.0.1:9") -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, against the coordinator at `address`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADSTREAM_")}
    environment |= {"GRADSTREAM_COORDINATOR": address, "COLUMNS": "300"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def refused(exit_code: int, *arguments: str | Path, address: str = "127.0.0.1:9") -> str:
    """Run a command that must fail with this exit code, one line on stderr and nothing on stdout; return the line."""
    result = gradstream(*arguments, address=address)
    assert (result.returncode, result.stdout) == (exit_code, ""), result
    return error_line(result.stderr, alone=True)


def error_line(stderr: str, alone: bool = False) -> str:
    """The one error line on stderr, which is the last; when `alone` there is nothing beside it."""
    lines = stderr.splitlines()
    assert "Traceback" not in stderr, stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], stderr
    assert len(lines) == 1 or not alone, stderr
    return lines[-1]


def assert_says(line: str, *parts: str) -> None:
    """Each part is in the line."""
    for part in parts:
        assert part in line, line


def job_ids(cluster: Cluster) -> list[str]:
    return [job.job_id for job in cluster.client.jobs()]


def write_recipe(directory: Path, recipe: Recipe, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A recipe as a file, changed by `change`, which may make it wrong."""
    tree = recipe.model_dump(mode="json")
    if change is not None:
        change(tree)
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# ---- Recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rat=0.1", ["unknown key 'optimizer.learning_rat'; did you mean 'learning_rate'?"]),
        (
            "training.sequence_length=65",
            ["training.sequence_length 65 is longer than the model's 64 positions", "lower it", "max_position_embed"],
        ),
        (
            "training.num_slots=3",
            ["global_batch 8 is not divisible by num_slots 3; use 6 or another number of slots"],
        ),
        ("optimizer.learning_rate=.nan", ["'optimizer.learning_rate'", "finite"]),
        ("num_steps", ["override 'num_steps' is not of the form key.sub=value"]),
    ],
)
def test_wrong_recipe(override: str, parts: list[str], cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tiny_data, tmp_path / "runs"))
    before = job_ids(cluster)
    line = refused(CONFIG, "submit", recipe, "-s", override, address=cluster.address)
    assert_says(line, *parts)
    assert job_ids(cluster) == before
    assert not (tmp_path / "runs").exists()


def test_unknown_key_in_the_file(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_recipe(tiny_data, tmp_path / "runs"), lambda tree: tree["training"].update(num_stesp=7)
    )
    # Wrong before anybody is asked: also where no coordinator is.
    for command in (["submit"], ["dev"]):
        line = refused(CONFIG, *command, recipe)
        assert_says(line, str(recipe), "unknown key 'training.num_stesp'; did you mean 'num_steps'?")
    assert not (tmp_path / "runs").exists()


def test_recipe_that_is_not_there_or_no_yaml(tmp_path: Path) -> None:
    assert_says(refused(CONFIG, "submit", "stdlib-gpd"), "no such recipe", "did you mean 'stdlib-gpt'?")
    broken = tmp_path / "recipe.yaml"
    broken.write_text("model: [1, 2\n")
    assert_says(refused(CONFIG, "submit", broken), str(broken), "not YAML", "line")


def test_wrong_recipe_past_the_command_line(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Another program may send what the command line would not: the coordinator checks it again."""
    good = tiny_recipe(tiny_data, tmp_path / "runs").model_dump(mode="json")
    wrong = [
        (json.dumps({**good, "sede": 1}), "unknown key 'sede'; did you mean 'seed'?"),
        (json.dumps({**good, "training": {**good["training"], "sequence_length": 65}}), "the model's 64 positions"),
        (json.dumps({**good, "training": {**good["training"], "num_slots": 3}}), "not divisible by num_slots 3"),
        (json.dumps({**good, "name": "../../etc"}), "'name'"),
        (json.dumps([good]), "recipe"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ]
    before = job_ids(cluster)
    with grpc.insecure_channel(cluster.address) as channel:
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        for text, part in wrong:
            with pytest.raises(grpc.RpcError) as caught:
                stub.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=text), timeout=20)
            details = caught.value.details()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, details
            assert_says(details, part)
            assert "\n" not in details
    assert job_ids(cluster) == before
    assert not (tmp_path / "runs").exists()


def test_run_root_that_is_a_file(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a directory")
    recipe = write_recipe(tmp_path, tiny_recipe(tiny_data, tmp_path / "runs"))
    before = job_ids(cluster)
    line = refused(CONFIG, "submit", recipe, address=cluster.address)
    assert_says(line, f"run_root {tmp_path / 'runs'} cannot be written", "choose another")
    assert job_ids(cluster) == before


def test_unknown_job(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", name="mistyped", training={"num_steps": 1}))
    wrong = job.job_id.replace("typed", "tpyed")
    for command in (["status"], ["resume"]):
        line = refused(CONFIG, *command, wrong, address=cluster.address)
        assert_says(line, f"there is no job '{wrong}'; did you mean '{job.job_id}'?")
    line = refused(CONFIG, "stop", "something-else", address=cluster.address)
    assert_says(line, "there is no job 'something-else'", "`gradstream ls` lists them")
    line = refused(CONFIG, "ckpt", "export", wrong, tmp_path / "export", address=cluster.address)
    assert_says(line, f"did you mean '{job.job_id}'?")
    assert not list(tmp_path.glob("*export*"))


# ---- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["model.config.vocab_size=319"],
            [
                "vocabulary mismatch: the data set ",
                "has 320 tokens, the model's vocab_size is 319",
                "set model.config.vocab_size=320 or prepare the data with a smaller vocabulary",
            ],
        ),
        (
            ["training.sequence_length=60000", "model.config.max_position_embeddings=60000"],
            ["0 train samples of 60000 tokens, too few for 4 slots", "lower training.sequence_length"],
        ),
        (["data.path=nowhere"], ["there is no data set in ", "/nowhere; make it with `gradstream data prepare"]),
    ],
)
def test_data_that_does_not_fit(
    overrides: list[str], parts: list[str], cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tiny_data, tmp_path / "runs"))
    before = job_ids(cluster)
    options = [word for override in overrides for word in ("-s", override)]
    line = refused(DATA, "submit", recipe, *options, address=cluster.address)
    assert_says(line, *parts)
    assert job_ids(cluster) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda text: text[: len(text) // 2], "is not a valid data manifest"),
        (lambda text: text.replace(b'"train-00000.tokens"', b'"../../etc/passwd"'), "shards.0.file"),
    ],
)
def test_damaged_data_manifest(
    damage: Callable[[bytes], bytes], part: str, cluster: Cluster, own_data: Path, tmp_path: Path
) -> None:
    manifest = own_data / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(damage(whole))
    assert manifest.read_bytes() != whole
    recipe = write_recipe(tmp_path, tiny_recipe(own_data, tmp_path / "runs"))
    before = job_ids(cluster)
    line = refused(DATA, "submit", recipe, address=cluster.address)
    assert_says(line, str(manifest), part, "prepare the data again")
    assert job_ids(cluster) == before
    assert not (tmp_path / "runs").exists()


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (Path.unlink, ["data shard ", "train-00001.tokens cannot be read", "No such file", "restore it or prepare"]),
        (
            flip_byte,
            ["data shard train-00001.tokens is corrupt: sha256 ", "the manifest's", "again or restore the file"],
        ),
    ],
    ids=["missing", "flipped"],
)
def test_damaged_data_shard(
    damage: Callable[[Path], object], parts: list[str], cluster: Cluster, own_data: Path, tmp_path: Path
) -> None:
    shard = own_data / "train-00001.tokens"
    whole = shard.read_bytes()
    damage(shard)
    recipe = write_recipe(tmp_path, tiny_recipe(own_data, tmp_path / "runs", name="shard", training={"num_steps": 3}))
    # The job fails with the reason; who waits for it is told, with a code of its own.
    result = gradstream("submit", "--watch", recipe, address=cluster.address)
    job_id = result.stdout.strip()
    assert result.returncode == JOB_FAILED, result
    assert_says(error_line(result.stderr), f"error: job {job_id} failed at step 0 of 3: worker worker-0: ", *parts)
    job = cluster.client.job(job_id)
    assert job.state == "failed"
    assert_says(job.reason, *parts)
    assert "AioRpcError" not in job.reason
    assert cluster.client.checkpoints(job_id) == []
    # The cure works.
    shard.write_bytes(whole)
    assert gradstream("resume", job_id, address=cluster.address).returncode == 0
    finished = cluster.finish(job_id)
    assert (finished.epoch, finished.num_samples) == (2, 3 * 8)


def test_inspect_finds_the_damaged_file(own_data: Path) -> None:
    flip_byte(own_data / "validation-00003.tokens")
    line = refused(DATA, "data", "inspect", own_data, "--verify")
    assert_says(line, f"{own_data / 'validation-00003.tokens'} is corrupt: sha256 ", "restore the file")
    assert_says(refused(DATA, "data", "inspect", own_data / "no"), "holds no data set", "`gradstream data prepare`")


def test_prepare_leaves_no_half_data_set(tmp_path: Path) -> None:
    line = refused(CONFIG, "data", "prepare", tmp_path / "no-such-source", "--out", tmp_path / "out")
    assert_says(line, f"source '{tmp_path / 'no-such-source'}' matches no file; correct the path or remove it")
    assert not list(tmp_path.iterdir())


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def stopped_job(cluster: Cluster, data: Path, runs: Path, name: str) -> Job:
    """A job that was stopped with at least three checkpoints."""
    recipe = tiny_recipe(
        data, runs, name=name, training={"num_steps": 1000}, validation={"interval_steps": 0}, checkpoint={"keep": 50}
    )
    job = cluster.client.submit(recipe)
    cluster.wait_for(job.job_id, lambda job: job.version >= 5, "make 5 steps")
    cluster.client.stop(job.job_id)
    stopped = cluster.wait_job(job.job_id)
    assert stopped.state == "stopped", stopped.reason
    return stopped


@pytest.mark.parametrize(
    ("file", "damage", "part"),
    [
        ("*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated: "),
        ("*.safetensors", flip_byte, "is damaged: its sha256 is not the manifest's"),
        ("*.safetensors", Path.unlink, "cannot be read"),
        ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    ],
    ids=["truncated", "flipped", "missing", "manifest"],
)
def test_damaged_checkpoint(
    file: str, damage: Callable[[Path], object], part: str, cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    job_id = stopped_job(cluster, tiny_data, tmp_path / "runs", "damaged").job_id
    *_, older, newest = cluster.client.checkpoints(job_id)
    path = next(Path(newest.path).glob(file))
    damage(path)
    # 1. It is not loaded, and the job does not silently lose steps by taking an older one.
    assert gradstream("resume", job_id, address=cluster.address).returncode == 0
    failed = cluster.wait_job(job_id)
    assert failed.state == "failed"
    assert_says(failed.reason, str(path), part, f"remove {newest.path} to go back to an older", "estore")
    # 2. It is not exported, and half of it neither.
    line = refused(
        CHECKPOINT,
        *["ckpt", "export", job_id, tmp_path / "export", "--version", str(newest.version)],
        address=cluster.address,
    )
    assert_says(line, str(path), part, f"remove {newest.path}")
    assert not list(tmp_path.glob("*export*"))
    # 3. The cure works.
    shutil.rmtree(newest.path)
    cluster.client.resume(job_id)
    goes_on = cluster.wait_for(
        job_id,
        lambda job: job.epoch > failed.epoch and job.version > older.version,
        "go on from the older checkpoint",
    )
    assert f"start: from the checkpoint of version {older.version}" in goes_on.decisions


def test_export_that_cannot_be(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    job_id = stopped_job(cluster, tiny_data, tmp_path / "runs", "export").job_id
    versions = [checkpoint.version for checkpoint in cluster.client.checkpoints(job_id)]
    command = ["ckpt", "export", job_id]
    line = refused(CHECKPOINT, *command, tmp_path / "new", "--version", "9999", address=cluster.address)
    assert_says(
        line, f"job {job_id} has no checkpoint of version 9999; it has versions {', '.join(map(str, versions))}"
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    line = refused(CONFIG, *command, full, address=cluster.address)
    assert_says(line, f"{full} is not empty; export to a new directory or empty it first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "runs"]
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]


# ---- Gradients that are not finite -----------------------------------------------------------------------------------


def test_spoiled_step_is_skipped_and_counted(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    job_id = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training={"num_steps": 6})).job_id
    finished = cluster.finish(job_id)
    assert (finished.version, finished.num_skipped, finished.num_samples) == (6, 1, 6 * 8)
    history = list(cluster.client.watch(job_id, follow=False))
    steps = [item for item in history if isinstance(item, Step)]
    assert [(step.step, step.skipped) for step in steps] == [(step, step == 4) for step in range(6)]
    assert all(math.isfinite(step.loss) for step in steps)
    notes = [item.message for item in history if isinstance(item, Event) and item.kind == "skip"]
    assert notes == ["step 4 was skipped, loss or gradient was not finite (1 in a row)"]
    reader = CheckpointReader(cluster.client.checkpoints(job_id)[-1].path)
    for entry in reader.manifest.tensors:
        assert np.isfinite(reader.read(WEIGHT, entry.name, 0, entry.tensor().num_elements)).all(), entry.name
    assert reader.manifest.progress["num_skipped"] == 1


def test_too_many_spoiled_steps_in_a_row(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    training = {"num_steps": 12, "max_consecutive_skips": 2}
    recipe = write_recipe(tmp_path, tiny_recipe(tiny_data, tmp_path / "runs", training=training))
    result = gradstream("submit", "--watch", recipe, address=cluster.address)
    assert result.returncode == JOB_FAILED, result
    line = error_line(result.stderr)
    assert_says(line, "2 steps in a row up to step 9 had a loss or gradient that was not finite")
    assert_says(line, "lower optimizer.learning_rate (now 0.003)", "schedule.warmup_steps", "check the data")
    job = cluster.client.job(result.stdout.strip())
    assert (job.state, job.num_skipped) == ("failed", 3)


# ---- Old plans, old versions -----------------------------------------------------------------------------------------


def test_push_under_a_replaced_epoch(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    job_id = stopped_job(cluster, tiny_data, tmp_path / "runs", "epochs").job_id
    cluster.client.resume(job_id)
    cluster.wait_for(job_id, lambda job: job.state == "running" and job.epoch == 2, "run under epoch 2")
    cluster.client.pause(job_id)
    version = cluster.wait_for(job_id, lambda job: job.state == "paused", "pause").version
    server = next(node for node in cluster.client.nodes() if node.name == "server-0")

    async def push(epoch: int) -> tuple[grpc.StatusCode, str, pb.GetServerStatusResponse]:
        header = pb.ContributionHeader(job_id=job_id, epoch=epoch, step=version, payload_bytes=4, fragment_bytes=[4])
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = ParameterServerStub(channel)
            call = stub.Push(iter(list(frames(header, [np.zeros(4, dtype=np.uint8)]))))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            status = await stub.GetServerStatus(pb.GetServerStatusRequest(job_id=job_id))
            return caught.value.code(), caught.value.details() or "", status

    for epoch in (1, 0, 3):
        code, details, status = asyncio.run(push(epoch))
        assert code is grpc.StatusCode.FAILED_PRECONDITION, details
        assert_says(details, f"plan {job_id} epoch {epoch} is not in force here: this server is at {job_id} epoch 2")
        assert_says(details, "take up the plan that the coordinator sends")
        assert (status.epoch, status.version) == (2, version)
    cluster.client.resume(job_id)
    cluster.wait_for(job_id, lambda job: job.version > version, "go on as if nothing had been")


def test_node_of_another_version(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {node.node_id for node in cluster.client.nodes()}
    request = coordinator_pb2.RegisterRequest(
        kind=coordinator_pb2.NODE_KIND_WORKER, name="old", version="0.0.0", incarnation="1"
    )
    with grpc.insecure_channel(cluster.address) as channel, pytest.raises(grpc.RpcError) as caught:
        coordinator_pb2_grpc.CoordinatorServiceStub(channel).Register(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = f"node old runs gradstream 0.0.0, the coordinator {__version__}; install the same version on both"
    assert caught.value.details() == expected
    # The node itself ends with that line; it does not knock for ever.
    monkeypatch.setattr("gradstream.core.node.session.__version__", "0.0.0")
    identity = NodeIdentity(coordinator_pb2.NODE_KIND_WORKER, "old", "127.0.0.1:1", 0, "cpu")

    async def register() -> None:
        async def ignore(_: coordinator_pb2.SessionResponse) -> None: ...

        await NodeSession(SessionSettings(cluster.address), identity, coordinator_pb2.Activity, list, ignore).run()

    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$") as refusal:
        asyncio.run(register())
    assert refusal.value.exit_code == CONFIG
    assert {node.node_id for node in cluster.client.nodes()} == before


# ---- Ports, addresses, directories -----------------------------------------------------------------------------------


def test_port_in_use(cluster: Cluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    for role in (["coordinator", "--state", tmp_path / "state"], ["parameter-server", "--coordinator", "127.0.0.1:9"]):
        line = refused(CONFIG, "serve", *role, "--listen", cluster.address, "--ready-file", ready)
        assert_says(line, f"cannot listen on {cluster.address}: the port is in use", "stop the process", "port 0 takes")
        assert not ready.exists()
    # The one that was there notices nothing.
    assert cluster.client.nodes()


def test_second_coordinator_on_a_state_directory(cluster: Cluster) -> None:
    state = cluster.directory / "state"
    line = refused(CONFIG, "serve", "coordinator", "--listen", "127.0.0.1:0", "--state", state)
    first = cluster.processes["coordinator"].pid
    assert_says(line, f"another coordinator (process {first}) holds the state directory {state}")
    assert_says(line, "stop it or choose another")
    assert cluster.client.nodes()


def test_coordinator_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for command in (["status"], ["ckpt", "export", "tiny-1", tmp_path / "export"]):
            line = refused(UNREACHABLE, *command, address=address)
            assert_says(line, f"coordinator {address} does not answer (Connection refused)")
            assert_says(line, "start it with `gradstream serve coordinator`", "GRADSTREAM_COORDINATOR, --coordinator")
        assert not list(tmp_path.iterdir())
        # A program that goes on asking is told since when.
        with Client(address) as client:
            with pytest.raises(UnreachableError, match=re.escape(f"coordinator {address} does not answer (")):
                client.nodes()
            with pytest.raises(UnreachableError, match=rf"{address} does not answer since \d\d:\d\d:\d\d \("):
                client.nodes()


# ---- Servers ---------------------------------------------------------------------------------------------------------


def test_model_that_does_not_fit(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    large = {"config": {**LLAMA, "hidden_size": 256, "intermediate_size": 1024}}
    recipe = write_recipe(tmp_path, tiny_recipe(tiny_data, tmp_path / "runs", name="large", model=large))
    result = gradstream("submit", "--watch", recipe, address=cluster.address)
    assert result.returncode == JOB_FAILED, result
    found = re.fullmatch(
        r"error: job large-1 failed at step 0 of 6: parameter server server-[01] needs (\d+\.\d) MiB for its share of "
        r"2,[\d,]+ parameters but offers 8\.0 MiB \((\d+\.\d) MiB missing\); start at least (\d+) more servers like "
        r"it, or give it more memory, then `gradstream resume`; or submit a smaller model or optimizer\.kind=sgd",
        error_line(result.stderr),
    )
    assert found, result.stderr
    need, missing, more = float(found[1]), float(found[2]), int(found[3])
    assert missing == pytest.approx(need - 8, abs=0.11)  # two rounded numbers
    assert (2 + more) * 8 >= 2 * need - 1 > (1 + more) * 8 - 2
    assert cluster.client.checkpoints("large-1") == []


def test_server_that_is_gone(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    needs_two = {"min_servers": 2, "fragment_bytes": 4096}
    sections: dict[str, Any] = {"training": {"num_steps": 200}, "validation": {"interval_steps": 0}}
    job_id = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", cluster=needs_two, **sections)).job_id
    cluster.wait_for(job_id, lambda job: job.version >= 3, "make 3 steps")

    # 1. It dies. While it may come back with its state, the job waits for it, by name.
    killed = datetime.now(UTC)
    cluster.kill("server-1")
    wait = cluster.wait_for(job_id, lambda job: bool(job.waits), "wait for its server").waits[0]
    what = "parameter server server-1 to come back (silent; the job waits for its state, 30 s at most)"
    assert (wait.what, wait.whom) == (what, "server-1")
    assert wait.since is not None
    assert abs((wait.since - killed).total_seconds()) < 5

    # 2. It is given up: what was lost, what the job waits for now and since when, and when it was last heard.
    planning = cluster.wait_for(job_id, lambda job: job.state == "planning", "give the server up")
    lost = "parameter server server-1 is lost: its machine refuses connections to it"
    assert planning.reason == f"{lost}; going back to the last checkpoint"
    shown = gradstream("status", address=cluster.address)
    assert (shown.returncode, shown.stderr) == (0, ""), shown
    for pattern in (
        r"^server-1 .* no, last heard \d\d:\d\d:\d\d",
        r"^state +planning: parameter server server-1 is lost",
        r"2 parameter servers, 1 is live, from a parameter server to register, since \d\d:\d\d:\d\d( \(\d+ s\))?$",
    ):
        assert re.search(pattern, shown.stdout, re.MULTILINE), shown.stdout

    # 3. The cure works.
    cluster.start_servers("server-1", memory="8MiB")
    cluster.wait_for(job_id, lambda job: job.epoch == 2 and job.version > planning.version, "go on")
