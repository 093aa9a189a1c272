"""One word, one meaning: the glossary has each word once, and names of the code keep to it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "client", "coordinator", "services", "worker", "benchmarks", "tests", "deploy")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if ".venv" not in path.parts]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
RETIRED = {
    r"\b(stage|a|an|the|next|last|its|this|void) (try|tries)( |$)|(?<=\w) (try|tries)$|^tries$|^try number": "attempt",
    r"finetuning": "fine_tuning, in CamelCase FineTuning",
    r"\bschedulers?$": "schedule, leasing or Batcher",
    r"\bcopy n$|(keeps|frame|workers) copy": "reference",
}
"""Patterns of names, given as words in lower case, that are not used; and what is said instead."""
BOUND = re.compile(r"_?(most|least|fewest)_(?!early_bytes)", re.IGNORECASE)
"""Of bounds, which are max and min; `most_early_bytes` is a key of `gradstream status -o json`."""
SECTION = re.compile(r"sections?(?![a-z])", re.IGNORECASE)
SEGMENTED = ("worker", "coordinator/gradstream/coordinator/planning", "core/gradstream/core/pipeline")
"""Where the model is cut: its pieces are segments; sections are of recipes."""


def names_in(path: Path) -> Iterator[str]:
    """Every name of a Python file, and every word of a proto outside its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".proto":
        yield from re.findall(r"\w+", re.sub(r"//.*", "", text))
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string != "try":
            yield token.string


def words_of(name: str) -> str:
    """A name in snake_case or CamelCase as words in lower case."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def test_the_glossary_has_each_word_once() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    words = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
    words = [word for word in words if word != "word"]
    assert len(words) > 50
    assert [word for word in words if words.count(word) > 1] == []


def test_no_name_has_a_word_that_was_retired() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}; say {instead}"
        for path in [*SOURCES, *PROTOS]
        for name in set(names_in(path))
        for pattern, instead in RETIRED.items()
        if re.search(pattern, words_of(name))
    }
    assert sorted(found) == []


def test_bounds_are_called_max_and_min() -> None:
    found = {name for path in SOURCES for name in names_in(path) if BOUND.match(name)}
    assert found == set()


def test_the_pieces_of_a_model_are_segments() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in SEGMENTED
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in set(names_in(path))
        if SECTION.search(name)
    }
    assert sorted(found) == []


def test_an_alias_does_not_hide_the_modules_name() -> None:
    """`from package import module as alias`: the alias has the module's name in it."""
    modules = {path.stem for path in SOURCES}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("gradstream"):
                continue
            for name in node.names:
                if name.name in modules and name.asname and name.name.strip("_") not in name.asname:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name.name} as {name.asname}")
    assert found == []
