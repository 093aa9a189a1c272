"""Paths in recipes from other machines.

A client makes a recipe's relative paths absolute against its own directory, and sends the directory too. On one
machine, or with a shared directory, these paths are right. A service in a container has a root instead: paths below the
client's directory are moved below the root, for reading and writing.
"""

from __future__ import annotations

import os.path
from pathlib import PurePosixPath

from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
from gradstream.core.recipe.recipe import Recipe


def moved(path: str, directory: str, root: str) -> str:
    """Move a path below `directory` to the same place below `root`; return other paths unchanged.

    All three are absolute; `path` may be a URL. No path moves without a root, without a directory, or if the directory
    is the topmost one, because every path lies below it.
    """
    if not root or not path.startswith("/") or directory in ("", "/"):
        return path
    try:
        below = PurePosixPath(os.path.normpath(path)).relative_to(os.path.normpath(directory))
    except ValueError:
        return path
    return str(PurePosixPath(root) / below)


def moved_recipe(recipe: Recipe, directory: str, root: str) -> Recipe:
    """A recipe with the paths moved that a service uses: run_root and data.path."""
    data = recipe.data.model_copy(update={"path": moved(recipe.data.path, directory, root)})
    start = recipe.start_from
    if start is not None and start.job is None:
        start = start.model_copy(update={"weights": moved(start.weights, directory, root)})
    changes = {"run_root": moved(recipe.run_root, directory, root), "data": data, "start_from": start}
    return recipe.model_copy(update=changes)


def moved_fine_tuning_recipe(recipe: FineTuningRecipe, directory: str, root: str) -> FineTuningRecipe:
    """A fine-tuning recipe with its paths moved: run_root, the base and the examples."""
    data = recipe.data
    held_out = data.validation_path
    data = data.model_copy(
        update={
            "path": moved(data.path, directory, root),
            "validation_path": moved(held_out, directory, root) if held_out else None,
        }
    )
    return recipe.model_copy(
        update={
            "run_root": moved(recipe.run_root, directory, root),
            "base_model": moved(recipe.base_model, directory, root),
            "data": data,
        }
    )
