"""The layout: imports point one way, and the modules that people import first work without torch."""

import subprocess
import sys

import pytest
from support.layout import DOCUMENT, FOLDERS, PARTS, ROOT, graph, imports, modules, order, picture, shown

ALLOWED = {
    "proto": {"proto"},
    "core": {"proto", "core"},
    "client": {"proto", "core", "client"},
    "coordinator": {"proto", "core", "coordinator"},
    "services": {"proto", "core", "services"},
    "worker": {"proto", "core", "worker"},
}


def test_imports_point_one_way() -> None:
    wrong = []
    for part, path in modules():
        cli = path.is_relative_to(FOLDERS["coordinator"] / "cli")
        for line, name in imports(path):
            imported = name.split(".")[1]
            if imported not in ALLOWED[part] | ({"client"} if cli else set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_check_above_sees_every_part() -> None:
    """A part that moved, or a rule that matches nothing, would make it pass for nothing."""
    seen = {(part, name.split(".")[1]) for part, path in modules() for _, name in imports(path)}
    for part in PARTS:
        assert (part, "proto" if part in ("proto", "core") else "core") in seen, part


def test_packages_have_one_order() -> None:
    edges = graph()
    print("\n".join(order(edges)))
    assert {"core.plan", "core.storage", "coordinator.jobs", "worker.pipeline"} <= edges.keys()
    assert "core.recipe" in edges["core.plan"]


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match=r"in a circle: (a ← b ← a|b ← a ← b)"):
        order({"a": {"b"}, "b": {"a"}})


def test_the_docs_show_the_packages_as_they_are() -> None:
    assert picture(shown(graph())) in DOCUMENT.read_text("utf-8"), "run python tests/support/layout.py"


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
        "gradstream.core.recipe.recipe",
        "gradstream.core.rpc.channel",
        "gradstream.core.data.manifest",
        "gradstream.core.model.model",
        "gradstream.core.checkpoint.manifest",
        "gradstream.core.pretrained.base",
        "gradstream.coordinator.cli",
    ],
)
def test_it_is_imported_without_torch(module: str) -> None:
    """`gradstream --help` must answer at once, and a client's machine may have no torch."""
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
