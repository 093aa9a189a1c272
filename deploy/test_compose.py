"""End-to-end test of the docker-compose cluster: `make test-compose`.

It needs 10 GiB of disk, and takes about ten minutes on two cores. It builds the images, starts the cluster and uses it
as a person does, with the CLI outside of the containers. A job is trained undisturbed; then with a worker killed in the
middle; then with the whole cluster taken down and started again in the middle. All must end with the same bits.

The test is not part of `pytest`, because it needs a Docker engine. If none runs it starts Debian's, if that can be
installed, and otherwise fails with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import Docker, base_image, compose_command, engine, fill_wheels
from harness import NUM_STEPS, ROOT, Steps, free_port, run, run_test, say, wait_until

from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.store import from_pack, save

TARGETS = ("credentials", "coordinator", "parameter-server", "worker", "fine-tuning")
SERVICES = ("coordinator", "parameter-server", "worker", "fine-tuning")
USER = "10001"
RECIPE = "deploy/test-recipe.yaml"
START_SECONDS = 300.0
JOB_SECONDS = 600.0


class Cluster:
    """The cluster of deploy/compose.yaml under a project name of its own, and the CLI outside of it."""

    def __init__(self, docker: Docker, directory: Path, base: str):
        self.docker = docker
        self.directory = directory
        self.project = f"gradstream-test-{os.getpid()}"
        self.ports = [free_port(), free_port()]
        self.addresses = [f"127.0.0.1:{port}" for port in self.ports]
        docker.environment |= {
            "BASE_IMAGE": base,
            "GRADSTREAM_IMAGE": "gradstream-test",
            "GRADSTREAM_PORT": str(self.ports[0]),
            "GRADSTREAM_FINE_TUNING_PORT": str(self.ports[1]),
        }
        self._compose = [*compose_command(docker), "-p", self.project, "-f", str(ROOT / "deploy" / "compose.yaml")]
        self._cli = {
            **os.environ,
            "XDG_CONFIG_HOME": str(directory / "config"),
            "GRADSTREAM_COORDINATOR": self.addresses[0],
            "GRADSTREAM_FINE_TUNING": self.addresses[1],
            "NO_COLOR": "1",
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run compose; return its stdout."""
        return run([*self._compose, *arguments], self.docker.environment, check)

    def cli(self, *arguments: str, stdin: str | None = None, credentials: Path | None = None) -> str:
        """Run the CLI outside of the containers, in the repository; return its stdout."""
        command = [sys.executable, "-m", "gradstream.coordinator.cli", *arguments]
        return run(command, self._cli | _shown(credentials), stdin=stdin, timeout_seconds=JOB_SECONDS)

    def refusal(self, *arguments: str, credentials: Path | None = None) -> str:
        """Run the CLI outside of the containers; return its one line on stderr, empty if the command succeeds."""
        command = [sys.executable, "-m", "gradstream.coordinator.cli", *arguments]
        environment = self._cli | _shown(credentials)
        result = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        if result.returncode == 0:
            return ""
        assert result.stderr.startswith("error: "), result
        assert result.stderr.count("\n") == 1, result
        return result.stderr.strip()

    def last_line(self, service: str, *options: str, command: Sequence[str] = ()) -> str:
        """Run a container of a service that must end at once; return its last line in `docker compose logs`."""
        image, network = f"gradstream-test-{service}", f"{self.project}_default"
        name = f"{self.project}-trial"
        self.docker.run("run", "-d", "--name", name, "--network", network, *options, image, *command)
        try:
            code = self.docker.run("wait", name).strip()
            said = run(["sh", "-c", f"{self.docker.program} logs {name} 2>&1"], self.docker.environment)
        finally:
            self.docker.run("rm", "-f", name)
        assert code != "0", said
        assert "Traceback" not in said, said
        return said.strip().splitlines()[-1]

    def json(self, *arguments: str) -> Any:
        """Run the CLI with -o json; return the parsed output."""
        return json.loads(self.cli(*arguments, "-o", "json"))

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self.compose("ps", "-q", service).split()

    def up(self, *arguments: str) -> None:
        """Start missing containers, and wait until all are healthy."""
        self.compose("up", "-d", *arguments)

        def unhealthy() -> list[str]:
            ids = [each for service in SERVICES for each in self.containers(service)]
            states = self.docker.run("inspect", "-f", "{{.Name}} {{.State.Health.Status}}", *ids).splitlines()
            return [state for state in states if not state.endswith(" healthy")]

        wait_until(lambda: not unhealthy(), "containers to be healthy", START_SECONDS, unhealthy)

    def submit(self) -> str:
        """Submit the recipe; return the job's id."""
        return self.cli("submit", RECIPE).split()[0]

    def reach(self, job: str, version: int) -> None:
        """Wait until a job has reached a version. The job must not have ended by then."""

        def there() -> bool:
            found = self.json("status", job)["job"]
            assert found["state"] not in ("failed", "stopped", "finished"), (found["state"], found["reason"])
            return bool(found["version"] >= version)

        wait_until(there, f"{job} to reach step {version}", JOB_SECONDS)

    def finish(self, job: str) -> str:
        """Wait until a job has finished; return the sha256 over its last checkpoint's weights and optimizer state."""

        def ended() -> bool:
            found = self.json("status", job)["job"]
            assert found["state"] not in ("failed", "stopped"), (found["state"], found["reason"])
            return bool(found["state"] == "finished")

        wait_until(ended, f"{job} to finish", JOB_SECONDS)
        last = self.json("ckpt", "ls", job)[-1]
        assert last["version"] == NUM_STEPS, last
        return str(last["state_sha256"])


