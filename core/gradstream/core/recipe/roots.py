"""Recipes from other machines: where their relative paths lead.

A client makes a recipe's relative paths absolute against its own directory, and says which that was. On one machine, or
with a directory that all share, this is all there is to do. A service in a container is given a root instead: what lay
below the client's directory is looked for, and written, below the root.
"""

from __future__ import annotations

import os.path
from pathlib import PurePosixPath

from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
from gradstream.core.recipe.recipe import Recipe


def moved(path: str, directory: str, root: str) -> str:
    """`path` as it is, or below `root` when it is below `directory`: all absolute, `path` possibly a URL.

    Without a root, from a client that names no directory, or from one in the topmost directory, which everything is
    below of, nothing moves.
    """
    if not root or not path.startswith("/") or directory in ("", "/"):
        return path
    try:
        below = PurePosixPath(os.path.normpath(path)).relative_to(os.path.normpath(directory))
    except ValueError:
        return path
    return str(PurePosixPath(root) / below)


def moved_recipe(recipe: Recipe, directory: str, root: str) -> Recipe:
    """A recipe whose paths that a service uses (run_root, data.path) are moved."""
    data = recipe.data.model_copy(update={"path": moved(recipe.data.path, directory, root)})
    return recipe.model_copy(update={"run_root": moved(recipe.run_root, directory, root), "data": data})


def moved_fine_tuning_recipe(recipe: FineTuningRecipe, directory: str, root: str) -> FineTuningRecipe:
    """The same for a fine-tuning: run_root, the base and the examples."""
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
