"""More slots than two on one worker: a cut stream and a new plan in mid-step change no bit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from support.cluster import Cluster, wait_until
from support.proxy import Proxy, free_port
from support.tiny import tiny_recipe

WAIT = "server-1 to acknowledge slot"


@pytest.mark.timeout(300)
def test_a_cut_stream_and_a_lost_server_in_mid_step(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """The worker waits with the encoded gradients of two of its four slots. What it has dropped by then is recomputed
    under the new plan, which goes on at the version that the step began from."""
    listen = f"127.0.0.1:{free_port()}"
    cluster.start_coordinator("heartbeat_seconds=0.1", "tick_seconds=0.05")
    with closing(Proxy(listen)) as to_server:
        cluster.start_servers("server-0")
        cluster.start_server_behind("server-1", cluster.address, listen, to_server.address)
        cluster.start_workers("worker-0", faults="slow@milliseconds=100")

        def submit(name: str) -> str:
            recipe = tiny_recipe(
                tiny_data,
                tmp_path / "runs",
                name=name,
                training={"num_steps": 24},
                validation={"interval_steps": 0},
                checkpoint={"interval_steps": 1, "keep": 20},
                cluster={"min_servers": 2},
            )
            return cluster.client.submit(recipe).job_id

        def wait_of_worker() -> str:
            (worker,) = (node for node in cluster.client.nodes() if node.name == "worker-0")
            return worker.activity.waiting_for

        def hold_back(job_id: str) -> int:
            """Hold server-1's bytes back in mid-step, until the worker says that it waits; return the version."""
            while WAIT not in wait_of_worker():
                to_server.heal()
                begun = cluster.client.job(job_id).version + 1
                cluster.wait_for(job_id, lambda job, begun=begun: job.version >= begun, "begin a step")  # type: ignore[misc]
                to_server.cut()
                # Either it waits with two slots, or it was done with all four: then once more. There are steps enough
                # for some rounds of this, also while other processes keep the cores busy.
                try:
                    wait_until(lambda: "server-1" in wait_of_worker(), "the worker to wait", 30)
                except AssertionError as error:
                    job = cluster.client.job(job_id)
                    raise AssertionError(
                        f"{error}; it waits for '{wait_of_worker()}', {job.state} {job.version}"
                    ) from None
            return cluster.client.job(job_id).version

        reference = submit("undisturbed")
        undisturbed = cluster.finish(reference)
        digest = cluster.final_digest(reference)

        job_id = submit("disturbed")
        version = hold_back(job_id)
        to_server.shut_out([cluster.processes["worker-0"].pid])
        to_server.heal()
        cluster.wait_for(job_id, lambda job: job.version > version, "go on after the cut")
        version = hold_back(job_id)
        cluster.kill("server-1")
        to_server.heal()
        cluster.start_server_behind("server-1", cluster.address, listen, to_server.address)
        finished = cluster.finish(job_id)
        assert finished.epoch == 2
        messages = [item.message for item in cluster.client.watch(job_id, follow=False) if hasattr(item, "message")]
        assert any(f"start: from the checkpoint of version {version}" in message for message in messages), messages
        assert cluster.final_digest(job_id) == digest
        assert (finished.num_tokens, finished.num_samples) == (undisturbed.num_tokens, undisturbed.num_samples)
