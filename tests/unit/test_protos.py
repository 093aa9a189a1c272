"""The committed stubs equal those made from the protos, and every field has a comment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
BIN = Path(sys.executable).parent
# protoc finds its plugins on the PATH.
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def buf(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("buf", path=ENVIRONMENT["PATH"])
    if binary is None:
        pytest.fail("buf is not installed; run `pip install -e .[dev]`")
    return subprocess.run(
        [binary, *arguments], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_committed_stubs_are_up_to_date(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, PROTOS / "generate.py", "--check", tmp_path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    fresh, committed = (
        {path.relative_to(root): path.read_text() for path in root.rglob("*_pb2*") if path.suffix in (".py", ".pyi")}
        for root in (tmp_path, PROTOS)
    )
    assert fresh.keys() == committed.keys()
    # One .py and .pyi for messages and for services of each file.
    assert len(fresh) == 4 * len(list(PROTOS.rglob("*.proto")))
    stale = [str(path) for path, text in fresh.items() if text != committed[path]]
    assert not stale, f"run `make protos`: {', '.join(stale)}"


def test_buf_lint_is_clean() -> None:
    """The standard rules, and a comment on every message, field, enum value and call."""
    result = buf("lint", directory=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "commented",
    ["message Tensor {", "string name = 1;", "CODEC_FP32 = 1;", "rpc Push(", "service ParameterServerService {"],
)
def test_buf_lint_misses_a_comment(tmp_path: Path, commented: str) -> None:
    """The rule is in force: without the comment above such a line, lint fails."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(PROTOS, tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    for path in (tmp_path / "protos").rglob("*.proto"):
        lines = path.read_text().splitlines()
        found = next((number for number, line in enumerate(lines) if line.strip().startswith(commented)), None)
        if found is None:
            continue
        above = found
        while lines[above - 1].strip().startswith("//"):
            above -= 1
        assert above < found
        path.write_text("\n".join(lines[:above] + lines[found:]) + "\n")
        result = buf("lint", directory=tmp_path)
        assert result.returncode != 0
        assert "comment" in result.stdout
        return
    pytest.fail(f"no proto has a line '{commented}'")
