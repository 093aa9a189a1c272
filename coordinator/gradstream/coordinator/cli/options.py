"""Options that several commands share, and the parsing of sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gradstream.client import Client, FineTuningClient
    from gradstream.core.errors import ConfigError


class OutputFormat(StrEnum):
    """How a command shows its result."""

    table = "table"
    json = "json"


class RowsFormat(StrEnum):
    """How a command shows a result that consists of rows."""

    table = "table"
    csv = "csv"
    json = "json"


RequestIdOption = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        metavar="ID",
        show_default="a new one",
        help="Name of this request. A repeated request with the same ID returns the result of the first one.",
    ),
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        "-c",
        envvar="GRADSTREAM_COORDINATOR",
        metavar="HOST:PORT",
        show_default="127.0.0.1:7000",
        help="The coordinator's address.",
    ),
]
ServiceOption = Annotated[
    str | None,
    typer.Option(
        "--service",
        envvar="GRADSTREAM_FINE_TUNING",
        metavar="HOST:PORT",
        show_default="127.0.0.1:7001",
        help="The fine-tuning service's address.",
    ),
]
CredentialsOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="GRADSTREAM_CREDENTIALS",
        metavar="DIR",
        help="Directory with the credentials to use.",
        show_default="those of `gradstream login`, else no encryption",
    ),
]
OutputOption = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", help="table for people, json for programs (stdout holds nothing else)."),
]
RowsOutputOption = Annotated[
    RowsFormat,
    typer.Option("--output", "-o", help="table for people, csv and json (one object a line) for programs."),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe, as in training.num_steps=50."),
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one of `gradstream recipes ls`.")
]
NewestFineTuningArgument = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="The fine-tuning's name; the newest when left out.", show_default=False),
]
EndedJobArgument = Annotated[
    str | None, typer.Argument(metavar="JOB", help="The job's id; it must be named.", show_default=False)
]
EndedFineTuningArgument = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="The fine-tuning's name; it must be named.", show_default=False),
]
NewestJobArgument = Annotated[
    str | None, typer.Argument(metavar="JOB", help="The job's id; the newest job when left out.", show_default=False)
]
NamedJobArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB", help="A job's id or a fine-tuning's name; the newest job when left out.", show_default=False
    ),
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Parse a size like 4GiB, 500MB, 1.5g or 4096; return bytes. Raises ConfigError for anything else."""
    from gradstream.core.errors import ConfigError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match is not None else 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(f"'{text}' is not a size; write it like 4GiB, 500MB or 4096")
    return int(size)


def parse_bit_rate(text: str) -> float:
    """Parse a rate like 1Gb/s, 100Mb/s or 2.5g; return bits per second. Raises ConfigError for anything else."""
    from gradstream.core.errors import ConfigError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:b(?:it)?(?:/s|ps)?)?\s*", text.lower())
    rate = float(match[1]) * _UNITS[match[2]] if match is not None else 0.0
    if not 0 < rate < 1e18:
        raise ConfigError(f"'{text}' is not a link's speed; write it in bits a second, like 1Gb/s or 100Mb/s")
    return rate


def data_name(sources: Sequence[str]) -> str:
    """The default name of data, from its first source: a file's name without suffixes, or the directory of a glob."""
    fixed: list[str] = []
    for part in re.split(r"[/:]+", sources[0]):
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    last = next((part for part in reversed(fixed) if part not in ("", ".", "..", "~")), "")
    plain = re.sub(r"[^a-z0-9_-]+", "-", last.lower().split(".")[0] or last.lower()).strip("-_")
    return plain[:40] or "mine"


def data_path(sources: Sequence[str]) -> str:
    """The default directory of the data set of these sources."""
    return f"data/{data_name(sources)}"


def open_client(coordinator: str | None) -> Client:
    """Open a client for the --coordinator option."""
    from gradstream.client import Client

    return Client(coordinator)


def open_fine_tuning_client(service: str | None) -> FineTuningClient:
    """Open a client for the --service option."""
    from gradstream.client import FineTuningClient

    return FineTuningClient(service)


def write_file(path: Path, content: bytes, option: str) -> None:
    """Write a file atomically. `option` is the option with its path. Raises ConfigError when it cannot be written."""
    from gradstream.core.errors import ConfigError
    from gradstream.core.storage import files

    try:
        files.write_atomic(str(path.expanduser().absolute()), lambda stream: stream.write(content))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file with {option}") from None


def name_it(command: str, effect: str, newest: str) -> ConfigError:
    """The error of a command that requires the name of the thing that it ends or removes."""
    from gradstream.core.errors import ConfigError

    return ConfigError(f"`{command}` {effect}, so name it; for the newest: {command} {newest}")


def recipe_directories() -> list[Path]:
    """The directories of the bundled recipes: in the installed package, or in the checkout."""
    here = Path(__file__).resolve()
    return [path for path in (here.parents[1] / "recipes", here.parents[4] / "recipes") if path.is_dir()]


def bundled_recipes() -> dict[str, Path]:
    """The bundled recipes by name."""
    found: dict[str, Path] = {}
    for directory in recipe_directories():
        for path in sorted(directory.rglob("*.yaml")):
            found.setdefault(path.relative_to(directory).with_suffix("").as_posix(), path)
    return found


def find_recipe(recipe: str) -> Path:
    """Find the file of a RECIPE argument. Raises ConfigError when there is none."""
    from gradstream.core.errors import ConfigError, nearest

    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if recipe in bundled:
        return bundled[recipe]
    if path.is_dir():
        raise ConfigError(f"{recipe} is a directory; name a recipe file in it")
    near = nearest(recipe, bundled)
    raise ConfigError(f"{recipe}: no such recipe{near or '; `gradstream recipes ls` lists the bundled ones'}")
