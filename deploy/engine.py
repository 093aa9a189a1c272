"""Provides a Docker engine, a base image and wheels for the test of the cluster: uses existing ones, or makes them.

An engine that this module starts keeps all its files in a directory of its own, and is ended by its process id. A base
image that this module makes consists of Debian's packages alone, so no image registry is needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from harness import ROOT, CannotRunError, apt_install, run, say

DEBIAN = "debian"
"""The name that means: make the base image here, from Debian's packages of this release."""
DEBIAN_RELEASE = "bookworm"
DEBIAN_IMAGE = f"gradstream-base:{DEBIAN_RELEASE}"
START_SECONDS = 60.0


class Docker:
    """An engine's command line."""

    def __init__(self, program: str, environment: dict[str, str]):
        self.program = program
        self.environment = {**os.environ, **environment}

    def run(self, *arguments: str, check: bool = True, timeout_seconds: float = 900.0) -> str:
        """Run `docker ARGUMENTS`; return its stdout. Raises AssertionError with its output when it fails."""
        return run([self.program, *arguments], self.environment, check, timeout_seconds)


@contextmanager
def engine(directory: Path) -> Iterator[Docker]:
    """Yield the running engine or, if none runs, one of Debian's that runs in `directory` until the block ends.

    Raises CannotRunError when no engine runs and none can be started.
    """
    for program in dict.fromkeys(filter(None, (shutil.which("docker"), "/usr/bin/docker"))):
        if Path(program).exists() and subprocess.run([program, "info"], capture_output=True).returncode == 0:
            say(f"      uses the engine that {program} reaches")
            yield Docker(program, {})
            return
    programs = (Path("/usr/sbin/dockerd"), Path("/usr/bin/docker"))
    if not all(program.exists() for program in programs):
        apt_install("docker.io", "docker-compose")
    if os.geteuid() != 0:
        raise CannotRunError("no Docker engine answers, and starting one needs root; start one and run this again")
    with _own_engine(directory) as docker:
        yield docker


@contextmanager
def _own_engine(directory: Path) -> Iterator[Docker]:
    directory.mkdir(parents=True, exist_ok=True)
    socket = f"unix://{directory}/docker.sock"
    places = ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid"]
    # A client with BuildKit may be first on the PATH, but Debian's engine has no BuildKit.
    docker = Docker("/usr/bin/docker", {"DOCKER_HOST": socket, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"})
    log = directory / "dockerd.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            ["/usr/sbin/dockerd", "-H", socket, *places], stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run([docker.program, "info"], env=docker.environment, capture_output=True).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise CannotRunError(
                    f"no Docker engine answers, and dockerd does not start here: {' '.join(last)[-300:]}"
                )
            time.sleep(0.2)
        say(f"      started an engine in {directory}")
        yield docker
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)


def compose_command(docker: Docker) -> list[str]:
    """Find Compose v2, else docker-compose. Raises CannotRunError when there is neither."""
    plugin = [docker.program, "compose"]
    if subprocess.run([*plugin, "version"], env=docker.environment, capture_output=True).returncode == 0:
        return plugin
    if shutil.which("docker-compose") is None:
        apt_install("docker-compose")
    return ["docker-compose"]


def base_image(docker: Docker, wanted: str, directory: Path) -> str:
    """Return the name of the base image: `wanted`, or one made of Debian's packages. Raises CannotRunError."""
    if wanted != DEBIAN:
        return wanted
    if docker.run("images", "-q", DEBIAN_IMAGE).strip():
        return DEBIAN_IMAGE
    if shutil.which("mmdebstrap") is None:
        apt_install("mmdebstrap")
    archive = directory / "base.tar"
    packages = "python3,python3-venv,ca-certificates"
    run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", DEBIAN_RELEASE, str(archive)])
    docker.run("import", str(archive), DEBIAN_IMAGE)
    archive.unlink()
    return DEBIAN_IMAGE


def fill_wheels(directory: Path) -> int:
    """Download the wheels that the images need into `directory`; return their number.

    Wheels from an earlier call are replaced when the requirements change. A folder that was filled by hand is left
    unchanged.
    """
    requirements = run([sys.executable, "deploy/image.py", "requirements", "pyproject.toml", "all"]).splitlines()
    lock = (ROOT / "requirements.lock").read_text()
    wanted = sha256("\n".join([lock, *requirements]).encode()).hexdigest()
    stamp = directory / ".requirements.sha256"
    made = stamp.read_text() if stamp.exists() else ""
    present = list(directory.glob("*.whl"))
    if made != wanted and (made or not present):
        for wheel in present:
            wheel.unlink()
        torch = [line for line in lock.splitlines() if line.startswith("torch==")]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        # As in the Dockerfile, TORCH_INDEX names another index for PyTorch's wheels than pip's default.
        index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
        try:
            run([*pip, *index, "-d", str(directory), "-c", "requirements.lock", *torch, "hatchling", *requirements])
        except AssertionError as error:
            raise CannotRunError(f"the wheels cannot be downloaded: {str(error).strip().splitlines()[-1]}") from None
        stamp.write_text(wanted)
    return len(list(directory.glob("*.whl")))


if __name__ == "__main__":
    say(f"{fill_wheels(Path(sys.argv[1]))} wheels in {sys.argv[1]}")
