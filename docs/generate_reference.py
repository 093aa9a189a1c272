"""Writes the pages of the site that follow from the code: recipe keys, commands, calls, errors; and those that lie
beside the docs. mkdocs calls `on_files` (`mkdocs.yml`);
nothing is written into this folder."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gradstream.coordinator.cli.app import COMMANDS, EPILOG, app
from gradstream.core import errors
from gradstream.core.metrics.definition import ROLES
from gradstream.core.metrics.table import TABLE
from gradstream.core.node.probe import TITLES
from gradstream.core.recipe.files import load_tree
from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.section import DERIVED, Section

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this when it has found the pages that are written by hand."""
    pages = {
        "reference/recipes.md": recipes(),
        "reference/commands.md": f"# Commands\n\n{EPILOG}\n\n" + "\n".join(commands()),
        "reference/client.md": "# Python client\n\n::: gradstream.client\n",
        "reference/calls.md": "# Calls and messages\n\n" + "\n".join(calls()),
        "reference/errors.md": error_page(),
        "reference/metrics.md": metrics_page(),
        "index.md": beside("README.md"),
        "contributing.md": beside("CONTRIBUTING.md"),
        "changes.md": beside("CHANGELOG.md"),
    }
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text.rstrip("\n") + "\n"))
    return files


# ---- Recipe keys -----------------------------------------------------------------------------------------------------


def parts(annotation: Any) -> tuple[Any, ...]:
    """What a union is made of; of anything else, itself."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(part for each in typing.get_args(annotation) for part in parts(each))
    return (annotation,)


def kind(annotation: Any) -> str:
    """A type as a person says it: `int`, `'cosine' or 'constant'`, a section's name as `section`."""
    names = []
    for part in parts(annotation):
        if typing.get_origin(part) is typing.Literal:
            names += [f"`{value}`" for value in typing.get_args(part)]
        elif part is types.NoneType:
            names.append("`null`")
        elif typing.get_origin(part) is typing.Annotated:
            names.append(kind(typing.get_args(part)[0]))
        elif isinstance(part, type) and issubclass(part, Section):
            names.append("section")
        else:
            names.append(f"`{getattr(part, '__name__', str(part)) if not typing.get_args(part) else part}`")
    return " or ".join(dict.fromkeys(names)).replace("typing.", "").replace("|", "\\|")


def default(field: FieldInfo) -> str:
    """A key's default."""
    if field.is_required():
        return "needed"
    extra = field.json_schema_extra
    if isinstance(extra, dict) and DERIVED in extra:
        return f"derived: {extra[DERIVED]}".replace("<", "&lt;").replace("|", "\\|")
    value = field.get_default(call_default_factory=True) if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    if value in ("", None):
        return '`""`' if value == "" else "`null`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def bounds(field: FieldInfo) -> str:
    """A key's bounds, such as `> 0`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(each, name)}"
        for each in field.metadata
        for name, sign in signs.items()
        if getattr(each, name, None) not in (None, 2**63)
    ]
    return ", ".join(found)


def sections(model: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Each section with its path, the recipe itself first."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part, f"{prefix}{name}.")


def example(values: Any, key: str) -> str:
    """What a recipe that comes along, resolved, has at a dotted key."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    if values is None or isinstance(values, dict):
        return ""
    return f"`{values}`".replace("|", "\\|")


def recipe_page(title: str, model: type[Section], values: dict[str, Any]) -> str:
    """All keys of a kind of recipe. `values`: of the recipe that the examples are from."""
    lines = [f"## {title}", ""]
    for prefix, section in sections(model):
        lines += [f"### `{prefix.rstrip('.')}`" if prefix else "### At the top", ""]
        if section.__doc__ and prefix:
            lines += [re.sub(r"\s+", " ", section.__doc__).strip(), ""]
        lines += ["| key | type | default | what it does | example |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            about = "; ".join(
                filter(None, [(field.description or "").replace("|", "\\|").replace("<", "&lt;"), bounds(field)])
            )
            lines.append(
                f"| `{prefix}{name}` | {kind(field.annotation)} | {default(field)} | {about} "
                f"| {example(values, prefix + name)} |"
            )
        lines.append("")
    return "\n".join(lines)


