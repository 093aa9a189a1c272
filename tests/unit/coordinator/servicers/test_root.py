"""A coordinator with a root: paths of recipes from other machines lead below it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coordinator_fakes import make_recipe, write_data

from gradstream.client import AsyncClient
from gradstream.coordinator.server import Coordinator
from gradstream.core.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of somebody who submits: it holds neither data nor runs."""
    made = tmp_path / "somebody"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


async def test_data_and_runs_are_below_the_root(tmp_path: Path, here: Path) -> None:
    write_data(tmp_path / "root" / "data")
    recipe = make_recipe(here)
    coordinator = Coordinator("127.0.0.1:0", tmp_path / "state", root=str(tmp_path / "root"))
    await coordinator.start()
    try:
        async with AsyncClient(coordinator.address) as client:
            job = await client.submit(recipe)
        assert Path(job.run_directory).is_relative_to(tmp_path / "root")
        assert Path(job.run_directory).is_dir()
        assert not list(here.iterdir())
        stored = json.loads(coordinator.controller.state.list_jobs()[0].recipe_json)
        assert stored["data"]["path"] == str(tmp_path / "root" / "data")
    finally:
        await coordinator.stop()


async def test_without_a_root_paths_stay(tmp_path: Path, here: Path) -> None:
    coordinator = Coordinator("127.0.0.1:0", tmp_path / "state")
    await coordinator.start()
    try:
        async with AsyncClient(coordinator.address) as client:
            with pytest.raises(DataError, match=f"no data set in {here}/data"):
                await client.submit(make_recipe(here))
    finally:
        await coordinator.stop()
