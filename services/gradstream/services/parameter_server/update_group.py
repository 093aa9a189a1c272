"""The bundles of weights that a server updates together: one, or all of a matrix that its rule updates as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradstream.core.optimizer.optimizer import Optimizer
from gradstream.core.optimizer.rules import server_moments
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe
from gradstream.services.parameter_server.weight_bundle import WeightBundle


class UpdateGroup:
    """Bundles that are updated together, once all of them are complete. Several bundles share one optimizer.

    All methods run in a worker thread.
    """

    def __init__(self, bundles: Sequence[WeightBundle], recipe: Recipe):
        self.bundles = bundles
        self._optimizer: Optimizer | None = None
        slices = [each for bundle in bundles for each in bundle.slices]
        if len(bundles) > 1 and any(server_moments(recipe, each.tensor) for each in slices):
            self._optimizer = Optimizer(slices, recipe.optimizer)
            begin = 0
            for bundle in bundles:
                end = begin + len(bundle.slices)
                bundle.join(self._optimizer.part(begin, end))
                begin = end

    def apply(self, num_tokens: int, clip_scale: float, rate: float, step: int) -> None:
        """Update the bundles by the clipped mean of the ordinary step `step` over its tokens."""
        if self._optimizer is None:
            for bundle in self.bundles:
                bundle.apply(num_tokens, clip_scale, rate, step)
            return
        for bundle in self.bundles:
            bundle.scale(num_tokens, clip_scale)
        self._optimizer.step(rate, step)

    def apply_round(self, num_tokens: int, num_steps: int) -> None:
        """Update the bundles by the mean of a round of `num_steps` inner steps over its tokens."""
        for bundle in self.bundles:
            bundle.apply_round(num_tokens, num_steps)

    def publish(self, version: int, codec: str) -> None:
        """Encode a version for workers' pulls; `codec` is the codec of its differences."""
        for bundle in self.bundles:
            bundle.publish(version, codec)


def update_groups(plan: Plan, server: int, bundles: Mapping[int, WeightBundle]) -> list[UpdateGroup]:
    """Make the groups of a server's bundles, which are by their index."""
    return [
        UpdateGroup([bundles[bundle.index] for bundle in group], plan.recipe) for group in plan.update_groups_of(server)
    ]
