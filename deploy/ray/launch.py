"""Train one recipe on a Ray cluster: coordinator, parameter servers and workers as actors in placement groups.

    python deploy/ray/launch.py RECIPE --directory DIR [--servers 2] [--workers 4] [-s KEY=VALUE]

All nodes must see DIR and the recipe's paths. The same command with the same DIR goes on with the job. An actor runs
`gradstream serve` as a process and ends when that process dies. Ray then starts the actor again, on the same node or on
another one. docs/slurm-and-ray.md says what the job does meanwhile.

The driver reserves room, starts the actors, submits or resumes the job, watches it, exports the model, ends the actors.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COORDINATOR_CPUS = 0.5
MEMORY_SHARE = 0.8
POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0
WAIT_SECONDS = 30.0
START_SECONDS = 180.0
STOP_SECONDS = 70.0
"""More than the longest --grace of a role."""
PROGRESS_SECONDS = 10.0
WRONG_OPTION = 2
"""The exit code of a role for which another start would not help."""
ENVIRONMENT = ("GRADSTREAM_FAULTS", "GRADSTREAM_LOG_LEVEL", "GRADSTREAM_DEBUG")
"""Variables of the driver that the roles get too."""
CREDENTIALS = {"coordinator": "coordinator", "parameter-server": "server", "worker": "worker"}
"""By role of `gradstream serve`: the role of its credentials."""


# ---- Decisions. ------------------------------------------------------------------------------------------------------


def server_bundles(num_servers: int, cpus: float) -> list[dict[str, float]]:
    """The bundles of the parameter servers, one each. The first one has room for the coordinator too."""
    return [{"CPU": cpus + (COORDINATOR_CPUS if index == 0 else 0.0)} for index in range(num_servers)]


def worker_bundles(num_workers: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """The bundles of the workers, one each."""
    return [{"CPU": cpus} | ({"GPU": gpus} if gpus else {}) for _ in range(num_workers)]


def memory_of(cpus: float, node: Mapping[str, float]) -> int:
    """The bytes that a role of `cpus` CPUs may use on a node with these resources: its share of 80 % of the memory."""
    share = min(1.0, cpus / node["CPU"]) if node.get("CPU") else 1.0
    return int(node["memory"] * MEMORY_SHARE * share)


def listen_address(host: str, known: str) -> str:
    """Where a coordinator on `host` listens: with the port of its `known` address if that is on the same host.

    Then nodes find a coordinator that Ray has started again on its node.
    """
    known_host, _, port = known.rpartition(":")
    return f"{host}:{port}" if known_host == host else f"{host}:0"


# ---- What runs in the actors. ----------------------------------------------------------------------------------------


class Role:
    """An actor that is one role of a cluster. Ray starts the actor again when the role's process has died."""

    def __init__(
        self, role: str, name: str, directory: str, cpus: float, memory: int | None, environment: dict[str, str]
    ):
        import ray

        self._role = role
        self._name = name
        self._directory = Path(directory)
        self._environment = environment
        self._host = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
        self._memory = memory or memory_of(cpus, resources)
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        self._stopping = False
        # The kernel ends a process with the thread that has started it, so one thread starts all of them.
        threading.Thread(target=self._keep, daemon=True).start()

    def look(self) -> dict[str, Any]:
        """Say which processes actor and role are, on which host, and why the role cannot run ("" if it can)."""
        role_pid = self._process.pid if self._process is not None else 0
        return {"actor_pid": os.getpid(), "role_pid": role_pid, "host": self._host, "problem": self._problem}

    def stop(self) -> None:
        """End the role as SIGTERM does."""
        self._stopping = True
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _keep(self) -> None:
        """Run the role's process, again when the coordinator's address has changed. End the actor when it dies."""
        while not self._stopping:
            address = _read(self._directory / "address")
            if self._role != "coordinator" and not address:
                time.sleep(POLL_SECONDS)
                continue
            log = self._directory / "logs" / f"{self._name}.log"
            with log.open("ab") as stream:
                process = self._process = subprocess.Popen(
                    self._command(address),
                    env={**os.environ, **self._environment},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                )
            has_moved = False
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                now = _read(self._directory / "address")
                if self._role != "coordinator" and now not in ("", address) and not has_moved:
                    has_moved = True
                    process.terminate()
            if process.returncode == WRONG_OPTION:
                self._problem = (log.read_text(errors="replace").strip().splitlines() or [f"{log} is empty"])[-1]
                return
            if not has_moved and not self._stopping:
                os._exit(1)

    def _command(self, address: str) -> list[str]:
        command = [sys.executable, "-m", "gradstream.coordinator.cli", "serve", self._role]
        command += ["--credentials", str(self._directory / "credentials" / CREDENTIALS[self._role])]
        command += ["--die-with-parent", str(os.getpid())]
        if self._role == "coordinator":
            command += ["--listen", listen_address(self._host, address), "--state", str(self._directory / "state")]
            return [*command, "--ready-file", str(self._directory / "address")]
        command += ["--coordinator", address, "--listen", f"{self._host}:0", "--name", self._name]
        command += ["--memory", str(self._memory)]
        return command + (["--cache", str(self._directory / "cache" / self._name)] if self._role == "worker" else [])


