"""`pip install gradstream` outside of the checkout: the wheel, its dependencies from the package index, nothing else.

It needs a package index, or wheels: pip reads PIP_NO_INDEX and PIP_FIND_LINKS. Without either it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.base_install import ROOT
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.coordinator.cli.options import bundled_recipes

MAX_MEGABYTES = 60
"""Of site-packages, as the wheels bring it; Python adds its bytecode."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

pytestmark = pytest.mark.slow


class Installed:
    """A virtual environment with the wheel alone, and a directory that is no checkout."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.bin = directory / "venv" / "bin"
        run("-m", "venv", "--without-pip", str(directory / "venv"))
        wheels = str(directory / "wheels")
        pip = PIP[1:]
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, str(ROOT))
        (self.wheel,) = Path(wheels).iterdir()
        lock = ["--constraint", str(ROOT / "requirements.lock")]
        run(*pip, "--python", str(self.bin / "python"), "install", *lock, str(self.wheel))

    def run(self, program: str, *arguments: str) -> str:
        """What a program of the environment prints on stdout."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("GRADSTREAM_", "PYTHON"))}
        return run(*arguments, program=str(self.bin / program), cwd=self.directory, env=environment)

    def gradstream(self, *arguments: str) -> str:
        """What the command prints on stdout."""
        return self.run("gradstream", *arguments)

    def megabytes(self, bytecode: bool) -> float:
        """Size of site-packages."""
        (packages,) = self.bin.parent.glob("lib/python3*/site-packages")
        files = (path for path in packages.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if bytecode or path.suffix != ".pyc") / 1e6


def run(*arguments: str, program: str = sys.executable, **options: object) -> str:
    """What a program prints on stdout. Fails with all that it says when it does not end with 0."""
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{program} {' '.join(arguments)}:\n{result.stdout}{result.stderr}"
    return str(result.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_it_is_small_and_whole(installed: Installed) -> None:
    size = installed.megabytes(bytecode=False)
    print(f"site-packages: {size:.1f} MB, with Python's bytecode {installed.megabytes(bytecode=True):.1f} MB")
    assert size < MAX_MEGABYTES
    assert "Train and fine-tune language models" in installed.gradstream("--help")
    listed = installed.gradstream("recipes", "ls")
    assert all(name in listed for name in bundled_recipes())
    assert str(ROOT) not in installed.run("python", "-c", "import gradstream.client, sys; print(sys.modules.values())")
    assert "extra node" in installed.gradstream("doctor")
    script = installed.run("python", "-c", "from gradstream.coordinator.cli import slurm; print(slurm.script_path())")
    assert str(ROOT) not in script
    assert Path(script.strip()).read_text() == (ROOT / "deploy" / "slurm" / "gradstream.sbatch").read_text()


def test_it_trains_on_a_cluster(installed: Installed, cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tiny_data, tmp_path / "runs").model_dump(mode="json")))
    address = ["-c", cluster.address]

    assert "parameters on 1 servers, 1 workers" in installed.gradstream("plan", str(recipe), *address)
    assert installed.gradstream("submit", str(recipe), "--watch", *address) == "tiny-1\n"
    assert "tiny-1" in installed.gradstream("ls", *address)
    assert "worker-0" in installed.gradstream("status", *address)
    assert "finished" in installed.gradstream("events", "tiny-1", *address)
    assert "step-00000006" in installed.gradstream("ckpt", "ls", *address)
    example = ["examples/submit_and_watch.py", "--coordinator"]
    told = installed.run("python", str(ROOT / example[0]), str(recipe), "exported", example[1], cluster.address)
    assert "submitted tiny-2" in told
    assert (installed.directory / "exported" / "model.safetensors").is_file()
