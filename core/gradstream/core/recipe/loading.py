"""Reading and validating a recipe file or a recipe's JSON. An error is one line with the recipe's key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from gradstream.core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gradstream.core.errors import ConfigError, GradstreamError, one_line
from gradstream.core.recipe.defaults import (
    fit_recipe,
)
from gradstream.core.recipe.files import absolute_path, is_url, load_tree
from gradstream.core.recipe.problems import explain
from gradstream.core.recipe.recipe import Recipe, S

MAX_RECIPE_CHARACTERS = 1 << 20
"""Size limit of a recipe as JSON, because a list of jobs with their recipes is one message."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file with its bases, apply `key.sub=value` overrides and validate.

    Relative paths in the recipe are made absolute against the current directory, except model.config and base, which
    are relative to the file that names them. If the data set is on this machine, keys that the recipe leaves out follow
    from it too. Raises ConfigError with one line.
    """
    tree = load_tree(path, overrides)
    if "base_model" in tree:
        raise ConfigError(f"{path} is a fine-tuning recipe; use `gradstream finetune create` or `finetune dev`")
    return absolute_paths(parse_recipe(fit_recipe(tree, _manifest(tree)), origin=str(path)))


def parse_recipe(tree: Mapping[str, Any] | str, origin: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping or as JSON. Raises ConfigError with one line."""
    return validated(Recipe, tree, origin)


def validated(kind: type[S], tree: Mapping[str, Any] | str, origin: str) -> S:
    """Validate a section of kind `kind`, given as a mapping or as JSON. The result can be written as JSON.

    Raises ConfigError with one line.
    """
    if isinstance(tree, str) and len(tree) > MAX_RECIPE_CHARACTERS:
        raise ConfigError(f"{origin}: it has more than the {MAX_RECIPE_CHARACTERS >> 10} KiB that a recipe may have")
    try:
        data = json.loads(tree) if isinstance(tree, str) else tree
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not JSON ({one_line(error)})") from None
    try:
        section = kind.model_validate(data)
        section.model_dump_json()
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, kind)}") from None
    except PydanticSerializationError as error:
        raise ConfigError(f"{origin}: it cannot be written as JSON ({one_line(error)}); correct that text") from None
    return section


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its relative local paths made absolute: run_root, data.path, sources, tokenizer."""
    data = recipe.data
    if data.prepare is not None:
        prepare = data.prepare.model_copy(
            update={
                "sources": [absolute_path(source) for source in data.prepare.sources],
                "tokenizer": absolute_path(data.prepare.tokenizer) if data.prepare.tokenizer else None,
            }
        )
        data = data.model_copy(update={"prepare": prepare})
    data = data.model_copy(update={"path": absolute_path(data.path)})
    start = recipe.start_from
    if start is not None and start.job is None:
        start = start.model_copy(update={"weights": absolute_path(start.weights)})
    changes = {"run_root": absolute_path(recipe.run_root), "data": data, "start_from": start}
    return recipe.model_copy(update=changes)


def _manifest(tree: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a recipe's data set; None when it is missing on this machine, or unreadable.

    Code that needs the manifest later reports the problem.
    """
    data = tree.get("data")
    path = data.get("path") if isinstance(data, Mapping) else None
    if not isinstance(path, str) or is_url(path):
        return None
    try:
        return parse_manifest((Path(absolute_path(path)) / MANIFEST_NAME).read_bytes())
    except (OSError, GradstreamError):
        return None
