"""`gradstream init`: write a commented recipe for a person's own text and machines."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.options import OutputFormat, OutputOption, data_name, data_path, parse_bit_rate
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.coordinator.planning.first_recipe import FirstRecipe, Machines, OwnModel, Text
    from gradstream.core.recipe.recipe import Recipe

LOCAL = "none"
COMPRESSED_TEXT_RATIO = 3.0
"""Approximate bytes of text per stored byte of a compressed or Parquet file."""
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def init(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            show_default=False,
            help="What to train on: files, globs or directories of text, JSON or Parquet; or a prepared data set.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="1M, 3M, 10M, 30M, 124M, 350M or 1B parameters.", show_default="by the length of the text"
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="A Hugging Face config.json, instead of a size.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers.", show_default="2")] = None,
    servers: Annotated[
        int | None, typer.Option("--servers", min=1, help="Parameter servers.", show_default="2")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="RATE", help="Each machine's link, as in 100Mb/s.", show_default="one machine"),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="TIME", help="How long it may train, as in 30m or 8h.", show_default="by text"),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The recipe's name.", show_default="by the data")] = None,
    out_path: Annotated[
        str | None, typer.Option("--to", metavar="FILE", help="Where the recipe goes.", show_default="NAME.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is already there.")] = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Write a first recipe that fits your text and machines, with a comment on each value, and show the next command.

    On a terminal it asks for options that are left out.
    """
    from gradstream.coordinator.planning.first_recipe import Machines, first_recipe, steps_in
    from gradstream.core.errors import ConfigError

    # 1. The options. All checks come before the first measurement or file.
    if size is not None and config is not None:
        raise ConfigError("--size and --config say the same; give one of them")
    if not data:
        data, size, workers, link, time = _ask(size if config is None else "", workers, link, time)
    seconds = parse_time(time) if time else None
    rate = parse_bit_rate(link) if link and link != LOCAL else None
    text = look_at_text(data)
    name = name if name is not None else data_name(data)
    target = Path(out_path or f"{name}.yaml").expanduser()
    if target.exists() and not force:
        raise ConfigError(f"{target} is already there; choose another --name or --to, or replace it with --force")
    machines = Machines(servers or 2, workers or 2, rate, *_arithmetic(rate, workers or 2))
    # 2. The decision.
    model = size if config is None else read_model(config)
    found = first_recipe(name, text, machines, model)
    if seconds is not None:
        found = found.with_steps(*steps_in(seconds, measure_step(found, machines)))
    recipe = check(found)
    # 3. The file.
    _write(target, render(found))
    if output is OutputFormat.json:
        terminal.print_json({"path": str(target), "recipe": recipe.model_dump(mode="json"), "reasons": found.reasons})
        return
    terminal.print_line(f"{target}: {found.reasons['model']}")
    terminal.print_line(f"{recipe.training.num_steps} steps: {found.reasons['training.num_steps']}")
    terminal.print_line(f"codec {recipe.codec.push} up, {recipe.codec.pull} down: {found.reasons['codec']}")
    if rate is None:
        terminal.hint(f"train it here: gradstream dev {target}")
    prepare, submit = f"gradstream data prepare --recipe {target}", f"gradstream submit {target}"
    if rate is None:
        terminal.hint(f"on a cluster: {'; '.join([prepare, submit] if text.sources else [submit])}")
        return
    commands = [f"data: {prepare}"] if text.sources else []
    terminal.hint(*commands, f"forecast: gradstream plan {target} --link {link}", f"train: {submit}")


# --- text, model and machines -----------------------------------------------------------------------------------------


def look_at_text(data: list[str]) -> Text:
    """Inspect the DATA arguments: a prepared data set, or sources of one. Raises ConfigError or DataError."""
    from gradstream.coordinator.data.inspection import load_manifest
    from gradstream.coordinator.planning.first_recipe import BYTES_A_TOKEN, Text
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.data.sources import find_files
    from gradstream.core.errors import ConfigError
    from gradstream.core.storage import files

    if len(data) == 1 and data[0] != "stdlib:" and MANIFEST_NAME in files.list_names(data[0]):
        manifest = load_manifest(data[0])
        if manifest.layout != "windows":
            raise ConfigError(f"{data[0]} holds examples of a fine-tuning; name text, or a data set of text")
        num_tokens = sum(shard.num_tokens for shard in manifest.split("train"))
        num_held_out = sum(shard.num_tokens for shard in manifest.split("validation"))
        return Text(data[0], num_tokens, vocab_size=manifest.vocab_size, num_held_out=num_held_out)
    num_bytes = 0.0
    for file in find_files(data).files:
        packed = file.compression is not None or file.kind == "parquet"
        num_bytes += file.num_bytes * (COMPRESSED_TEXT_RATIO if packed else 1)
    return Text(data_path(data), round(num_bytes / BYTES_A_TOKEN), tuple(data))


def read_model(path: str) -> OwnModel:
    """Read a person's config.json, from its path or its directory. Raises ConfigError if it cannot be trained."""
    import asyncio

    from gradstream.core.extras import require

    require("`gradstream init --config`", "node")
    from gradstream.coordinator.planning.first_recipe import OwnModel
    from gradstream.coordinator.planning.inventory import take_inventory
    from gradstream.core.errors import ConfigError, one_line
    from gradstream.core.recipe.defaults import longest_sequence, text_section

    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({one_line(error)}); name a config.json") from None
    found = asyncio.run(take_inventory(config))
    longest, num_words = longest_sequence(config), text_section(config).get("vocab_size")
    if not isinstance(num_words, int):
        raise ConfigError(f"{file} has no vocab_size; write how many words the model has")
    total = sum(tensor.num_elements for tensor in found.tensors)
    return OwnModel(str(file.resolve()), total, num_words, longest[1] if longest else None)


