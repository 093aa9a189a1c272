"""End-to-end test of training on Ray: `make test-ray`.

It starts a local Ray cluster of four nodes, each with a raylet of its own, and trains with deploy/ray/launch.py:
undisturbed; then with a worker's actor killed, the coordinator's actor killed, the node of a parameter server lost, and
the driver ended and started again. Both must end with the bits of an undisturbed `gradstream dev`.

The test is not part of `pytest`, because Ray is not among the project's requirements. It takes five minutes on two
cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, CannotRunError, Steps, last_digest, prepare_and_train, run, run_test, say, wait_until

RECIPE = ROOT / "deploy" / "test-recipe.yaml"
LAUNCH = ROOT / "deploy" / "ray" / "launch.py"
NUM_NODES = 4
JOB_SECONDS = 600.0
OBJECT_STORE_BYTES = 80 << 20
SLOW = {"GRADSTREAM_FAULTS": "slow@milliseconds=150"}
"""Makes each slot take a worker so much longer, so that there is a middle of the run."""


class Launch:
    """A run of launch.py with one directory, and what can be seen of its actors and its job."""

    def __init__(self, ray_cluster: Any, directory: Path, name: str, environment: dict[str, str]):
        self.ray_cluster = ray_cluster
        self.root = directory
        self.directory = directory / "ray" / name
        self.environment = {**os.environ, **environment, "NO_COLOR": "1"}
        self.log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the driver. A second start goes on with the job."""
        command = [sys.executable, str(LAUNCH), str(RECIPE), "--address", self.ray_cluster.address]
        command += ["--directory", str(self.directory), "--servers", "2", "--workers", "2", "--strict-spread"]
        command += ["-s", f"run_root={self.root}/runs", "-s", f"data.path={self.root}/data"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def end(self, wanted: int, number: signal.Signals | None = None) -> None:
        """Wait until the driver has ended with this exit code, after a signal if one is given."""
        process = self._process
        assert process is not None
        if number is not None:
            process.send_signal(number)
        assert process.wait(JOB_SECONDS) == wanted, self.log.read_text()[-6000:]

    def kill(self) -> None:
        """End a driver that is left over."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def look(self, actor: str) -> dict[str, Any]:
        """What an actor says of itself; {} while Ray starts it again."""
        import ray

        try:
            handle = ray.get_actor(actor, namespace=f"gradstream-{self.directory.name}")
            return dict(ray.get(handle.look.remote(), timeout=5))
        except (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return {}

    def status(self) -> dict[str, Any]:
        """`gradstream status` by the address in the directory; {} while there is no answer."""
        environment = self.environment | {"GRADSTREAM_CREDENTIALS": str(self.directory / "credentials" / "admin")}
        try:
            address = (self.directory / "address").read_text().strip()
            command = [sys.executable, "-m", "gradstream.coordinator.cli", "status", "-c", address, "-o", "json"]
            return dict(json.loads(run(command, environment)))
        except (AssertionError, OSError):
            return {}

    def reach(self, steps: int, more: bool = False) -> int:
        """Wait until the job runs with 2 workers and `steps` are done, in all or `more`; return the version."""
        wanted = steps + (self.status()["job"]["version"] if more else 0)
        seen: dict[str, Any] = {}

        def there() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log.read_text()[-6000:]
            seen.clear()
            seen.update(self.status())
            job = seen.get("job")
            live = [node for node in seen.get("nodes", []) if node["kind"] == "worker" and node["alive"]]
            return bool(job and job["state"] == "running" and job["version"] >= wanted and len(live) == 2)

        wait_until(there, f"step {wanted}", JOB_SECONDS, lambda: f"{seen}\n{self.log.read_text()[-3000:]}")
        return int(seen["job"]["version"])

    def wait_for_restart(self, actor: str, pid: int) -> None:
        """Wait until an actor runs its role in another process than this one."""
        wait_until(
            lambda: self.look(actor).get("actor_pid", pid) != pid and self.look(actor).get("role_pid", 0) != 0,
            f"Ray to start {actor} again",
            120,
        )


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Yield a local Ray cluster of a head without CPUs and NUM_NODES nodes of 2 CPUs, with this process connected."""
    import ray
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(num_cpus=2, **common)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def node_of(cluster: Any, launch: Launch, actor: str) -> Any:
    """The node of the local cluster on which an actor is."""
    import ray
    from ray.util.state import get_actor

    handle = ray.get_actor(actor, namespace=f"gradstream-{launch.directory.name}")
    node_id = get_actor(handle._actor_id.hex()).node_id
    return next(node for node in cluster.list_all_nodes() if node.node_id == node_id)


def undisturbed(launch: Launch) -> None:
    """Train to the end."""
    launch.start()
    launch.end(0)
    assert (launch.directory / "export" / "model.safetensors").stat().st_size > 0
    assert not (launch.directory / "address").exists()


def disturbed(launch: Launch) -> None:
    """Kill a worker's and the coordinator's actor, lose a server's node, end the driver and start it again."""
    launch.start()
    launch.reach(10)
    # 1. A worker's actor: its process goes with it, and Ray starts it again.
    before = launch.look("worker-0")
    os.kill(before["actor_pid"], signal.SIGKILL)
    launch.wait_for_restart("worker-0", before["actor_pid"])
    wait_until(lambda: not Path(f"/proc/{before['role_pid']}").exists(), "the worker's process to end", 30)
    say(f"      worker-0 was started again; step {launch.reach(5, more=True)}")
    # 2. The process of a worker: its actor ends with it.
    before = launch.look("worker-1")
    os.kill(before["role_pid"], signal.SIGKILL)
    launch.wait_for_restart("worker-1", before["actor_pid"])
    say(f"      worker-1 was started again; step {launch.reach(5, more=True)}")
    # 3. The coordinator's actor: with its state and its address, so no node is started again.
    address, server = (launch.directory / "address").read_text(), launch.look("server-0")
    before = launch.look("coordinator")
    os.kill(before["actor_pid"], signal.SIGKILL)
    launch.wait_for_restart("coordinator", before["actor_pid"])
    say(f"      the coordinator was started again; step {launch.reach(5, more=True)}")
    assert (launch.directory / "address").read_text() == address
    assert launch.look("server-0") == server
    # 4. The node of a parameter server: Ray moves the bundles, the job goes back to its last checkpoint.
    before = launch.look("server-1")
    launch.ray_cluster.remove_node(node_of(launch.ray_cluster, launch, "server-1"), allow_graceful=False)
    launch.wait_for_restart("server-1", before["actor_pid"])
    say(f"      server-1 is on another node; step {launch.reach(1)}")
    launch.reach(5, more=True)
    # 5. The driver: SIGTERM stops the job with a checkpoint, and the same command goes on.
    launch.end(143, signal.SIGTERM)
    launch.start()
    launch.end(0)


def test(directory: Path, steps: Steps) -> None:
    """Run the whole test. Raises AssertionError when a check fails, CannotRunError when the test cannot run here."""
    # Ray reads these when it is imported. It reports its use to nobody, and leaves no file.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(directory)}
    try:
        import ray
    except ModuleNotFoundError:
        raise CannotRunError("Ray is not installed here; `make test-ray` installs it") from None
    with steps.step("dev: undisturbed"):
        wanted = prepare_and_train(RECIPE, directory)
        say(f"      {wanted}; Ray {ray.__version__}")
    with ray_cluster() as cluster:
        for title, name, scenario, environment in (
            ("on Ray: undisturbed, the same bits", "undisturbed", undisturbed, {}),
            ("on Ray: actors killed, a node lost, the driver ended: the same bits", "disturbed", disturbed, SLOW),
        ):
            launch = Launch(cluster, directory, name, environment)
            with steps.step(title):
                try:
                    scenario(launch)
                finally:
                    launch.kill()
                found = last_digest(directory / "runs" / (launch.directory / "job").read_text().strip())
                assert found == wanted, (found, wanted)


if __name__ == "__main__":
    sys.exit(run_test("ray", test))
