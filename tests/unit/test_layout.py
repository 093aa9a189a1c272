"""The layout: imports point one way, and what people import first comes without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["proto", "core", "client", "coordinator", "services", "worker"]
FOLDERS = {part: ROOT / ("protos" if part == "proto" else part) / "gradstream" / part for part in PARTS}
ALLOWED = {
    "proto": {"proto"},
    "core": {"proto", "core"},
    "client": {"proto", "core", "client"},
    "coordinator": {"proto", "core", "coordinator"},
    "services": {"proto", "core", "services"},
    "worker": {"proto", "core", "worker"},
}


def modules() -> list[tuple[str, Path]]:
    """Every module of gradstream with the part it belongs to."""
    return [(part, path) for part in PARTS for path in sorted(FOLDERS[part].rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of gradstream in a file, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "gradstream":
                yield node.lineno, name.split(".")[1]


def test_imports_point_one_way() -> None:
    wrong = []
    for part, path in modules():
        cli = path.is_relative_to(FOLDERS["coordinator"] / "cli")
        for line, imported in imports(path):
            if imported not in ALLOWED[part] | ({"client"} if cli else set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_check_above_sees_every_part() -> None:
    """A part that moved, or a rule that matches nothing, would make it pass for nothing."""
    seen = {(part, imported) for part, path in modules() for _, imported in imports(path)}
    for part in PARTS:
        assert (part, "proto" if part in ("proto", "core") else "core") in seen, part


def test_gradstream_is_a_namespace_package() -> None:
    """PEP 420: an __init__.py in one root would hide the others."""
    roots = [path for path in ROOT.iterdir() if (path / "gradstream").is_dir()]
    assert {path.name for path in roots} == {folder.parents[1].name for folder in FOLDERS.values()}
    for root in roots:
        assert not (root / "gradstream" / "__init__.py").exists()
        assert [path.name for path in (root / "gradstream").iterdir() if path.suffix == ".py"] == []


@pytest.mark.parametrize(
    "module",
    [
        "gradstream.client",
        "gradstream.core.errors",
        "gradstream.core.config",
        "gradstream.core.rpc",
        "gradstream.core.data",
        "gradstream.core.model",
        "gradstream.core.checkpoint",
        "gradstream.core.base_model",
        "gradstream.coordinator.cli",
    ],
)
def test_it_is_imported_without_torch(module: str) -> None:
    """`gradstream --help` must answer at once, and a client's machine may have no torch."""
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
