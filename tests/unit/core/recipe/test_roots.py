"""The translation of paths in a recipe from another machine."""

from __future__ import annotations

import pytest

from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.roots import moved, moved_fine_tuning_recipe, moved_recipe

HOME = "/home/me/project"
ROOT = "/srv/gradstream"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (f"{HOME}/data/mine", "/srv/gradstream/data/mine"),
        (HOME, "/srv/gradstream"),
        (f"{HOME}/./data//mine", "/srv/gradstream/data/mine"),
        # Not below the client's directory.
        ("/home/me/project-2/data", "/home/me/project-2/data"),
        (f"{HOME}/../secrets", f"{HOME}/../secrets"),
        ("/shared/data", "/shared/data"),
        # Not a path of the client's machine.
        ("s3://bucket/data", "s3://bucket/data"),
        ("job:stdlib-gpt-1@100", "job:stdlib-gpt-1@100"),
    ],
)
def test_only_what_is_below_the_directory_moves(path: str, wanted: str) -> None:
    assert moved(path, HOME, ROOT) == wanted


@pytest.mark.parametrize(("directory", "root"), [(HOME, ""), ("", ROOT), ("/", ROOT)])
def test_nothing_moves_without_root_or_directory(directory: str, root: str) -> None:
    assert moved(f"{HOME}/data", directory, root) == f"{HOME}/data"


def test_a_recipe_moves_its_data_and_its_runs() -> None:
    tree = {"name": "a", "model": {"config": {}}, "training": {"num_steps": 1}}
    recipe = parse_recipe({**tree, "run_root": f"{HOME}/runs", "data": {"path": f"{HOME}/data/a"}})
    found = moved_recipe(recipe, HOME, ROOT)
    assert (found.run_root, found.data.path) == ("/srv/gradstream/runs", "/srv/gradstream/data/a")
    assert moved_recipe(recipe, HOME, "") == recipe


def test_a_fine_tuning_moves_its_base_and_its_examples() -> None:
    data = {"path": f"{HOME}/a.jsonl", "validation_path": "/srv/gradstream/fine-tuning/uploads/b.jsonl"}
    recipe = parse_fine_tuning_recipe(
        {"name": "a", "run_root": f"{HOME}/runs", "base_model": f"{HOME}/models/m", "data": data}
    )
    found = moved_fine_tuning_recipe(recipe, HOME, ROOT)
    assert found.run_root == "/srv/gradstream/runs"
    assert found.base_model == "/srv/gradstream/models/m"
    assert found.data.path == "/srv/gradstream/a.jsonl"
    assert found.data.validation_path == data["validation_path"]
    assert moved_fine_tuning_recipe(recipe, HOME, "") == recipe