def _shown(credentials: Path | None) -> dict[str, str]:
    return {"GRADSTREAM_CREDENTIALS": str(credentials)} if credentials is not None else {}


def size_text(num_bytes: float) -> str:
    """Format a number of bytes for people."""
    return f"{num_bytes / 1e6:,.0f} MB"


def check_images(docker: Docker) -> None:
    """Check that no image runs as root, that each has its labels, and that the small one has no torch."""
    for target in TARGETS:
        image = json.loads(docker.run("image", "inspect", f"gradstream-test-{target}:latest"))[0]
        assert image["Config"]["User"].startswith(USER), (target, image["Config"]["User"])
        assert image["Config"]["Labels"]["org.opencontainers.image.title"] == "gradstream"
        assert ("Healthcheck" in image["Config"]) == (target != "credentials"), target
        say(f"      {target:<17}{size_text(image['Size']):>10}")
    for target, wanted in (("credentials", False), ("worker", True)):
        found = docker.run(
            "run", "--rm", "--entrypoint", "sh", f"gradstream-test-{target}", "-c", "ls -d /opt/*/lib/*/*/torch || true"
        )
        assert bool(found.strip()) == wanted, (target, found)


def check_containers(cluster: Cluster) -> None:
    """Check that no container runs as root, writes to its image, or sees the key of the authority or of another one."""
    for service in SERVICES:
        for container in cluster.containers(service):
            found = json.loads(cluster.docker.run("inspect", container))[0]
            assert found["HostConfig"]["ReadonlyRootfs"], service
            assert found["HostConfig"]["CapDrop"] == ["ALL"], service
            assert cluster.docker.run("exec", container, "id", "-u").strip() == USER, service
            volumes = {mount.get("Name", "").removeprefix(f"{cluster.project}_") for mount in found["Mounts"]}
            assert "authority" not in volumes, service
            assert [name for name in volumes if name.endswith("credentials")] == [
                f"{'server' if service == 'parameter-server' else service}-credentials"
            ], volumes


