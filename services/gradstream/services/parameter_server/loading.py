"""Loads a shard's bundles at its start: from a checkpoint, from a pretrained model or from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch

from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.errors import CheckpointError
from gradstream.core.model.drawing import draw
from gradstream.core.plan.plan import Plan
from gradstream.core.pretrained.base import BaseReader
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.weight_bundle import WeightBundle


def load_bundles(plan: Plan, states: Sequence[WeightBundle], pulled: Sequence[BundleState], pull_codec: str) -> int:
    """Fill the bundles of weights from the plan's source and publish its start version. Worker thread.

    `pulled` are all bundles that the version has, those of moments too, whose values the bundles of weights hold.
    Returns the number of consecutive skips before that version. Raises CheckpointError.
    """
    num_skips = 0
    if plan.checkpoint_path:
        reader = CheckpointReader(plan.checkpoint_path)
        for state in states:
            state.load(reader)
        num_skips = reader.manifest.progress.get("consecutive_skips", 0)
    elif (tuning := plan.recipe.fine_tuning) is not None and plan.lora is None:
        base = BaseReader(tuning.base)
        for state in states:
            state.take_base(base)
    elif (start := plan.recipe.start_from) is not None:
        reader = CheckpointReader(start.checkpoint or start.weights)
        if reader.manifest.state_sha256 != start.state_sha256:
            raise CheckpointError(
                f"checkpoint {reader.directory} is not the one that the job was submitted with; restore that one, or "
                f"submit the job again"
            )
        for state in states:
            state.take_start(reader, start.optimizer)
    else:
        _initialize(plan, states)
    for bundle in pulled:
        bundle.publish(plan.start_version, pull_codec)
    return num_skips


def _initialize(plan: Plan, states: Sequence[WeightBundle]) -> None:
    """Draw the initial weights from the seed, one fragment at a time."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    places: dict[tuple[str, int], tuple[WeightBundle, int]] = {}
    for state in states:
        for number, fragment in enumerate(state.bundle.fragments):
            name = plan.tensors[fragment.tensor].name
            wanted.setdefault(name, []).append((fragment.begin, fragment.end))
            places[name, fragment.begin] = state, number
    with closing(draw(plan.model_config, plan.recipe.seed, wanted, plan.lora)) as drawn:
        for name, begin, slice_N in drawn:
            state, number = places[name, begin]
            state.initialize(number, torch.from_numpy(slice_N))
