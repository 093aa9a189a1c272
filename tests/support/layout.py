"""Reads from the sources which package of gradstream imports which, for the test of the order and the docs' picture.

`python tests/support/layout.py` prints the order and writes the picture into docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ["proto", "core", "client", "coordinator", "services", "worker"]
FOLDERS = {part: ROOT / ("protos" if part == "proto" else part) / "gradstream" / part for part in PARTS}
DOCUMENT = ROOT / "docs" / "architecture.md"
_PICTURE = re.compile(r"```mermaid\nflowchart BT\n.*?```", re.DOTALL)


def modules() -> list[tuple[str, Path]]:
    """List every module of gradstream with its part."""
    return [(part, path) for part in PARTS for path in sorted(FOLDERS[part].rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each import from gradstream in a file, also in functions and under `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "gradstream":
                yield node.lineno, name


def package_of(path: Path) -> str:
    """The package of a module, such as `core.plan`.

    A module that lies beside packages counts as a package. A part without packages counts as one package.
    """
    part, *inner = path.relative_to(_home(path)).with_suffix("").parts
    if not inner or not any(each.is_dir() and any(each.glob("*.py")) for each in FOLDERS[part].iterdir()):
        return part
    return part if inner[0] == "__init__" else f"{part}.{inner[0]}"


def _home(path: Path) -> Path:
    return next(folder.parent for folder in FOLDERS.values() if path.is_relative_to(folder))


def graph() -> dict[str, set[str]]:
    """Map each package to the packages that it imports, without the protos, which all may import."""
    homes = {".".join(path.relative_to(_home(path)).with_suffix("").parts): path for _, path in modules()}
    homes = {name.removesuffix(".__init__"): path for name, path in homes.items()}
    found: dict[str, set[str]] = {}
    for part, path in modules():
        if part == "proto":
            continue
        importer = package_of(path)
        found.setdefault(importer, set())
        for _, name in imports(path):
            inner = name.removeprefix("gradstream.")
            while inner and inner not in homes:
                inner = inner.rpartition(".")[0]
            if inner and not inner.startswith("proto") and (imported := package_of(homes[inner])) != importer:
                found[importer].add(imported)
    return found


def order(edges: Mapping[str, set[str]]) -> list[str]:
    """List all packages, each after those that it imports. Raises ValueError with the cycle if there is one."""
    try:
        return list(TopologicalSorter({name: sorted(edges[name]) for name in sorted(edges)}).static_order())
    except CycleError as error:
        raise ValueError(f"packages import one another in a circle: {' ← '.join(error.args[1])}") from None


def picture(edges: Mapping[str, set[str]]) -> str:
    """Draw the packages of core and the parts above it as a Mermaid diagram, without arrows that others imply."""
    reached: dict[str, set[str]] = {}
    for name in order(edges):
        reached[name] = set().union(*({other} | reached[other] for other in edges[name]), set())
    lines = ["```mermaid", "flowchart BT"]
    for name in order(edges):
        direct = {a for a in edges[name] if not any(a in reached[b] for b in edges[name] if b != a)}
        lines += [f"  {name} --> {other}" for other in sorted(direct)]
    return "\n".join([*lines, "```"])


def shown(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Reduce the graph to the picture's: core by packages, each other part as a whole."""
    whole = lambda name: name if name.startswith("core.") else name.split(".")[0]  # noqa: E731
    found: dict[str, set[str]] = {}
    for name, others in edges.items():
        found.setdefault(whole(name), set()).update({whole(other) for other in others} - {whole(name)})
    found.pop("core", None)
    return {name: others - {"core"} for name, others in found.items()}


if __name__ == "__main__":
    print("\n".join(order(graph())))
    DOCUMENT.write_text(_PICTURE.sub(lambda _: picture(shown(graph())), DOCUMENT.read_text("utf-8")), "utf-8")