def check_bad_input(cluster: Cluster) -> None:
    """Check the errors for unsuitable credentials, for a different version and for a volume that cannot be written."""
    project = cluster.project
    # 1. At the command line: an insufficient role, a revoked token, credentials of another cluster.
    for role, name in (("viewer", "vera"), ("submitter", "sam")):
        pack = cluster.compose("run", "--rm", "-T", "credentials", "issue", role, "--name", name)
        made = from_pack(pack, time.time())
        save(cluster.directory / name, made)
    assert cluster.refusal("status", credentials=cluster.directory / "vera") == ""
    line = cluster.refusal("submit", RECIPE, credentials=cluster.directory / "vera")
    assert "SubmitJob is for submitters and above" in line, line
    sam = cluster.directory / "sam"
    assert cluster.refusal("status", credentials=sam) == ""
    cluster.compose("run", "--rm", "-T", "credentials", "revoke", "sam")
    wait_until(lambda: "was revoked on" in cluster.refusal("status", credentials=sam), "sam to be refused", 20)
    with Authority.init(cluster.directory / "other") as authority:
        authority.issue("admin", "eve", directory=cluster.directory / "eve")
    line = cluster.refusal("status", credentials=cluster.directory / "eve")
    assert "CA" in line or "cluster" in line, line
    # 2. In the logs of containers.
    server, worker = (f"{project}_{role}-credentials:/credentials:ro" for role in ("server", "worker"))
    common = ["-e", "GRADSTREAM_COORDINATOR=coordinator:7000", "-e", "GRADSTREAM_CREDENTIALS=/credentials"]
    line = cluster.last_line("worker", *common, "-v", server)
    assert "credentials of a server cannot be used by a worker" in line, line
    line = cluster.last_line("worker", "-e", "GRADSTREAM_COORDINATOR=coordinator:7000")
    assert "--listen 0.0.0.0:7200 is open to other machines, and there are no credentials" in line, line
    version = "import gradstream.core as core; core.__version__ = '0.0.1'; import sys; "
    version += "from gradstream.coordinator.cli import main; sys.exit(main(['serve', 'worker']))"
    line = cluster.last_line("worker", *common, "-v", worker, "--entrypoint", "python3", command=["-c", version])
    assert "runs gradstream 0.0.1, the coordinator" in line, line
    own = ["-v", f"{project}_coordinator-credentials:/credentials:ro", "-e", "GRADSTREAM_CREDENTIALS=/credentials"]
    line = cluster.last_line("coordinator", *own, "-v", f"{project}_state:/var/lib/gradstream:ro")
    assert "the state directory /var/lib/gradstream cannot be written" in line, line
    line = cluster.last_line("worker", *common, "-v", worker, "-v", f"{project}_worker-cache:/var/cache/gradstream:ro")
    assert "--cache /var/cache/gradstream cannot be written" in line, line


