"""The reduction that ends an inner step of a round: a replica's workers add the parts of tied tensors' gradients, and
agree on the clip factor.

    place 0 ── squared norms, gradients of tied tensors ──▶ place 1 ── … ──▶ last place
    place 0 ◀── clip factor, sums of tied tensors ───────── place 1 ◀── … ── last place

There is one message a neighbour and direction. The plan determines its size. The squared norm of each tensor is
computed whole, and math.fsum adds them exactly. So the factor does not depend on where the model is cut.

Shape legend: N elements of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from gradstream.core.kernels.codec import squared_norm
from gradstream.core.plan.plan import Plan
from gradstream.worker.pipeline.inbound import BACKWARD, FORWARD
from gradstream.worker.pipeline.layout import Layout
from gradstream.worker.pipeline.neighbours import Neighbours


class Reducer:
    """Reduces the gradients of inner steps over a replica. Runs in the compute thread."""

    def __init__(self, plan: Plan, worker: int):
        """`worker` is the worker's place in the replica."""
        self._layout = Layout(plan)
        self._place, self._is_last = worker, worker + 1 == plan.replica_size
        self._clip_norm = plan.recipe.optimizer.clip_norm
        self._own = [tensor for tensor, found in enumerate(map(plan.places_of, plan.tensors)) if max(found) == worker]

    def reduce(self, gradients: Mapping[int, torch.Tensor], neighbours: Neighbours | None) -> float:
        """Make the gradients of tied tensors whole, in place, and return the factor that clips all gradients.

        `gradients` are flat fp32 tensors by number, of all tensors that this worker uses: of each the parts that this
        worker computes. The factor is that of torch.nn.utils.clip_grad_norm_; NaN where the norm is not finite: a
        gradient that is not finite must spoil the whole round, and a factor of 0 would leave most weights as they are.
        `neighbours` is None if the worker is alone in its replica. Raises AbandonedError.
        """
        layout, place = self._layout, self._place
        squares: list[float] = []
        passing: dict[int, torch.Tensor] = {}
        if place:
            assert neighbours is not None
            squares, passing = layout.unpack(neighbours.receive_reduction(FORWARD), place - 1, FORWARD)
            for tensor in passing.keys() & gradients.keys():
                # Two terms: their order does not change the sum.
                gradients[tensor].add_(passing.pop(tensor).to(gradients[tensor].device))
        squares += squared_norms([gradients[tensor] for tensor in self._own])
        if self._is_last:
            factor, sums = clip_factor(squares, self._clip_norm), dict[int, torch.Tensor]()
        else:
            assert neighbours is not None
            sent = [passing[tensor] if tensor in passing else gradients[tensor] for tensor in layout.tensors(place)]
            neighbours.send_reduction(FORWARD, layout.pack(squares, sent))
            passing.clear()
            (factor,), sums = layout.unpack(neighbours.receive_reduction(BACKWARD), place, BACKWARD)
            for tensor in sums.keys() & gradients.keys():
                gradients[tensor].copy_(sums[tensor])
        if place:
            assert neighbours is not None
            sent = [sums[tensor] if tensor in sums else gradients[tensor] for tensor in layout.tensors(place - 1)]
            neighbours.send_reduction(BACKWARD, layout.pack([factor], sent))
        return factor


def squared_norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """The squared norm of each gradient, in fp64."""
    if not gradients:
        return []
    if gradients[0].device.type == "cpu":
        return [squared_norm(gradient_N.numpy()) for gradient_N in gradients]
    norms = [torch.linalg.vector_norm(gradient_N, dtype=torch.float64) for gradient_N in gradients]
    found: list[float] = torch.stack(norms).square().tolist()
    return found


def clip_factor(squares: Sequence[float], clip_norm: float) -> float:
    """The factor of torch.nn.utils.clip_grad_norm_ for these squared norms; NaN where their sum is not finite."""
    if not all(map(math.isfinite, squares)):
        return math.nan
    try:
        return min(1.0, clip_norm / (math.sqrt(math.fsum(squares)) + 1e-6))
    except OverflowError:
        return math.nan
