"""Muon: momentum whose matrices are orthogonalized. The rule of torch.optim.Muon, in fp32, with the same bits anywhere.

The bits do not depend on the number of threads, nor on how a matrix is cut into slices:
  1. every operation on elements is one product or one sum, which every kernel rounds alike, at the end of a range as in
     its middle, so slices give the bits of the whole;
  2. every product of matrices runs on one thread, because the bits of some sizes depend on the number of threads.
     A process with more threads updates as many matrices at a time instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from gradstream.core.optimizer.rule import Rule, Slice, Updated
from gradstream.core.recipe.recipe import OptimizerConfig

if TYPE_CHECKING:
    import torch

BUFFER = "momentum_buffer"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: Keller Jordan's, which have the largest slope at zero."""
NUM_ITERATIONS = 5
MIN_NORM = 1e-7
"""A matrix with a smaller norm is divided by this number instead of its norm."""
RMS = 0.2
"""The root mean square of an update of learning rate 1, about that of AdamW (Liu et al. 2025, arXiv 2502.16982)."""


def orthogonalize(update_RC: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a contiguous fp32 matrix close to 1 by five Newton-Schulz iterations.

    The result is a new matrix. Its singular values lie between about 0.7 and 1.2, except those that were tiny beside
    the largest. torch.optim.Muon does the same in bf16.
    """
    import torch

    a, b, c = COEFFICIENTS
    norm: torch.Tensor = update_RC.norm()
    x_MN: torch.Tensor = update_RC / norm.clamp(min=MIN_NORM)
    is_tall = x_MN.shape[0] > x_MN.shape[1]
    if is_tall:
        x_MN = x_MN.T.contiguous()  # the product with the transpose is then the smaller one
    for _ in range(NUM_ITERATIONS):
        gram_MM = x_MN @ x_MN.T
        polynomial_MM = torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c)
        x_MN = torch.addmm(x_MN, polynomial_MM, x_MN, beta=a)
    return x_MN.T.contiguous() if is_tall else x_MN


@dataclass(frozen=True)
class _Matrix:
    """A matrix: its slices, and its momentum in one piece."""

    slices: list[Slice]
    momentum: torch.Tensor
    weight_decay: float


class Muon(Rule):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers: not the embedding and not the head.

    The learning rate is that of AdamW: an update is scaled by 0.2 times the root of the matrix's longer side.
    """

    arrays = (BUFFER,)
    whole = True

    def __init__(self, slices: Sequence[Slice], config: OptimizerConfig):
        import torch

        super().__init__(slices, config)
        numbers: dict[str, list[int]] = {}
        for number, each in enumerate(slices):
            numbers.setdefault(each.tensor.name, []).append(number)
        self._matrices: list[_Matrix] = []
        self._parts: dict[int, torch.Tensor] = {}
        for found in numbers.values():
            own = [slices[number] for number in found]
            tensor = own[0].tensor
            momentum_RC = torch.zeros(tensor.shape, device=own[0].weights.device)
            self._matrices.append(_Matrix(own, momentum_RC, config.weight_decay if tensor.decay else 0.0))
            self._parts |= zip(found, _cut(momentum_RC, own), strict=True)

    @classmethod
    def takes(cls, tensor: Updated) -> bool:
        return tensor.kind == "matrix" and len(tensor.shape) == 2

    @classmethod
    def moments(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return (BUFFER,)

    def step(self, rate: float) -> None:
        import torch

        num_threads = torch.get_num_threads()
        if num_threads > 1 and all(matrix.momentum.is_cpu for matrix in self._matrices):
            list(_single_threads(num_threads).map(lambda matrix: self._update(matrix, rate), self._matrices))
            return
        for matrix in self._matrices:
            self._update(matrix, rate)

    def _update(self, matrix: _Matrix, rate: float) -> None:
        import torch

        settings, shape = self.config.muon, matrix.momentum.shape
        with torch.no_grad():
            new_RC = torch.cat([each.gradient for each in matrix.slices]).view(shape).mul_(1 - settings.momentum)
            update_RC = matrix.momentum.mul_(settings.momentum).add_(new_RC)
            if settings.nesterov:
                update_RC = new_RC.add_(matrix.momentum * settings.momentum)
            orthogonal_RC = orthogonalize(update_RC).mul_(-rate * RMS * math.sqrt(max(shape)))
            parts = _cut(orthogonal_RC, matrix.slices)
            for each, part_N in zip(matrix.slices, parts, strict=True):
                each.weights.mul_(1 - rate * matrix.weight_decay).add_(part_N)

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        return {BUFFER: self._parts[number]}


def _cut(matrix_RC: torch.Tensor, slices: Sequence[Slice]) -> list[torch.Tensor]:
    """The part of a matrix that each slice has, as flat views."""
    parts, begin = [], 0
    for each in slices:
        parts.append(matrix_RC.view(-1)[begin : begin + each.weights.numel()])
        begin += each.weights.numel()
    return parts


@cache
def _single_threads(num_threads: int) -> ThreadPoolExecutor:
    """Make threads of which each runs torch's operations on itself alone, for as long as the process lives.

    torch keeps the number of an operation's threads for each thread that calls it. A thread that asks for the first
    time takes over the number that was set last in the process, so that number is set again at the end.
    """
    import torch

    all_run = threading.Barrier(num_threads + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_run.wait()

    pool = ThreadPoolExecutor(num_threads, "muon")
    for _ in range(num_threads):
        pool.submit(begin)
    all_run.wait()
    torch.set_num_threads(num_threads)
    return pool
