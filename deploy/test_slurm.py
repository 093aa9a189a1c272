"""End-to-end test of training as a Slurm job: `make test-slurm`.

It starts a real Slurm of four virtual nodes on this machine (Debian's slurm-wlm, installed if it is missing), and uses
it as a person does: `gradstream submit --slurm`, `sbatch`, `scontrol requeue`, `scancel`. `gradstream dev` trains a
recipe undisturbed. Then it is trained as Slurm jobs: undisturbed; with a worker's job requeued, a worker killed and a
node lost; with the whole job requeued, cancelled and submitted again; with its first node lost; over a time limit. All
must end with the same bits.

The test is not part of `pytest`, because it needs Slurm. It takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import NUM_STEPS, ROOT, Steps, checkpoints, last_digest, prepare_and_train, run, run_test, say, wait_until
from virtual_slurm import VirtualSlurm, virtual_slurm

RECIPE = ROOT / "deploy" / "test-recipe.yaml"
SCRIPT = ROOT / "deploy" / "slurm" / "gradstream.sbatch"
NUM_NODES = 4
JOB_SECONDS = 600.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def slow(milliseconds: int) -> dict[str, str]:
    """Variables with which each slot takes a worker so much longer, so that a run has a middle."""
    return {"GRADSTREAM_FAULTS": f"slow@milliseconds={milliseconds}"}


class Person:
    """What a person has at a login node: the command line, Slurm's commands, and the shared directory."""

    def __init__(self, slurm: VirtualSlurm, directory: Path):
        self.slurm = slurm
        self.directory = directory
        # The virtual nodes have no names that resolve, and one machine serves them all.
        self.environment = {
            **slurm.environment,
            "GRADSTREAM_HOST": "127.0.0.1",
            "NO_COLOR": "1",
            "HOME": str(directory),
        }
        self.overrides = ["-s", f"run_root={directory}/runs", "-s", f"data.path={directory}/data"]

    def cli(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Run the command line; return its stdout."""
        command = [sys.executable, "-m", "gradstream.coordinator.cli", *arguments]
        return run(command, self.environment | (environment or {}), timeout_seconds=JOB_SECONDS)

    def refusal(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Run a command that must fail; return the one line on its stderr."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode != 0, (command, done.stdout)
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.strip()

    def submit(self, *options: str, environment: dict[str, str] | None = None) -> tuple[str, Path]:
        """Submit the recipe with `gradstream submit --slurm`; return Slurm's id and the cluster's directory."""
        arguments = ["submit", str(RECIPE), *self.overrides, "--slurm", "-o", "json", *options]
        made = json.loads(self.cli(*arguments, environment=environment))
        return made["slurm_job_id"], Path(made["directory"])

    def sbatch(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Submit by hand; return Slurm's id."""
        command = ["sbatch", "--parsable", f"--chdir={self.directory}", f"--output={self.directory}/%j.out", *arguments]
        return run(command, self.environment | (environment or {})).strip()

    def state(self, job_id: str) -> str:
        """The state of a Slurm job."""
        return self.slurm.job(job_id)["JobState"]

    def nodes(self, job_id: str) -> list[str]:
        """The nodes of a Slurm job."""
        return self.slurm.run("scontrol", "show", "hostnames", self.slurm.job(job_id)["NodeList"]).split()

    def restarts(self, job_id: str) -> int:
        """How often Slurm has started a job again."""
        return int(self.slurm.job(job_id)["Restarts"])

    def ask(self, cluster: Path, *arguments: str) -> Any:
        """Ask a cluster by the address in its directory, as the hint of `gradstream submit --slurm` says."""
        address = (cluster / "address").read_text().strip()
        credentials = {"GRADSTREAM_CREDENTIALS": str(cluster / "credentials" / "admin")}
        return json.loads(self.cli(*arguments, "-c", address, "-o", "json", environment=credentials))

    def reach(self, job_id: str, cluster: Path, version: int, workers: int = 0) -> None:
        """Wait until a cluster's job has reached a version, with so many live workers."""

        def there() -> bool:
            assert self.state(job_id) not in ENDED, self.explain(job_id)
            try:
                found = self.ask(cluster, "status")
            except (AssertionError, OSError):  # not up yet, or going down
                return False
            job = found["job"]
            assert job is None or job["state"] not in ("failed", "finished"), (job["state"], job["reason"])
            live = [node for node in found["nodes"] if node["kind"] == "worker" and node["alive"]]
            return job is not None and job["version"] >= version and len(live) >= workers

        wait_until(there, f"Slurm job {job_id} to reach step {version}", JOB_SECONDS, lambda: self.explain(job_id))

    def end(self, job_id: str, wanted: str) -> None:
        """Wait until a Slurm job has ended, in this state."""
        wait_until(
            lambda: self.state(job_id) in ENDED, f"Slurm job {job_id} to end", JOB_SECONDS, lambda: self.explain(job_id)
        )
        assert self.state(job_id) == wanted, self.explain(job_id)

    def log(self, job_id: str) -> str:
        """What a Slurm job has printed, over all its starts."""
        path = Path(self.slurm.job(job_id)["StdOut"])
        return path.read_text() if path.exists() else ""

    def explain(self, job_id: str) -> str:
        """The state of a Slurm job and the end of its log, for messages."""
        return f"\n{self.slurm.run('squeue')}{self.slurm.job(job_id)}\n{self.log(job_id)[-6000:]}"

    def digest(self, cluster: Path) -> str:
        """The sha256 over weights and optimizer state of the last checkpoint of a cluster's job."""
        return last_digest(self.directory / "runs" / (cluster / "job").read_text().strip())


def check_bad_input(person: Person) -> None:
    """Check the lines for wrong options, and for directories that are not those of a cluster or not free."""
    submit = [sys.executable, "-m", "gradstream.coordinator.cli", "submit", str(RECIPE), *person.overrides, "--slurm"]
    line = person.refusal(*submit, "--partition", "nowhere")
    assert line.startswith("error: sbatch refused "), line
    assert "Invalid partition name specified" in line, line
    line = person.refusal(*submit, "-s", f"data.path={person.directory}/nothing")
    assert "prepare the data before Slurm starts the job" in line, line
    line = person.refusal(*submit, environment={"PATH": str(Path(sys.executable).parent)})
    assert "not on the PATH; submit on a login node" in line, line
    for environment, expected in (
        ({}, "name a recipe"),
        ({"GRADSTREAM_JOIN": str(person.directory)}, "is not the directory of a cluster"),
        ({"GRADSTREAM_COMMAND": "no-such-command"}, "there is no command no-such-command on n"),
    ):
        arguments = [str(RECIPE)] if "GRADSTREAM_COMMAND" in environment else []
        job = person.sbatch("--nodes=1", str(SCRIPT), *arguments, environment=environment)
        person.end(job, "FAILED")
        assert f"error: {expected}" in person.log(job).replace(f"GRADSTREAM_JOIN={person.directory} ", ""), person.log(
            job
        )


def worker_requeued_and_node_lost(person: Person) -> Path:
    """Train on three nodes and a worker's job on a fourth: requeue the worker's job, kill a worker, lose a node."""
    job, cluster = person.submit("--nodes", "3", "--servers", "2", environment=slow(1000))
    person.reach(job, cluster, 5, workers=3)
    script = str(cluster / "gradstream.sbatch")
    joining = slow(1000) | {"GRADSTREAM_JOIN": str(cluster)}
    # An array of one: its element is a job that Slurm starts, stops and queues by itself.
    worker = person.sbatch("--nodes=1", "--array=1", script, environment=joining) + "_1"
    person.reach(job, cluster, 10, workers=4)
    # 1. Slurm stops the worker's job in mid-run and starts it again.
    run(["scontrol", "requeue", worker], person.environment)
    wait_until(lambda: person.restarts(worker) == 1 and person.state(worker) == "RUNNING", "the worker's job", 120)
    version = person.ask(cluster, "status")["job"]["version"]
    person.reach(job, cluster, version + 5, workers=4)
    say(f"      the worker's job {worker} ran again at step {version}")
    # 2. A worker's process is killed: the script starts it again.
    name = next(node for node in person.ask(cluster, "status")["nodes"] if node["kind"] == "worker")["name"]
    kill_process(f"--name {name} ", f"--credentials {cluster}/credentials/worker")
    wait_until(lambda: "worker ended with exit code 137" in logs(cluster), "the worker to be started again", 60)
    version = person.ask(cluster, "status")["job"]["version"]
    person.reach(job, cluster, version + 5, workers=4)
    # 3. The node without a server fails: Slurm takes it out of the job, which goes on.
    *others, lost = person.nodes(job)
    assert not list((cluster / "logs").glob(f"server-{lost}-*"))
    person.slurm.crash(lost)
    wait_until(lambda: person.nodes(job) == others, f"Slurm to take {lost} out of the job", 180)
    person.slurm.boot(lost)
    person.end(job, "COMPLETED")
    assert person.restarts(job) == 0, person.explain(job)
    # The worker's job sees that its cluster has gone.
    person.end(worker, "COMPLETED")
    return cluster


def kill_process(*words: str) -> None:
    """Kill the one process whose command line has all these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words) and " serve " in line and "bash" not in line.split(" ")[0]:
            found.append(int(path.parent.name))
    (pid,) = found
    os.kill(pid, 9)


def logs(cluster: Path) -> str:
    """What all roles of a cluster have logged."""
    return "".join(path.read_text(errors="replace") for path in (cluster / "logs").iterdir())


def requeued_and_cancelled(person: Person) -> Path:
    """Train by hand with `sbatch`: requeue the whole job, then cancel it, then submit it again."""
    environment = slow(150) | {
        "GRADSTREAM_SERVERS": "2",
        "GRADSTREAM_COMMAND": f"{sys.executable} -m gradstream.coordinator.cli",
    }
    cluster = person.directory / "runs" / "by-hand"
    environment["GRADSTREAM_DIR"] = str(cluster)
    job = person.sbatch("--nodes=2", str(SCRIPT), str(RECIPE), *person.overrides, environment=environment)
    person.reach(job, cluster, 25)
    other = person.sbatch("--nodes=1", str(SCRIPT), environment=environment)
    person.end(other, "FAILED")
    assert f"is that of Slurm job {job}, which runs" in person.log(other), person.log(other)
    run(["scontrol", "requeue", job], person.environment)
    wait_until(lambda: person.restarts(job) == 1 and person.state(job) == "RUNNING", "the job to run again", 120)
    person.reach(job, cluster, 45)
    run(["scancel", job], person.environment)
    person.end(job, "CANCELLED")
    time.sleep(2 * 5)  # a job that queued itself again would be pending by now
    assert person.state(job) == "CANCELLED", person.explain(job)
    again = person.sbatch("--nodes=2", str(SCRIPT), environment=environment)
    person.end(again, "COMPLETED")
    assert (cluster / "export" / "model.safetensors").stat().st_size > 0
    return cluster


def first_node_lost(person: Person) -> Path:
    """Train on two nodes, and lose the one with the job's script, the coordinator and a server."""
    job, cluster = person.submit("--nodes", "2", environment=slow(150))
    person.reach(job, cluster, 25, workers=2)
    first = person.nodes(job)[0]
    assert person.slurm.job(job)["BatchHost"] == first
    person.slurm.crash(first)
    wait_until(lambda: person.restarts(job) == 1, "the job to be queued again", 300, lambda: person.explain(job))
    assert f"the node {first} of the job's script has failed" in logs(cluster)
    person.slurm.boot(first)
    person.end(job, "COMPLETED")
    return cluster


def over_a_time_limit(person: Person) -> Path:
    """Train with a time limit of two minutes: the job drains, is queued again by itself, and goes on."""
    # Without other checkpoints than that of the drain and the last one.
    options = ["-s", "checkpoint.interval_steps=0", "--time", "2", "--drain", "60"]
    job, cluster = person.submit(*options, environment=slow(600))
    wait_until(lambda: person.restarts(job) == 1, "the job to be queued again", 240, lambda: person.explain(job))
    told = person.log(job)
    assert "has a checkpoint; this job is queued again" in told, told
    (kept,) = checkpoints(person.directory / "runs" / (cluster / "job").read_text().strip())
    assert 0 < kept < NUM_STEPS, kept

    def goes_on() -> bool:
        try:
            found = person.ask(cluster, "status")["job"]
        except (AssertionError, OSError):  # not up yet
            return False
        assert found["state"] != "running" or found["version"] >= kept, found
        return bool(found["state"] == "running")

    wait_until(goes_on, "the job to go on", JOB_SECONDS, lambda: person.explain(job))
    say(f"      stopped with a checkpoint at step {kept}, and went on from there")
    person.end(job, "COMPLETED")
    return cluster


def undisturbed_job(person: Person) -> Path:
    """Train as a Slurm job without any disturbance, one worker a node on three nodes."""
    job, cluster = person.submit("--nodes", "3", "--servers", "2")
    person.end(job, "COMPLETED")
    assert person.restarts(job) == 0
    assert not (cluster / "address").exists()
    return cluster


def test(directory: Path, steps: Steps) -> None:
    """Run the whole test. Raises AssertionError when a check fails, CannotRunError when the test cannot run here."""
    directory.chmod(0o711)
    with virtual_slurm(directory / "slurm", NUM_NODES) as slurm:
        person = Person(slurm, directory)
        with steps.step("dev: undisturbed"):
            wanted = prepare_and_train(RECIPE, directory)
            say(f"      {wanted}")
        with steps.step("bad input: one line, at the login node or in the job's log"):
            check_bad_input(person)
        for title, scenario in (
            ("a Slurm job: undisturbed, the same bits", undisturbed_job),
            ("a worker's job is requeued, a worker killed, a node lost: the same bits", worker_requeued_and_node_lost),
            ("the whole job is requeued, cancelled, submitted again: the same bits", requeued_and_cancelled),
            ("the first node is lost, with script, coordinator and server: the same bits", first_node_lost),
            ("over a time limit: drained, queued again, the same bits", over_a_time_limit),
        ):
            with steps.step(title):
                found = person.digest(scenario(person))
                assert found == wanted, (found, wanted)


if __name__ == "__main__":
    sys.exit(run_test("slurm", test))
