"""Python with only the packages that `pip install gradstream` without an extra installs.

The packages are links to those of this environment, so nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROOTS = ("protos", "core", "client", "coordinator", "services", "worker")


def closure(requirements: list[str]) -> set[str]:
    """The names of the packages in `requirements` and of all their dependencies."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        wanted = left.pop()
        extras = wanted.extras or {""}
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if wanted.name in found:
            continue
        found.add(wanted.name)
        left += [
            needed
            for needed in map(Requirement, distribution(wanted.name).requires or ())
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found


def top_level(name: str) -> Iterator[Path]:
    """The files and directories of a package in site-packages."""
    installed = distribution(name)
    for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        yield Path(str(installed.locate_file(top)))


class BaseInstall:
    """Runs Python with the packages of the base install, or of some extras too, and the project's own."""

    def __init__(self, directory: Path, *extras: str):
        """The links are made in `directory`, which is created. `extras` are installed too."""
        directory.mkdir()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        more = [package for extra in extras for package in project["optional-dependencies"][extra]]
        for name in closure([*project["dependencies"], *more]):
            for path in top_level(name):
                if not (directory / path.name).exists():
                    (directory / path.name).symlink_to(path)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("GRADSTREAM_")},
            "PYTHONPATH": os.pathsep.join([str(directory), *(str(ROOT / root) for root in ROOTS)]),
        }

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with -S, without this environment's site-packages."""
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def gradstream(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.python("-m", "gradstream.coordinator.cli", *arguments)
