"""`gradstream data`: prepare and inspect data sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.options import (
    OutputFormat,
    OutputOption,
    OverrideOption,
    data_path,
    find_recipe,
    parse_size,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.coordinator.data.prepare import DataSummary, PrepareProgress
    from gradstream.core.recipe.recipe import PrepareConfig

PHASES = {"tokenizer": "training the tokenizer", "tokenize": "tokenizing", "done": "done"}

data_app = group("Data sets: prepare and inspect.")


@data_app.command()
def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCES]...",
            show_default=False,
            help="Files, globs, directories on any fsspec path; stdlib: is Python's standard library.",
        ),
    ] = None,
    out_path: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Where the data set goes, on any fsspec path.",
            show_default="data/NAME by the source",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="RECIPE", help="Take data.prepare and data.path of a recipe instead."),
    ] = None,
    overrides: OverrideOption = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the byte-level BPE to train.", show_default="4096")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="An existing tokenizer.json, instead of training one.")
    ] = None,
    end_of_text: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="The token that ends a document.",
            show_default="by the files beside the tokenizer; <|endoftext|> when one is trained",
        ),
    ] = None,
    num_shards: Annotated[
        int | None,
        typer.Option(help="Data shards of each split; very little text has fewer.", show_default="8"),
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of documents held out.", show_default="0.02; of little text up to 0.1")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="The field of a row that holds the text; a.b is b in a.", show_default="text")
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="KIND",
            help="What the files hold: text, jsonl, json or parquet.",
            show_default="auto: by name, then by content",
        ),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Stop after about this much text, as in 100MB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is already there.")] = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Prepare a data set (tokenizer, data shards, manifest) from SOURCES, or as a recipe says."""
    from gradstream.core.extras import require

    require("`gradstream data`", "node")
    options = {
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "end_of_text": end_of_text,
        "num_shards": num_shards,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "format": file_format,
        "max_bytes": parse_size(max_bytes) if max_bytes is not None else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is not None:
        config, path = _from_recipe(recipe, overrides or [], [*given, *(["sources"] if sources else [])], out_path)
    else:
        config, path = _from_options(sources or [], out_path, overrides or [], given)

    from gradstream.coordinator.data.prepare import SPLIT, inspect, prepare

    begin = time.monotonic()
    last: list[PrepareProgress] = []
    with _bar() as show:

        def progress(state: PrepareProgress) -> None:
            last[:] = [state]
            show(state)

        prepare(config, path, progress, force=force)
    seconds = time.monotonic() - begin
    for note in [*last[0].notes, *(_misfits(recipe, overrides or [], path) if recipe is not None else [])]:
        # Long documents of a small corpus are always split. The other notes may point to mistakes.
        if note.startswith(SPLIT):
            terminal.say(f"note: {note}")
        else:
            terminal.warn(note)
    summary = inspect(path)
    if output is OutputFormat.json:
        more = {"num_skipped_files": last[0].num_skipped_files, "notes": last[0].notes}
        terminal.print_json({**asdict(summary), "seconds": round(seconds, 3), **more})
        return
    _print_summary(summary, last[0].end_of_text)
    terminal.say(f"prepared in {seconds:.1f} s")
    if recipe is None:
        terminal.hint(f"a recipe for it: gradstream init {path}")
    else:
        terminal.hint(f"train it here: gradstream dev {recipe}; on a cluster: gradstream submit {recipe}")


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The data set's directory, on any fsspec path.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its sha256.")] = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show the contents of a data set. If it is missing or corrupt: exit code 3 and one line."""
    from gradstream.core.extras import require

    require("`gradstream data`", "node")
    from gradstream.coordinator.data.prepare import inspect

    summary = inspect(path, verify)
    if output is OutputFormat.json:
        terminal.print_json(asdict(summary))
        return
    _print_summary(summary)


def _misfits(recipe: str, overrides: list[str], path: str) -> list[str]:
    """Check whether a job of the recipe would be refused with the data set at `path`; return the reason, if any."""
    from gradstream.coordinator.data.prepare import load_manifest
    from gradstream.coordinator.planning.planner import check_data
    from gradstream.core.errors import GradstreamError, one_line
    from gradstream.core.recipe.loading import load_recipe

    try:
        check_data(load_recipe(find_recipe(recipe), overrides), load_manifest(path))
    except GradstreamError as error:
        return [f"a job of {recipe} would be refused: {one_line(error)}"]
    return []


def _from_recipe(
    recipe: str, overrides: list[str], options: list[str], out_path: str | None
) -> tuple[PrepareConfig, str]:
    from gradstream.core.errors import ConfigError
    from gradstream.core.recipe.loading import load_recipe

    if options:
        raise ConfigError(
            f"with --recipe, {options[0]} comes from the recipe; change it with -s data.prepare.{options[0]}=..."
        )
    loaded = load_recipe(find_recipe(recipe), overrides)
    if loaded.data.prepare is None:
        raise ConfigError(f"{recipe} has no data.prepare section; add one or give SOURCES and --to")
    return loaded.data.prepare, out_path or loaded.data.path


def _from_options(
    sources: list[str], out_path: str | None, overrides: list[str], given: dict[str, Any]
) -> tuple[PrepareConfig, str]:
    from pydantic import ValidationError

    from gradstream.core.errors import ConfigError
    from gradstream.core.recipe.recipe import PrepareConfig

    if overrides:
        raise ConfigError("-s overrides a recipe's keys; add --recipe or use the options of `gradstream data prepare`")
    if not sources:
        raise ConfigError("nothing to prepare; name files, globs or directories, or a --recipe")
    try:
        return PrepareConfig(sources=sources, **given), out_path or data_path(sources)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"{name} {problem['input']}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


@contextmanager
def _bar() -> Iterator[Callable[[PrepareProgress], None]]:
    """Show progress on stderr: a bar on a terminal, else one line per phase."""
    if not sys.stderr.isatty():
        said: list[str] = []

        def line(state: PrepareProgress) -> None:
            if state.phase not in said and state.phase != "done":
                said.append(state.phase)
                terminal.say(PHASES[state.phase])

        yield line
        return

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        task = bar.add_task("listing files", total=None, facts="")
        phase = ""

        def update(state: PrepareProgress) -> None:
            nonlocal phase
            if state.phase != phase:
                phase = state.phase
                bar.reset(task, description=PHASES[phase])  # the speed of one phase does not predict the next
            facts = f"{terminal.format_count(state.num_tokens)} tokens" if state.num_tokens else ""
            bar.update(task, total=state.bytes_total or None, completed=state.bytes_done, facts=facts)

        yield update


def _print_summary(summary: DataSummary, end_of_text: str = "") -> None:
    rows = []
    for name, split in (("train", summary.train), ("validation", summary.validation)):
        spread = f"{terminal.format_count(split.smallest_shard)} to {terminal.format_count(split.largest_shard)}"
        rows.append(
            (
                name,
                split.num_shards,
                split.num_documents,
                terminal.format_count(split.num_tokens),
                terminal.format_bytes(split.num_bytes),
                spread if split.num_shards else "-",
            )
        )
    terminal.print_table(["SPLIT", ">SHARDS", ">DOCUMENTS", ">TOKENS", ">SIZE", ">TOKENS A SHARD"], rows)
    checked = ", all hashes right" if summary.verified else ""
    terminal.print_line(f"{summary.path}: {summary.token_dtype}, vocabulary of {summary.vocab_size}{checked}")
    terminal.print_line(f"end of text: {end_of_text or f'{summary.end_of_text!r} (id {summary.end_of_text_id})'}")
    for name, counts in (("files read as", summary.read_as), ("left out", summary.left_out)):
        if counts:
            terminal.print_line(f"{name}: {', '.join(f'{what} ({count})' for what, count in counts.items())}")
    terminal.print_line(f"begins: {summary.sample[:100]!r}")
