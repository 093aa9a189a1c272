"""The bundles of moments that slots share with local steps: each slot's round begins with the mean of all slots'.

A moment's values lie in the memory of its weights' optimizer. The ordinary steps before the first round therefore
update them, the first round begins with them, and a checkpoint saves them with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradstream.core.codecs.payloads import CodecBook, Slices, slices
from gradstream.core.plan.plan import Plan
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.publication import PublishedBundle, WholePublisher
from gradstream.services.parameter_server.weight_bundle import WeightBundle


class MomentBundle(BundleState):
    """The state of a bundle of moments. Its owner must update the weights of the same fragments first."""

    def __init__(self, plan: Plan, number: int, weights: WeightBundle, book: CodecBook):
        """`number` is the bundle's index in the plan, and `weights` holds the weights of its fragments."""
        bundle = plan.bundle(number)
        self._values = Slices(bundle, weights.moments(bundle))
        codec = book.of(bundle, plan.codec_of(bundle, plan.recipe.codec.pull))
        super().__init__(bundle, plan.num_slots, WholePublisher(bundle, self._values, codec))

    def reported_norms(self) -> list[float]:
        """0 for each fragment: the norm of a round is that of the difference. NaN where a moment is not finite."""
        return [0.0 if math.isfinite(norm) else math.nan for norm in self.squared_norms]

    def apply(self, num_tokens: int, clip_scale: float, rate: float, step: int) -> None:
        """Do nothing: an ordinary step has no contributions to moments. The weights' optimizer has updated them."""

    def apply_round(self, num_tokens: int, num_steps: int) -> None:
        """Replace the moments by the mean over the round's tokens; worker thread."""
        self._sum.result_N.mul_(1.0 / num_tokens)
        for values_N, mean_N in zip(self._values, self._sums, strict=True):
            values_N.copy_(mean_N)

    def preview_round(self, num_tokens: int, version: int, codec: str) -> PublishedBundle | None:
        mean = slices(self._sum.result_N * (1.0 / num_tokens), self.bundle)
        return self._publisher.preview(version, codec, mean)


def moment_bundles(plan: Plan, weights: Iterable[WeightBundle], book: CodecBook) -> dict[int, list[MomentBundle]]:
    """Make the moment bundles that belong to a server's bundles of weights, by the index of the latter."""
    holders = {fragment.index: state for state in weights for fragment in state.bundle.fragments}
    found: dict[int, list[MomentBundle]] = {state.bundle.index: [] for state in holders.values()}
    for bundle in plan.moment_bundles:
        if (holder := holders.get(bundle.fragments[0].index)) is not None:
            found[holder.bundle.index].append(MomentBundle(plan, bundle.index, holder, book))
    return found
