"""A server that is gone, and servers that are too small: the cluster says who, since when, how much is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Event


def status(cluster: Cluster, *arguments: str) -> str:
    """`gradstream status` as a user would call it."""
    environment = {**os.environ, "GRADSTREAM_COORDINATOR": cluster.address, "COLUMNS": "300"}
    environment.pop("GRADSTREAM_DEBUG", None)
    command = [sys.executable, "-m", "gradstream.coordinator.cli", "status", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.timeout(240)
def test_gone_server_and_small_server(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", training={"num_steps": 40}, validation={"interval_steps": 0})
    job_id = cluster.client.submit(recipe).job_id
    cluster.wait_for(job_id, lambda job: job.version >= 3, "make 3 steps")

    # 1. The server dies. While it may come back, the job waits for it, by name.
    killed = datetime.now(UTC)
    cluster.kill("server-0")
    waiting = cluster.wait_for(job_id, lambda job: bool(job.waits), "wait for its server")
    wait = waiting.waits[0]
    assert (wait.what, wait.whom) == ("parameter server server-0 to come back", "server-0")
    assert wait.since is not None
    assert abs((wait.since - killed).total_seconds()) < 5

    # 2. It is given up: the job says why it plans anew, what for it waits and since when, and who was last heard when.
    planning = cluster.wait_for(job_id, lambda job: job.state == "planning", "give the server up")
    assert planning.reason == "parameter server server-0 is lost; going back to the last checkpoint"
    text = status(cluster)
    assert re.search(r"^server-0 .* no, last heard \d\d:\d\d:\d\d", text, re.MULTILINE), text
    assert re.search(r"^state +planning: parameter server server-0 is lost", text, re.MULTILINE), text
    assert re.search(
        r"1 parameter server, none is live, from a parameter server to register, since \d\d:\d\d:\d\d \(\d+ s\)", text
    ), text

    # 3. One comes back, too small for the model: how much is missing, and what to do.
    cluster.start_servers("server-0", memory="1MiB")
    failed = cluster.wait_job(job_id)
    assert failed.state == "failed"
    found = re.fullmatch(
        r"parameter server server-0 needs (\d\.\d) MiB for its share of [\d,]+ parameters but offers 1\.0 MiB "
        r"\((\d+\.\d) KiB missing\); start another server like it, give it more memory, or train a smaller model or "
        r"use optimizer\.kind=sgd; then `gradstream resume`",
        failed.reason,
    )
    assert found, failed.reason
    assert float(found[1]) * 1024 - 1024 == pytest.approx(float(found[2]), abs=52)  # 0.05 MiB of rounding
    failures = [item for item in cluster.client.watch(job_id, follow=False) if isinstance(item, Event)]
    assert failures[-1].kind == "failure"
    assert failures[-1].message == f"failed: {failed.reason}"

    # 4. Done as told, it goes on.
    cluster.start_servers("server-1", memory="1MiB")
    cluster.client.resume(job_id)
    finished = cluster.finish(job_id)
    assert (finished.epoch, finished.version) == (2, 40)
