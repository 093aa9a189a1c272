"""The memory that a worker needs with local steps: all arrays of a round count."""

from typing import Any

import pytest
from support.micro import micro_plan

from gradstream.coordinator.planning.needs import worker_bytes

NUM_PARAMETERS = 1 << 20
ARRAY_BYTES = 4 * NUM_PARAMETERS
SGD = {"kind": "sgd", "momentum": 0.0, "nesterov": False}


@pytest.mark.parametrize(
    ("inner_state", "optimizer", "num_slots", "arrays", "moments"),
    [
        # The version's weights and moments; the slot's weights, moments and two gradients; what is being encoded.
        ("shared", {}, 2, (1 + 2) + (1 + 2 + 2) + (1 + 2), 2),
        ("shared", {}, 1, (1 + 2) + (1 + 2 + 2), 2),
        ("reset", {}, 2, 1 + (1 + 2 + 2) + 1, 0),
        ("shared", SGD, 2, 1 + (1 + 2) + 1, 0),
    ],
)
def test_a_rounds_arrays(
    inner_state: str, optimizer: dict[str, Any], num_slots: int, arrays: int, moments: int
) -> None:
    local = {"steps": 3, "inner_state": inner_state, "moments": "bf16", "progress_steps": 0}
    sections = {"local": local, "optimizer": optimizer, "codec": {"push": "bf16", "pull": "bf16"}}
    recipe = micro_plan(sections=sections, num_slots=num_slots).recipe
    version = ARRAY_BYTES // 2 * (1 + moments)  # as it arrives, and as big as what a slot contributes
    assert worker_bytes(recipe, NUM_PARAMETERS) == arrays * ARRAY_BYTES + (1 + num_slots) * version
