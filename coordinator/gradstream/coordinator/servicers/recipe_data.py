"""Find the data set of a recipe: check that the coordinator may open its paths, and that the manifest fits."""

from __future__ import annotations

from gradstream.coordinator.planning import planner
from gradstream.core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gradstream.core.errors import DataError, GradstreamError, one_line
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths


def find_data(recipe: Recipe, allowed: AllowedPaths) -> Manifest:
    """Read the manifest of the recipe's data set and check that it fits the recipe.

    Raises ConfigError for a path that must not be opened, DataError for data that cannot be used. Blocks while the
    storage does not answer.
    """
    check_paths(recipe, allowed)
    manifest = read_data_manifest(recipe)
    planner.check_data(recipe, manifest)
    return manifest


def check_paths(recipe: Recipe, allowed: AllowedPaths) -> None:
    """Raise ConfigError for a recipe with a path outside of the directories that this cluster may use."""
    allowed.check("run_root", recipe.run_root)
    allowed.check("data.path", recipe.data.path)
    if recipe.fine_tuning is not None:
        base = recipe.fine_tuning.base
        allowed.check("fine_tuning.base.path", base.path)
        if base.tokenizer is not None:
            allowed.check("fine_tuning.base.tokenizer.directory", base.tokenizer.directory)


def read_data_manifest(recipe: Recipe) -> Manifest:
    """Read the manifest of the recipe's data set. Raises DataError, with the command that prepares a missing one."""
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
