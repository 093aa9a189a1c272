"""Statements in the docs that code can contradict: names of tests, calls and errors, and proofs of each guarantee."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from gradstream.coordinator.cli.app import app
from gradstream.core import errors
from gradstream.core.errors import GradstreamError
from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.section import Section

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONCEPTS = sorted((ROOT / "docs" / "concepts").glob("*.md"))
TEST_PATH = re.compile(r"`(?:tests/)?((?:unit|integration|faults|fuzz|deploy)/[A-Za-z0-9_/]+\.py)`")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, headings and rules aside."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|") and not set(line) <= set("|-: ")
    ]
    return cells


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_is_named_is_there(page: Path) -> None:
    # What starts with deploy/ may also lie in the folder of that name.
    named = TEST_PATH.findall(page.read_text())
    absent = [path for path in named if not (ROOT / "tests" / path).exists() and not (ROOT / path).exists()]
    assert absent == []


def test_each_assumption_names_a_test_or_says_that_there_is_none() -> None:
    text = (ROOT / "docs" / "assumptions.md").read_text()
    checked = 0
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        if re.match(r"[1-8]\.", title):
            assert TEST_PATH.search(section), f"{title}: no test is named"
        for table in re.findall(r"^\|.*(?:\n\|.*)*", section, flags=re.MULTILINE):
            if not table.splitlines()[0].rstrip(" |").endswith("shown by"):
                continue
            for row in rows(table)[1:]:
                checked += 1
                assert TEST_PATH.search(row[-1]) or "not tested" in row[-1], f"{title}: {row[0]}"
    assert checked > 40


def test_each_row_of_security_about_paths_names_its_test() -> None:
    section = (ROOT / "docs" / "security.md").read_text().partition("## Paths and storage")[2]
    found = rows(section.partition("\n## ")[0])[1:]
    assert len(found) >= 6
    assert all(TEST_PATH.search(row[-1]) for row in found)


def test_the_index_of_decisions_has_each_record() -> None:
    """One row a record: its number, its title as a link, its subject."""
    expected = []
    for page in (ROOT / "docs" / "decisions").glob("*.md"):
        text = page.read_text()
        subject = text.splitlines()[0].removeprefix("# ").removesuffix(": decisions")
        for heading in re.findall(r"^## (\d+\. .+)$", text, re.MULTILINE):
            number, _, title = heading.partition(". ")
            anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).lower())
            expected.append([number, f"[{title}](decisions/{page.name}#{anchor})", subject])
    assert len({number for number, *_ in expected}) == len(expected) > 80
    index = (ROOT / "docs" / "decisions.md").read_text().partition("## By number")[2]
    assert rows(index)[1:] == sorted(expected, key=lambda row: int(row[0]))


def test_protocol_has_every_call() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    protos = [path.read_text() for path in (ROOT / "protos").rglob("*.proto")]
    calls = {call for proto in protos for call in re.findall(r"^  rpc (\w+)\(", proto, re.MULTILINE)}
    assert len(calls) > 40
    tables = " ".join(row[0] for row in rows(text))
    assert [call for call in sorted(calls) if f"`{call}`" not in tables] == []


def test_protocol_has_every_error_with_its_status_and_exit_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    listed = {
        row[0].split("`")[1]: (row[1].strip("`"), int(row[2]))
        for row in rows(text)
        if len(row) == 4 and row[0].startswith("`") and row[0].split("`")[1].endswith("Error")
    }
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GradstreamError)]
    assert listed == {
        kind.__name__: (kind.status.name, kind.exit_code) for kind in kinds if kind is not GradstreamError
    }


def test_what_is_there_is_not_said_to_be_missing() -> None:
    """README's list of what is not there yet, against what is."""
    section = (ROOT / "README.md").read_text().partition("## What is not there yet")[2].partition("\n## ")[0]
    assert section
    for word, made in (
        ("TLS", "core/gradstream/core/rpc/transport.py"),
        ("authentication", "core/gradstream/core/rpc/guard.py"),
    ):
        assert (ROOT / made).exists()
        assert word not in section


PARTS = "core|coordinator|services|worker|client|protos|tests|deploy|docs|benchmarks|examples|recipes"
# Written by users, or by commands.
MADE = {"deploy/.env"}
FILE_PATH = re.compile(rf"`((?:{PARTS})/[A-Za-z0-9_./-]+)`")


def _is_there(path: str) -> bool:
    """A path from the root; or, in short, a module below `gradstream`, with or without `.py` and a name in it."""
    if (ROOT / path).exists():
        return True
    short = ROOT / path.split("/")[0] / "gradstream" / path
    module, _, name = short.name.partition(".")
    if short.exists() or (name in ("", "py") and short.with_name(f"{module}.py").exists()):
        return True
    source = short.with_name(f"{module}.py")
    return source.exists() and re.search(rf"^(?:def|class) {re.escape(name)}\b", source.read_text(), re.M) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_is_there(page: Path) -> None:
    assert [path for path in FILE_PATH.findall(page.read_text()) if not _is_there(path) and path not in MADE] == []


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_a_concept_page_has_its_parts_in_order(page: Path) -> None:
    """Contract, files in reading order, how it fails, how it is tested, figures: each with what it must name."""
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", page.read_text("utf-8"), re.MULTILINE))
    wanted = ["Contract", "Files in reading order", "How it fails", "How it is tested", "Figures"]
    assert [title for title in sections if title in wanted] == wanted
    assert len(FILE_PATH.findall(sections["Files in reading order"])) >= 8
    assert len(rows(sections["How it fails"])) >= 4
    assert len(TEST_PATH.findall(sections["How it is tested"])) >= 4


