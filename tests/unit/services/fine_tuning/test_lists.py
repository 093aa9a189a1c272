"""Lists of fine-tunings that are longer than a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from support.canned_coordinator import CannedCoordinator, jobs_of

from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning import servicer
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.servicer import FineTuningServicer
from gradstream.services.fine_tuning.store import Record, Store


async def test_they_come_in_pages_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the oldest too, all that is known comes: nothing is left out where a message fills."""
    monkeypatch.setattr(servicer, "MAX_PAGE_BYTES", 1)
    recipe = parse_fine_tuning_recipe(
        {"name": "task", "base_model": "/models/tiny", "data": {"path": "/data/task.jsonl"}}
    ).model_dump_json()
    store, serving = Store(tmp_path), Serving("cpu", 1 << 30)
    for number in range(3):
        store.create(Record(name=f"task-{number}", created_unix_ms=number + 1, recipe_json=recipe))
    context = cast(Any, None)  # only a refusal has a use for it
    async with jobs_of(CannedCoordinator()) as jobs:
        asked, found = pb.ListFineTuningsRequest(), []
        service = FineTuningServicer(FineTunings(store, jobs, serving), jobs, serving)
        while True:
            page = await service.ListFineTunings(asked, context)
            found += page.fine_tunings
            assert len(page.fine_tunings) == 1
            if not page.next_page_token:
                break
            asked.page_token = page.next_page_token
        generation = await service.GetGeneration(pb.GetGenerationRequest(), context)
        assert generation == pb.GetGenerationResponse(max_cache_bytes=1 << 28)  # a quarter of the service's memory
    await serving.close()
    store.close()
    assert [each.name for each in found] == ["task-2", "task-1", "task-0"]
    assert all(each.recipe_json == recipe for each in found)


async def test_a_repeated_request_needs_nothing_of_what_the_first_one_was_made_of(tmp_path: Path) -> None:
    data = tmp_path / "task.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = {"name": "task", "base_model": str(tmp_path / "base"), "data": {"path": str(data)}}
    recipe["run_root"] = str(tmp_path / "runs")
    asked = pb.CreateFineTuningRequest(recipe_json=parse_fine_tuning_recipe(recipe).model_dump_json(), request_id="one")
    store, serving = Store(tmp_path / "state"), Serving("cpu", 1 << 30)
    context = cast(Any, None)  # only a refusal has a use for it
    async with jobs_of(CannedCoordinator()) as jobs:
        fine_tunings = FineTunings(store, jobs, serving)
        service = FineTuningServicer(fine_tunings, jobs, serving)
        made = (await service.CreateFineTuning(asked, context)).fine_tuning
        data.unlink()
        assert (await service.CreateFineTuning(asked, context)).fine_tuning.created_unix_ms == made.created_unix_ms
        await fine_tunings.close()
    await serving.close()
    store.close()
