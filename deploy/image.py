"""Helper of the Dockerfile: chooses the packages of an image, and removes files that the image does not need.

python3 image.py requirements PYPROJECT light|all    the project's requirements, one a line; light: what the command
                                                     line needs to talk to a cluster and to make credentials
python3 image.py pip-settings WHEELS PLACE           a pip.conf: nothing is downloaded when WHEELS, which pip finds as
                                                     PLACE, holds wheels
python3 image.py shrink VENV                         removes tests and headers from a virtual environment
"""

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

TORCH_NEEDS_NOT = ("include", "share", "test")
TORCH_KEPT_PROGRAMS = ("torch_shm_manager",)


def requirements(pyproject: Path, which: str) -> list[str]:
    """List the project's requirements: "light" means those without an extra, "all" those of every extra but dev."""
    project = tomllib.loads(pyproject.read_text())["project"]
    light: list[str] = project["dependencies"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return light if which == "light" else [*light, *extras["node"], *extras["plot"]]


def pip_settings(wheels: Path, place: str) -> str:
    """Make the contents of a pip.conf. `place` is the path at which pip will find `wheels`."""
    if not any(wheels.glob("*.whl")):
        return "[global]\n"
    return f"[global]\nno-index = true\nfind-links = {place}\n"


def superfluous(venv: Path) -> Iterator[Path]:
    """Find directories and files that no service uses."""
    for packages in venv.glob("lib/python3.*/site-packages"):
        torch = packages / "torch"
        yield from (torch / name for name in TORCH_NEEDS_NOT)
        yield from (each for each in torch.glob("bin/*") if each.name not in TORCH_KEPT_PROGRAMS)
        yield from torch.glob("lib/*.a")
        yield packages / "pyarrow" / "include"
        yield packages / "numpy" / "_core" / "include"
        for name in ("numba", "numpy", "pyarrow", "sympy", "matplotlib", "networkx", "psutil", "mpmath"):
            yield from (packages / name).rglob("tests")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["requirements", pyproject, ("light" | "all") as which]:
            print("\n".join(requirements(Path(pyproject), which)))
        case ["pip-settings", wheels, place]:
            print(pip_settings(Path(wheels), place), end="")
        case ["shrink", venv]:
            for path in list(superfluous(Path(venv))):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