def test_the_site_leads_to_every_page() -> None:
    """mkdocs only notes a page that its navigation leaves out."""
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/-]+\.md", navigation))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert written <= named
    assert {page.relative_to(ROOT / "docs").as_posix() for page in CONCEPTS} <= set(
        re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "architecture.md").read_text("utf-8"))
    )


@pytest.mark.parametrize("recipe", [Recipe, FineTuningRecipe])
def test_every_recipe_key_says_what_it_does(recipe: type[Section]) -> None:
    """The site's reference and editors show it."""

    def silent(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = [part for part in get_args(field.annotation) or (field.annotation,) if isinstance(part, type)]
            below = [part for part in inner if issubclass(part, Section)]
            for part in below:
                yield from silent(part, f"{prefix}{name}.")
            if not below and not field.description:
                yield f"{prefix}{name}"

    assert list(silent(recipe, "")) == []


def _shown_commands(page: Path) -> Iterator[list[str]]:
    """Each `gradstream …` line of the page's blocks, as words, without comments and what follows a pipe."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s[|<>]{1,2}\s", re.split(r"\s#", line)[0]):
                if part.strip().startswith("gradstream "):
                    yield shlex.split(part)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_is_there(page: Path) -> None:
    top: Any = typer.main.get_command(app)
    wrong = []
    for words in _shown_commands(page):
        command, context, inner = top, top.context_class(top), iter(words)
        for word in inner:
            if word.startswith("-"):
                options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
                if word.split("=")[0] not in options and word != "--help":
                    wrong.append(f"gradstream {' '.join(words)}: no option {word}")
            elif hasattr(command, "list_commands"):
                found = command.get_command(context, word)
                if found is None:
                    wrong.append(f"gradstream {' '.join(words)}: no command {word}")
                    break
                command, context = found, found.context_class(found, parent=context)
    assert wrong == []


def test_an_option_means_the_same_in_every_command() -> None:
    """-o is the output's format, -s a key of the recipe, -c the coordinator."""
    top: Any = typer.main.get_command(app)
    meanings: dict[str, set[str]] = {"-o": set(), "-s": set(), "-c": set()}

    def look(command: Any, context: Any) -> None:
        for each in command.params:
            for option in set(each.opts) & set(meanings):
                meanings[option].update(each.opts)
        for name in getattr(command, "list_commands", lambda _: [])(context):
            below = command.get_command(context, name)
            look(below, below.context_class(below, parent=context))

    look(top, top.context_class(top))
    assert meanings == {"-o": {"-o", "--output"}, "-s": {"-s", "--set"}, "-c": {"-c", "--coordinator"}}


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _keys(part, f"{prefix}{name}.")


KEYS = {*_keys(Recipe), *_keys(FineTuningRecipe)}
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
FREE = ("model.config.", "fine_tuning.base.")
"""Below these are the keys of other formats."""
OTHERS = (".py", ".md", ".png", ".safetensors", ".weight")
"""Ends of names that are files or tensors."""


def _named_keys(page: Path) -> Iterator[str]:
    """Keys in the page's words, in its commands' overrides, and in its recipes."""
    text = page.read_text()
    yield from re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})\.[a-z][a-z_.]*[a-z])(?![\w(/]|\.py)", text)
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        tree = yaml.safe_load(block)
        if isinstance(tree, dict) and {"name", "base"} & tree.keys():
            for key, value in tree.items():
                yield key
                yield from (f"{key}.{name}" for name in value) if isinstance(value, dict) else ()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_recipe_key_that_is_named_is_there(page: Path) -> None:
    named = {
        key for key in _named_keys(page) if key != "base" and not key.startswith(FREE) and not key.endswith(OTHERS)
    }
    assert sorted(named - KEYS) == []


def test_the_leaderboard_names_commits_and_commands_newest_first() -> None:
    found = rows((ROOT / "docs" / "leaderboard.md").read_text("utf-8"))[1:]
    assert len(found) > 15
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    patterns = re.findall(r"^([\w-]+%?):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for date, case, figure, _, commit, machine, command in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        assert re.search(r"\d", figure)
        assert re.fullmatch(r"`[0-9a-f]{7}`", commit)
        assert machine
        target = re.fullmatch(r"`make ([\w-]+)`", command)
        assert target, command
        assert any(re.fullmatch(pattern.replace("%", r"\w+"), target[1]) for pattern in patterns), command
        name = target[1].removeprefix("bench-")
        assert name in benchmarks
        assert case.startswith(f"{name},")
    dates = [row[0] for row in found]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_is_named_is_there(page: Path) -> None:
    patterns = re.findall(r"^([\w-]+%?):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    benchmarks = {f"bench-{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")} | {"bench-NAME"}
    named = re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text("utf-8"), re.MULTILINE)
    assert [name for name in named if name not in patterns and name not in benchmarks] == []
