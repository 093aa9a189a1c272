"""The coordinator's state of a job that is under way."""

from __future__ import annotations

from pathlib import Path

import pytest
from coordinator_fakes import make_manifest, make_recipe

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.recipe.fine_tuning import Base, FineTuning

BASE = Base(kind="huggingface", path="/models/tiny", title="tiny", files=(), sha256="ab" * 32)


@pytest.mark.parametrize(
    ("checkpoints", "validations", "candidates"),
    [
        ({4}, {0: 3.0}, {4}),
        ({4, 8}, {0: 3.0, 4: 2.0}, {4, 8}),
        ({4, 8}, {0: 3.0, 4: 2.0, 8: 2.5}, {4}),
        # 5 and 6 are of pauses, and get no loss.
        ({4, 5, 6, 8}, {0: 3.0, 4: 2.0, 8: 1.5}, {8}),
        # The last version gets one, whatever the interval.
        ({8, 10}, {0: 3.0, 4: 2.0, 8: float("nan")}, {10}),
    ],
)
def test_the_checkpoints_that_may_be_a_result(
    checkpoints: set[int], validations: dict[int, float], candidates: set[int], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, num_steps=10)
    recipe = recipe.model_copy(
        update={
            "validation": recipe.validation.model_copy(update={"interval_steps": 4}),
            "fine_tuning": FineTuning(base=BASE, method="full"),
        }
    )
    record = JobRecord("tiny-1", "tiny", recipe.model_dump_json(), "", str(tmp_path), submitted_unix_ms=1)
    job = ActiveJob(record, recipe, make_manifest(), checkpoints=checkpoints, validations=validations)
    assert job.candidates == candidates
    plain = ActiveJob(record, recipe.model_copy(update={"fine_tuning": None}), make_manifest(), checkpoints=checkpoints)
    assert plain.candidates == set()