def examples(path: Path) -> None:
    """Write examples of an easy task: a word, and its number of letters."""
    words = sorted(set(re.findall(r"[a-z]{2,9}", Path(subprocess.__file__).read_text().lower())))[:240]
    rows = [{"prompt": f"{word}\n# letters:", "completion": f" {len(word)}"} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fine_tuning_recipe(directory: Path, base_job: str) -> Path:
    """Write the recipe of a fine-tuning of a few steps on the job's model."""
    examples(directory / "letters.jsonl")
    recipe = directory / "letters.yaml"
    recipe.write_text(
        f"""name: letters
base_model: job:{base_job}
data: {{path: {directory / "letters.jsonl"}}}
training: {{num_steps: 12, num_slots: 2, global_batch: 4, microbatch: 2, sequence_length: 64}}
validation: {{interval_steps: 6, num_exact_match: 4}}
"""
    )
    return recipe


def walk(cluster: Cluster, steps: Steps) -> None:
    """Run all steps that need only the built images."""
    docker, directory = cluster.docker, cluster.directory
    with steps.step("up: the whole cluster is healthy"):
        cluster.up()
        check_containers(cluster)
    with steps.step("login: one command; without it every call is refused"):
        refused = cluster.refusal("status")
        assert "wants TLS, and no credentials were given" in refused, refused
        pack = cluster.compose("run", "--rm", "-T", "credentials", "show", "/credentials/admin")
        say("      " + cluster.cli("login", *cluster.addresses, stdin=pack).strip().splitlines()[0])
    with steps.step("bad input: one line of error, at the command line or in the log"):
        check_bad_input(cluster)
    with steps.step("data: prepared in a container, where the cluster sees it"):
        options = ["--to", "data/compose", "--vocab-size", "1024", "--num-shards", "4"]
        options += ["--validation-fraction", "0.1", "--max-bytes", "1MB"]
        cluster.compose("run", "--rm", "-T", "cli", "data", "prepare", "stdlib:", *options)

    with steps.step("train: submitted from outside, undisturbed"):
        first = cluster.submit()
        wanted = cluster.finish(first)
        say(f"      {first}: {wanted}")
    with steps.step("a worker is killed in the middle: the same bits"):
        job = cluster.submit()
        cluster.reach(job, 15)
        killed = cluster.containers("worker")[0]
        docker.run("kill", "--signal", "KILL", killed)
        found = cluster.finish(job)
        assert found == wanted, (job, found, wanted)
        told = [item["message"] for item in map(json.loads, cluster.cli("events", job, "-o", "json").splitlines())]
        assert any(message.count(killed[:12]) and "slots" in message for message in told), told
    with steps.step("workers are scaled up to 3, then a job finishes with the same bits"):
        cluster.up("--scale", "worker=3", "--no-recreate")
        alive = [node for node in cluster.json("status")["nodes"] if node["kind"] == "worker" and node["alive"]]
        assert len(alive) == 3, alive
        found = cluster.finish(cluster.submit())
        assert found == wanted, (found, wanted)
    with steps.step("the whole cluster goes down in the middle and comes up: the job resumes by itself, the same bits"):
        job = cluster.submit()
        cluster.reach(job, 25)
        cluster.compose("down")
        assert not docker.run("ps", "-aq", "--filter", f"label=com.docker.compose.project={cluster.project}").strip()
        cluster.up()
        found = cluster.finish(job)
        assert found == wanted, (job, found, wanted)

    with steps.step("fine-tuning: examples sent from outside"):
        recipe = fine_tuning_recipe(directory, first)
        cluster.cli("finetune", "create", str(recipe), "--upload", "--wait")
        made = cluster.json("finetune", "status", "letters")
        assert made["state"] == "finished", made
    with steps.step("generate: with the base and with the result"):
        for model in ([], ["--base"]):
            made = cluster.json("finetune", "generate", "letters", "--prompt", "import\n# letters:", *model)
            assert made["num_tokens"] > 0, made
            assert made["finish_reason"], made
    with steps.step("export: the model and the adapter"):
        cluster.cli("ckpt", "export", first, str(directory / "model"))
        cluster.cli("finetune", "export", "letters", "--to", str(directory / "adapter"))
        for name in ("model/config.json", "model/model.safetensors", "adapter/adapter_model.safetensors"):
            assert (directory / name).stat().st_size > 0, name
    with steps.step("down: nothing is left"):
        cluster.compose("down", "-v")
        label = f"label=com.docker.compose.project={cluster.project}"
        for kind in (("ps", "-a"), ("volume", "ls"), ("network", "ls")):
            assert not docker.run(*kind, "-q", "--filter", label).strip(), kind


def test(options: argparse.Namespace, directory: Path, steps: Steps) -> None:
    """Run the whole test. Raises AssertionError when a check fails, CannotRunError when the test cannot run here."""
    with engine(options.engine or directory / "engine") as docker:
        with steps.step("base image and wheels"):
            base = base_image(docker, options.base_image, directory)
            num_wheels = fill_wheels(ROOT / "deploy" / "wheels") if options.wheels else 0
            say(f"      {base}, {num_wheels} wheels")
        cluster = Cluster(docker, directory, base)
        try:
            with steps.step("compose.yaml is valid"):
                cluster.compose("config", "-q")
            with steps.step("images are built"):
                cluster.compose("build", *TARGETS)
                check_images(docker)
            walk(cluster, steps)
        except BaseException:
            say(cluster.compose("ps", check=False) + cluster.compose("logs", "--no-color", "--tail", "30", check=False))
            raise
        finally:
            cluster.compose("down", "-v", check=False)


def main() -> int:
    """Run the test. Returns 0 when all steps passed, 1 when one failed, 2 when the test cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base-image", default="debian", help="an image, or debian: one made here of Debian's packages"
    )
    parser.add_argument("--no-wheels", dest="wheels", action="store_false", help="let builds use the package index")
    parser.add_argument("--engine", type=Path, metavar="DIR", help="keep an engine's files here for the next time")
    options = parser.parse_args()
    return run_test("compose", lambda directory, steps: test(options, directory, steps))


if __name__ == "__main__":
    sys.exit(main())