def recipes() -> str:
    """Both kinds of recipe."""
    head = (
        "# Recipe keys\n\nA recipe is a YAML file. An unknown key is an error. `-s key=value` overrides a key on the "
        "command line.\n"
    )
    pages = [head]
    for title, model, name in (
        ("Training", Recipe, "stdlib-gpt"),
        ("Fine-tuning", FineTuningRecipe, "stdlib-finetune"),
    ):
        values = load_tree(ROOT / "recipes" / f"{name}.yaml")
        resolved = model.model_validate(values).model_dump(mode="json")
        pages.append(recipe_page(title, model, resolved))
    return "\n".join(pages)


# ---- Commands --------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """The help of every command and of those below it."""
    top: Any = typer.main.get_command(app)
    context = top.context_class(top, info_name="gradstream")

    def describe(command: Any, parent: Any, words: str, level: int) -> Iterator[str]:
        inner = command.context_class(command, info_name=words.rsplit(" ", 1)[-1], parent=parent)
        yield f"{'#' * level} `{words}`\n\n```\n{command.get_help(inner).strip()}\n```\n"
        for name in getattr(command, "list_commands", lambda _: [])(inner):
            yield from describe(command.get_command(inner, name), inner, f"{words} {name}", level + 1)

    for name, _, _, _ in COMMANDS:
        yield from describe(top.get_command(context, name), context, f"gradstream {name}", 2)


# ---- Calls and errors ---------------------------------------------------------------------------------------


def calls() -> Iterator[str]:
    """Each proto file: its services as a table, and the whole of it."""
    for path in sorted((ROOT / "protos" / "gradstream" / "proto" / "v1").glob("*.proto")):
        text = path.read_text("utf-8")
        yield f"## {path.name}\n"
        for service, body in re.findall(r"^service (\w+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            yield f"### {service}\n\n| call | what it does |\n|---|---|"
            for comment, call in re.findall(r"((?:  //[^\n]*\n)*)  rpc (\w+)\(", body):
                words = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
                yield f"| `{call}` | {words.replace('|', chr(92) + '|')} |"
            yield ""
        yield (
            f'??? note "{path.name}"\n'
            + "\n".join(f"    {line}" for line in f"```proto\n{text}```".splitlines())
            + "\n"
        )


def error_rows(error: type[errors.GradstreamError], depth: int = 0) -> Iterator[str]:
    """An error and those below it."""
    about = re.sub(r"\s+", " ", error.__doc__ or "").strip()
    yield f"| {'&nbsp;' * 4 * depth}`{error.__name__}` | {error.exit_code} | `{error.status.name}` | {about} |"
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from error_rows(below, depth + 1)


def error_page() -> str:
    """The tree of errors."""
    head = (
        "# Errors and exit codes\n\nA message is one line: what is wrong, where, and what to do. The client raises the "
        "same classes that the services have.\n\n| error | exit code | gRPC status | meaning |\n|---|---|---|---|"
    )
    tail = (
        "\nA command ends with 8 when the job or the fine-tuning failed, with 130 after Ctrl-C, and with 141 when the "
        "reader of its output went away."
    )
    return "\n".join([head, *error_rows(errors.GradstreamError), tail])


def metrics_page() -> str:
    """The table of metrics, by role."""
    head = (
        "# Metrics\n\nEvery metric of `gradstream serve`, by the role that serves it. [Monitoring](../monitoring.md) "
        "says how they are scraped, and what to look at first. Beside these each role has the usage of its process "
        "(`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds` and others), as other "
        "programs have it.\n"
    )
    titles = {ROLES: "Every role", **{(role,): title.capitalize() for role, title in TITLES.items()}}
    sections: dict[tuple[str, ...], list[str]] = {}
    for metric in TABLE:
        labels = "<br>".join(f"`{name}`: {about}" for name, about in metric.labels.items())
        row = f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"
        sections.setdefault(metric.roles, []).append(row)
    pages = [head]
    for roles, found in sections.items():
        title = titles.get(roles) or " and ".join(TITLES[role] for role in roles).capitalize()
        pages.append(
            "\n".join([f"## {title}", "", "| metric | type | labels | what it is |", "|---|---|---|---|", *found, ""])
        )
    return "\n".join(pages)


# ---- What lies beside the docs ---------------------------------------------------------------------------------------


def beside(source: str) -> str:
    """A file of the repository as a page. Links into docs/ lead to the pages; of others only the words stay."""

    def moved(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith("http"):
            return match.group(0)
        return f"[{words}]({target.removeprefix('docs/')})" if target.startswith("docs/") else words

    return re.sub(r"\[([^\]]+)\]\(([^)#][^)]*)\)", moved, (ROOT / source).read_text("utf-8"))
