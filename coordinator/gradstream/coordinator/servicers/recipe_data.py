"""The data set that a recipe names, as the coordinator finds it: paths that it may open, a manifest that fits."""

from __future__ import annotations

from gradstream.coordinator.planning import planner
from gradstream.core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gradstream.core.errors import DataError, GradstreamError, one_line
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths


def find_data(recipe: Recipe, allowed: AllowedPaths) -> Manifest:
    """The manifest of the recipe's data set, which fits the recipe. Raises ConfigError for a path that must not be
    opened, DataError for data that cannot be used. Blocks for as long as the storage does."""
    check_paths(recipe, allowed)
    manifest = read_data_manifest(recipe)
    planner.check_data(recipe, manifest)
    return manifest


def check_paths(recipe: Recipe, allowed: AllowedPaths) -> None:
    """Raise ConfigError for a recipe with a path that leads where this cluster's must not."""
    allowed.check("run_root", recipe.run_root)
    allowed.check("data.path", recipe.data.path)
    if recipe.fine_tuning is not None:
        base = recipe.fine_tuning.base
        allowed.check("fine_tuning.base.path", base.path)
        if base.tokenizer is not None:
            allowed.check("fine_tuning.base.tokenizer.directory", base.tokenizer.directory)


def read_data_manifest(recipe: Recipe) -> Manifest:
    """The manifest of the recipe's data set. Raises DataError with the command that makes it."""
    path = files.join(recipe.data.path, MANIFEST_NAME)
    try:
        return parse_manifest(files.read_bytes(path), origin=path)
    except FileNotFoundError:
        raise DataError(
            f"there is no data set in {recipe.data.path}; make it with `gradstream data prepare --recipe …`, where the "
            f"coordinator can read it"
        ) from None
    except GradstreamError:
        raise
    except Exception as error:  # every fsspec backend raises its own kind
        raise DataError(f"the data set's {path} cannot be read ({one_line(error)}); check the path") from None
