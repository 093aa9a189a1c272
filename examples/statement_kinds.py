"""A task made from Python's standard library: say what kind of statement a line of code is.

    python examples/statement_kinds.py data/statement-kinds.jsonl

Writes rows of {"prompt": …, "completion": …} for `gradstream finetune`, as many of each kind, the same on every run
with the same Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

KINDS: dict[str, tuple[type[ast.stmt], ...]] = {
    "import": (ast.Import, ast.ImportFrom),
    "function": (ast.FunctionDef, ast.AsyncFunctionDef),
    "class": (ast.ClassDef,),
    "assignment": (ast.Assign, ast.AugAssign, ast.AnnAssign),
    "condition": (ast.If,),
    "loop": (ast.For, ast.While),
    "error": (ast.Raise, ast.Assert),
    "result": (ast.Return,),
}
MAX_CHARACTERS = 30
SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "lib2to3"}


def statements(path: Path) -> Iterator[tuple[str, str]]:
    """(line, kind) of the statements of a module, each by its first line."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        for kind, types in KINDS.items():
            if isinstance(node, types):
                line = lines[node.lineno - 1].strip()  # type: ignore[attr-defined]
                if len(line) <= MAX_CHARACTERS:
                    yield line, kind


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--each", type=int, default=300, help="rows of each kind")
    arguments = parser.parse_args()
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            for line, kind in statements(path):
                found[kind].add(line)
    rows = [
        {"prompt": f"{line}\n# kind:", "completion": f" {kind}"}
        for kind, lines in found.items()
        # Any of them, but always the same.
        for line in sorted(lines, key=lambda line: blake2b(line.encode()).digest())[: arguments.each]
    ]
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    arguments.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {arguments.path}")


if __name__ == "__main__":
    main()
