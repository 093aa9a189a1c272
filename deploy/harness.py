"""What the end-to-end tests in this folder share: steps with their times, waiting, commands, the bits of a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 180
"""The steps of test-recipe.yaml."""


class CannotRunError(Exception):
    """The test cannot run here. The message is one line with the reason and the remedy."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


def run(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    check: bool = True,
    timeout_seconds: float = 900.0,
    stdin: str | None = None,
) -> str:
    """Run a command in the repository; return its stdout. Raises AssertionError with its output when it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def apt_install(*packages: str) -> None:
    """Install Debian packages. Raises CannotRunError when that is impossible."""
    wanted = " ".join(packages)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotRunError(f"{wanted} is missing, and installing it needs root and apt-get; install it yourself")
    say(f"      installing Debian's {wanted}")
    run(["apt-get", "update", "-q"], check=False)
    try:
        run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *packages])
    except AssertionError as error:
        raise CannotRunError(
            f"{wanted} cannot be installed with apt-get: {str(error).strip().splitlines()[-1]}"
        ) from None


class Steps:
    """Prints each step with its seconds. The first step that fails ends the test."""

    def __init__(self) -> None:
        self.results: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Run the block as a step of the test."""
        begin = time.monotonic()
        say(f"----  {title}")
        try:
            yield
        except BaseException:
            say(f"FAIL  {title}  ({time.monotonic() - begin:.1f} s)")
            raise
        self.results.append((title, time.monotonic() - begin))
        say(f"PASS  {title}  ({self.results[-1][1]:.1f} s)")


def wait_until(
    condition: Callable[[], bool], what: str, timeout_seconds: float, detail: Callable[[], object] = lambda: ""
) -> None:
    """Check a condition every half second until it holds. Raises AssertionError when it does not hold in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds:.0f} s for {what} {detail()}"
        time.sleep(0.5)


def free_port() -> int:
    """Find a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_and_train(recipe: Path, directory: Path) -> str:
    """Prepare data in `directory`/data, train with `gradstream dev`; return the digest after the last step."""
    cli = [sys.executable, "-m", "gradstream.coordinator.cli"]
    options = ["--vocab-size", "1024", "--num-shards", "4", "--validation-fraction", "0.1", "--max-bytes", "1MB"]
    run([*cli, "data", "prepare", "stdlib:", "--to", f"{directory}/data", *options])
    root = directory / "dev"
    run([*cli, "dev", str(recipe), "-s", f"data.path={directory}/data", "--run-root", str(root)])
    (run_directory,) = (path for path in root.iterdir() if (path / "checkpoints").is_dir())
    return last_digest(run_directory)


def checkpoints(run_directory: Path) -> dict[int, str]:
    """The checkpoints of a job by version, each as the sha256 over weights and optimizer state."""
    manifests = [json.loads(path.read_text()) for path in (run_directory / "checkpoints").glob("step-*/manifest.json")]
    return {manifest["version"]: manifest["state_sha256"] for manifest in manifests}


def last_digest(run_directory: Path) -> str:
    """The sha256 over weights and optimizer state after the last step. Raises AssertionError when there is none."""
    found = checkpoints(run_directory)
    assert max(found, default=0) == NUM_STEPS, (run_directory, found)
    return found[NUM_STEPS]


def run_test(name: str, test: Callable[[Path, Steps], None]) -> int:
    """Run a test with a temporary directory for its files and the steps that it reports.

    Returns the exit code: 0 when all steps passed, 1 when one failed, 2 when the test cannot run here.
    """
    steps = Steps()
    directory = Path(tempfile.mkdtemp(prefix=f"gradstream-{name}-"))
    begin = time.monotonic()
    try:
        test(directory, steps)
    except CannotRunError as error:
        say(f"error: {error}")
        return 2
    except (AssertionError, subprocess.TimeoutExpired) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        say(f"error: {error} ({Path(place.filename).name}:{place.lineno}: {place.line})")
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    say(f"{len(steps.results)} passed, 0 failed ({time.monotonic() - begin:.0f} s)")
    return 0