def _read(path: Path) -> str:
    """The text of a small file; "" when there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# ---- The driver. -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", help="a recipe file, or the name of one of `gradstream recipes ls`")
    made.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--directory", type=Path, required=True, metavar="DIR", help="the cluster's; on all nodes")
    made.add_argument("--address", help="of the Ray cluster; by default RAY_ADDRESS, else that of this node")
    made.add_argument("--servers", type=int, metavar="N", help="parameter servers; by default what the recipe asks")
    made.add_argument("--workers", type=int, metavar="N", help="workers; by default what the recipe asks")
    made.add_argument("--strict-spread", action="store_true", help="each parameter server on a node of its own")
    made.add_argument("--cpus-per-server", type=float, default=1.0, metavar="N")
    made.add_argument("--cpus-per-worker", type=float, default=1.0, metavar="N")
    made.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="N")
    made.add_argument("--memory-per-server", metavar="SIZE", help="by default its CPUs' share of the node's memory")
    made.add_argument("--memory-per-worker", metavar="SIZE", help="by default its CPUs' share of the node's memory")
    return made


class _StopAskedError(Exception):
    """SIGTERM or Ctrl-C came: the job is to be stopped with a checkpoint."""


def _raise_stop_asked(number: int, frame: object) -> None:
    raise _StopAskedError


def say(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%F %T"), text, flush=True)


class Driver:
    """Starts the actors of one cluster and follows its job."""

    def __init__(self, options: argparse.Namespace):
        from gradstream.coordinator.cli.options import find_recipe, parse_size
        from gradstream.core.errors import ConfigError
        from gradstream.core.recipe.loading import load_recipe

        self.options = options
        self.directory: Path = options.directory.expanduser().absolute()
        self.recipe = load_recipe(find_recipe(options.recipe), options.overrides)
        needed_servers = self.recipe.cluster.min_servers
        needed_workers = max(self.recipe.cluster.min_workers, self.recipe.pipeline.min_workers)
        self.num_servers = options.servers if options.servers is not None else needed_servers
        self.num_workers = options.workers if options.workers is not None else needed_workers
        for what, have, need in (
            ("servers", self.num_servers, needed_servers),
            ("workers", self.num_workers, needed_workers),
        ):
            if have < need:
                raise ConfigError(f"--{what} {have} is fewer than the {need} that the recipe needs; start more")
        sizes = {"parameter-server": options.memory_per_server, "worker": options.memory_per_worker}
        self.memory = {role: parse_size(size) for role, size in sizes.items() if size is not None}
        self.actors: dict[str, Any] = {}
        self.groups: list[Any] = []

    def prepare(self) -> None:
        """Make the cluster's directory, and the credentials that it lacks."""
        from gradstream.core.credentials.authority import Authority

        for name in ("logs", "cache"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "address").unlink(missing_ok=True)
        credentials = self.directory / "credentials"
        with Authority.init(self.directory / "authority", credentials / "coordinator" / "tokens.json") as authority:
            for role in (*CREDENTIALS.values(), "admin"):
                authority.ensure(role, role, credentials / role)

    def start(self) -> None:
        """Reserve a bundle for each role and start its actor there; wait for the coordinator's address."""
        import ray
        from ray.util.placement_group import placement_group

        options = self.options
        servers = server_bundles(self.num_servers, options.cpus_per_server)
        workers = worker_bundles(self.num_workers, options.cpus_per_worker, options.gpus_per_worker)
        for what, bundles, strategy in (
            ("servers", servers, "STRICT_SPREAD" if options.strict_spread else "SPREAD"),
            ("workers", workers, "SPREAD"),
        ):
            group = placement_group(bundles, strategy=strategy, name=f"gradstream-{what}")
            self.groups.append(group)
            while not ray.wait([group.ready()], timeout=WAIT_SECONDS)[0]:
                say(f"waits for room for {len(bundles)} {what} ({strategy}): {bundles}")
        server_group, worker_group = self.groups
        self._start_actor("coordinator", "coordinator", server_group, 0, COORDINATOR_CPUS)
        for index in range(self.num_servers):
            self._start_actor("parameter-server", f"server-{index}", server_group, index, options.cpus_per_server)
        for index in range(self.num_workers):
            name, cpus, gpus = f"worker-{index}", options.cpus_per_worker, options.gpus_per_worker
            self._start_actor("worker", name, worker_group, index, cpus, gpus)
        deadline = time.monotonic() + START_SECONDS
        while not self.address:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no coordinator after {START_SECONDS:.0f} s; {self.directory}/logs says why")
            time.sleep(POLL_SECONDS)
        say(f"coordinator at {self.address}, {self.num_servers} parameter servers, {self.num_workers} workers")

    def _start_actor(self, role: str, name: str, group: Any, bundle: int, cpus: float, gpus: float = 0.0) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kind = ray.remote(Role).options(
            name=name,
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        environment = {variable: os.environ[variable] for variable in ENVIRONMENT if variable in os.environ}
        self.actors[name] = kind.remote(role, name, str(self.directory), cpus, self.memory.get(role), environment)

    @property
    def address(self) -> str:
        """The coordinator's address; "" while there is none."""
        return _read(self.directory / "address")

    def check(self) -> None:
        """Raise RuntimeError when a role's option is wrong. An actor that Ray is starting again is no error."""
        import ray

        asked = {actor.look.remote(): name for name, actor in self.actors.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        for answer in answered:
            try:
                problem = ray.get(answer)["problem"]
            except ray.exceptions.RayActorError:
                continue
            if problem:
                raise RuntimeError(f"{asked[answer]} cannot run: {problem}")

    def client(self) -> Any:
        """A client of the coordinator where it is now."""
        from gradstream.client import Client

        return Client(self.address, credentials=self.directory / "credentials" / "admin")

    def submit(self) -> str:
        """Submit the recipe, or resume the job that this directory has; return the job's id."""
        known = self.directory / "job"
        with self.client() as client:
            job_id = _read(known)
            if not job_id:
                job_id = client.submit(self.recipe, request_id=f"ray-{self.directory.name}").job_id
                known.write_text(job_id + "\n", encoding="utf-8")
            elif client.job(job_id).state != "finished":
                client.resume(job_id)
        credentials = f"GRADSTREAM_CREDENTIALS={self.directory}/credentials/admin"
        say(f'job {job_id}; follow it: {credentials} gradstream status -c "$(cat {self.directory}/address)"')
        return job_id

    def watch(self, job_id: str) -> Any:
        """Follow the job to its end, wherever its coordinator is; return it."""
        from gradstream.core.errors import BusyError, UnreachableError

        client, address = self.client(), self.address
        shown, shown_at = "", 0.0
        try:
            while True:
                now = self.address
                if now not in ("", address):
                    client.close()
                    client, address = self.client(), now
                try:
                    job = client.job(job_id)
                except (UnreachableError, BusyError):
                    self.check()
                    time.sleep(POLL_SECONDS)
                    continue
                if job.state != shown or time.monotonic() > shown_at + PROGRESS_SECONDS:
                    say(f"{job_id} {job.state}: step {job.step} of {job.num_steps}; {job.reason}")
                    shown, shown_at = job.state, time.monotonic()
                    self.check()
                if job.state.ended:
                    return job
                time.sleep(POLL_SECONDS)
        finally:
            client.close()

    def stop(self) -> None:
        """End the roles, the coordinator last; end the actors and free their bundles."""
        import ray

        others = [name for name in self.actors if name != "coordinator"]
        for names in (others, [name for name in self.actors if name not in others]):
            asked = [self.actors[name].stop.remote() for name in names]
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=STOP_SECONDS)
        for actor in self.actors.values():
            ray.kill(actor)
        for group in self.groups:
            ray.util.remove_placement_group(group)


def run(driver: Driver) -> int:
    """Run the job to its end; return the exit code: 0, 8 when the job failed, 143 when a signal stopped it."""
    driver.prepare()
    try:
        driver.start()
        job_id = driver.submit()
        try:
            job = driver.watch(job_id)
        except _StopAskedError:
            say(f"{job_id} is stopped with a checkpoint")
            with driver.client() as client:
                client.stop(job_id)
            driver.watch(job_id)
            say("the same command goes on from there")
            return 143
        if job.state == "failed":
            say(f"error: {job_id} failed: {job.reason}")
            return 8
        export = driver.directory / "export"
        if job.state == "finished" and not export.exists():
            with driver.client() as client:
                client.export(job_id, export)
        say(f"{job_id} is {job.state}" + (f"; its model is {export}" if job.state == "finished" else ""))
        return 0
    finally:
        driver.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    from gradstream.core.errors import GradstreamError, one_line

    options = parser().parse_args(arguments)
    try:
        import ray
    except ModuleNotFoundError:
        print("error: Ray is not installed here; pip install ray", file=sys.stderr)
        return WRONG_OPTION
    try:
        driver = Driver(options)
        address = options.address or os.environ.get("RAY_ADDRESS", "auto")
        # In a namespace of the directory's name, so that several clusters may run at the same time.
        ray.init(address=address, namespace=f"gradstream-{driver.directory.name}", log_to_driver=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_stop_asked)
        return run(driver)
    except GradstreamError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except _StopAskedError:
        return 143
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