def _arithmetic(rate: float | None, workers: int) -> tuple[int, bool]:
    """Return (threads of a worker, whether there is a GPU) of this machine; the others are assumed to be equal."""
    cores = len(os.sched_getaffinity(0))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return max(1, cores if rate is not None else cores // workers), has_gpu


def measure_step(found: FirstRecipe, machines: Machines) -> float:
    """Measure the model's segments here; return the seconds of a step.

    If all workers run on one machine, they share its processor.
    """
    import asyncio

    from gradstream.core.extras import require

    require("`gradstream init --time`", "node")
    from gradstream.coordinator.planning.recipe_forecast import forecast_recipe, hypothetical_nodes
    from gradstream.core.errors import ConfigError

    recipe, rate = check(found), machines.link_bits_per_second
    terminal.say("measuring the model on this machine")
    nodes = hypothetical_nodes(recipe, machines.num_servers, machines.num_workers, 0)
    told = asyncio.run(forecast_recipe(recipe, None, *nodes, rate or 1e12))
    if told.step_seconds is None or told.compute_seconds is None:
        raise ConfigError(f"--time needs the seconds of a step: {told.warnings[-1]}")
    return told.step_seconds if rate is not None else told.compute_seconds * machines.num_workers


def parse_time(text: str) -> float:
    """Parse a time like 90s, 30m, 8h or 2d; return seconds. Raises ConfigError for anything else."""
    from gradstream.core.errors import ConfigError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)\s*", text.lower())
    seconds = float(match[1]) * UNITS[match[2]] if match is not None else 0.0
    if not 1 <= seconds < 1e9:
        raise ConfigError(f"'{text}' is not a time; write it like 30m, 8h or 2d")
    return seconds


# --- questions --------------------------------------------------------------------------------------------------------


def _ask(
    size: str | None, workers: int | None, link: str | None, time: str | None
) -> tuple[list[str], str | None, int | None, str | None, str | None]:
    """Ask on a terminal for missing options. Raises ConfigError if data is missing and there is no terminal."""
    import shlex

    from gradstream.coordinator.planning.first_recipe import SIZES
    from gradstream.core.errors import ConfigError

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("what should the model learn from? name files, globs, directories or a data set")

    def ask(question: str, default: str) -> str:
        return str(typer.prompt(question, default=default, err=True)).strip()

    data = shlex.split(typer.prompt("Text to train on (files, globs, directories, or a data set)", err=True))
    if size is None:
        size = ask(f"Model size ({', '.join(SIZES)}, or auto: by the length of the text)", "auto")
    if workers is None:
        workers = int(typer.prompt("Workers", default=2, type=int, err=True))
    if link is None:
        link = ask(f"Link between the machines, as in 100Mb/s ({LOCAL}: all on this one)", LOCAL)
    if time is None:
        time = ask("Time to train, as in 30m or 8h (auto: by the length of the text)", "auto")
    return data, None if size in ("", "auto") else size, workers, link, None if time == "auto" else time


# --- the file ---------------------------------------------------------------------------------------------------------


def check(found: FirstRecipe) -> Recipe:
    """Parse the recipe as `dev` and `submit` do. Raises ConfigError when it is not valid."""
    import tempfile

    import yaml

    from gradstream.core.recipe.loading import load_recipe

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(found.tree, file, allow_unicode=True)
        file.flush()
        return load_recipe(file.name)


def render(found: FirstRecipe) -> str:
    """Write the recipe as YAML, with comments at values that a person may want to change."""
    import yaml

    comments = {
        "name": "jobs are called NAME-1, NAME-2, …",
        "seed": "determines the initial weights and the order of samples",
        "training.num_steps": found.reasons["training.num_steps"],
        "training.num_slots": found.reasons["training.num_slots"],
        "training.global_batch": found.reasons["training.global_batch"],
        "training.microbatch": "samples that go through the model at once; more need more memory",
        "training.precision": "bf16 is faster on GPUs, and on CPUs that have it",
        "training.num_threads": "threads of a worker on a CPU; the bits of the result depend on it",
        "optimizer.learning_rate": "the highest; warmup and decay scale it",
        "codec.push": f"gradients: {found.reasons['codec']}",
        "codec.pull": "weights, as differences",
        "data.path": "directory of the data set",
        "validation.interval_steps": (
            "steps between validation passes; 0: none"
            if found.validates
            else "no passes: there is too little text to hold out"
        ),
        "checkpoint.interval_steps": "steps between checkpoints",
        "cluster.min_servers": "the job waits for this number before it starts",
        "model.config": "" if isinstance(found.tree["model"]["config"], str) else found.reasons["model"],
    }
    lines = []

    def write(tree: dict[str, Any], depth: int, prefix: str) -> None:
        for key, value in tree.items():
            comment = comments.get(f"{prefix}{key}", "")
            note = f"  # {comment}" if comment else ""
            if isinstance(value, dict):
                lines.append(f"{'  ' * depth}{key}:{note}")
                write(value, depth + 1, f"{prefix}{key}.")
            else:
                plain = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
                plain = plain.removesuffix("...\n").strip()
                lines.append(f"{'  ' * depth}{key}: {plain}{note}")

    write(found.tree, 0, "")
    head = "# Written by `gradstream init`. Every key: `gradstream recipes show FILE --resolved`, docs/recipes.md.\n"
    return head + "\n".join(lines) + "\n"


def _write(target: Path, text: str) -> None:
    from gradstream.core.errors import ConfigError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); choose another --to") from None
