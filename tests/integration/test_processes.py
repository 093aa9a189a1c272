"""`serve parameter-server --processes`: its servers work like any others, and end with their command."""

from __future__ import annotations

from pathlib import Path

import psutil
from support.cluster import Cluster, wait_until
from support.tiny import tiny_recipe


def test_same_bits_as_one_server_and_no_orphans(tiny_data: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_workers("worker-0")
    digests = []
    for count in (2, 1):
        if count == 2:
            addresses = cluster.start_server_processes("big", 2, memory="1GiB")
            assert len(set(addresses)) == 2
        else:
            cluster.start_servers("server-0")
        recipe = tiny_recipe(tiny_data, tmp_path / "runs", cluster={"min_servers": count})
        job_id = cluster.client.submit(recipe).job_id
        cluster.finish(job_id)
        digests.append(cluster.final_digest(job_id))
        servers = [node for node in cluster.client.nodes() if node.kind == "parameter-server" and node.alive]
        if count == 2:
            assert [(node.name, node.memory_bytes) for node in servers] == [("big-0", 1 << 29), ("big-1", 1 << 29)]
            assert sorted(node.address for node in servers) == sorted(addresses)
            last = max((tmp_path / "runs" / job_id / "checkpoints").iterdir())
            halves = [path.stat().st_size for path in last.glob("*.safetensors")]
            assert len(halves) == 2
            assert max(halves) < 2 * min(halves)
            cluster.terminate("big")
            wait_until(lambda: not any(n.alive for n in cluster.client.nodes() if n.kind == "parameter-server"), "", 10)
        else:
            assert [node.name for node in servers] == ["server-0"]
    assert digests[0] == digests[1]


def test_servers_die_with_their_command(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_server_processes("big", 2)
    children = psutil.Process(cluster.processes["big"].pid).children()
    assert len(children) == 2
    cluster.kill("big")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    # One of them dies: the command says so and ends the other.
    cluster.start_server_processes("big", 2)
    children = psutil.Process(cluster.processes["big"].pid).children()
    victim = next(child for child in children if "big-1" in child.cmdline())
    victim.kill()
    assert cluster.wait_dead("big") == 1
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    [line] = [line for line in cluster.log("big").splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: big-1 (process {victim.pid}) ended with signal SIGKILL")
