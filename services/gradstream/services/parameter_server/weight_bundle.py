"""The bundles of weights on a server: master weights, the optimizer and outer rule that update them, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import OUTER_MOMENTUM, REFERENCE, CheckpointReader, Sizes, sizes_of
from gradstream.core.codecs.payloads import CodecBook, slices
from gradstream.core.errors import CheckpointError
from gradstream.core.optimizer.optimizer import STEP_COUNT, Optimizer, OptimizerState
from gradstream.core.optimizer.outer import OuterOptimizer
from gradstream.core.optimizer.rule import Slice
from gradstream.core.optimizer.rules import server_moments, shared_moments, whole_tensors
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.downlink import Downlink
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.recipe.recipe import Recipe
from gradstream.services.parameter_server.bf16_moments import Bf16MomentsOptimizer
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.publication import PublishedBundle, publisher

State = dict[str, npt.NDArray[Any]]
FragmentState = tuple[Fragment, State]
"""A fragment and its arrays by name, as in a checkpoint."""


class WeightBundle(BundleState):
    """The state of a bundle of weights. An ordinary step's mean gradient updates them, or a round's mean difference.

    A bundle with a part of a matrix that its rule updates as a whole has no optimizer until it joins the matrix's other
    bundles (`update_group.py`).
    """

    def __init__(self, bundle: Bundle, tensors: Sequence[Tensor], recipe: Recipe, form: Downlink, book: CodecBook):
        self._weights_N = torch.zeros(bundle.num_elements)
        made = publisher(form, bundle, self._weights_N, book, recipe.codec.keyframe_versions)
        super().__init__(bundle, recipe.training.num_slots, made)
        self._tensors = [tensors[fragment.tensor] for fragment in bundle.fragments]
        self._weights = slices(self._weights_N, bundle)
        self._optimizer: OptimizerState | Bf16MomentsOptimizer | None = None
        if recipe.optimizer.moments == "bf16":
            self._optimizer = Bf16MomentsOptimizer(
                self._weights, self._sums, bundle.fragments, self._tensors, recipe.optimizer, recipe.seed
            )
        elif any(server_moments(recipe, tensor) for tensor in self._tensors):
            whole = whole_tensors(recipe.optimizer, self._tensors)
            if all(self._tensors[number].num_elements == len(self._weights[number]) for number in whole):
                self._optimizer = Optimizer(self.slices, recipe.optimizer)
        self._outer: OuterOptimizer | None = None
        self._shares_moments = any(shared_moments(recipe, tensor) for tensor in self._tensors)
        if recipe.local is not None:
            self._outer = OuterOptimizer(self._weights, self._sums, recipe.local.outer)

    @property
    def slices(self) -> list[Slice]:
        """The fragments as the optimizer updates them."""
        return [Slice(*each) for each in zip(self._weights, self._sums, self._tensors, strict=True)]

    def join(self, optimizer: OptimizerState) -> None:
        """Take the state of the bundle's fragments in an optimizer of several bundles."""
        self._optimizer = optimizer

    def moments(self, bundle: Bundle) -> list[torch.Tensor]:
        """The moment `bundle.array` of each fragment of `bundle`, in the optimizer's own memory."""
        assert isinstance(self._optimizer, OptimizerState)
        numbers = {fragment.index: number for number, fragment in enumerate(self.bundle.fragments)}
        return [self._optimizer.moment(bundle.array, numbers[fragment.index]) for fragment in bundle.fragments]

    # -- commit ----------------------------------------------------------------------------------------------------

    def reported_norms(self) -> list[float]:
        """The squared norm of each fragment's sum."""
        return self.squared_norms

    def apply(self, num_tokens: int, clip_scale: float, rate: float, step: int) -> None:
        """Scale the sum to the clipped mean over the tokens of `step` and update the weights; worker thread."""
        assert isinstance(self._optimizer, Optimizer | Bf16MomentsOptimizer)
        self.scale(num_tokens, clip_scale)
        self._optimizer.step(rate, step)

    def scale(self, num_tokens: int, clip_scale: float) -> None:
        """Scale the sum to the clipped mean over a step's tokens; worker thread."""
        self._sum.result_N.mul_(clip_scale / num_tokens)

    def apply_round(self, num_tokens: int, num_steps: int) -> None:
        """Scale the sum to the mean difference of a round and update the weights; worker thread."""
        assert self._outer is not None
        self._sum.result_N.mul_(1.0 / num_tokens)
        self._outer.step()
        if self._shares_moments and isinstance(self._optimizer, OptimizerState):
            self._optimizer.count(num_steps)

    def preview_round(self, num_tokens: int, version: int, codec: str) -> PublishedBundle | None:
        assert self._outer is not None
        weights = slices(self._weights_N.clone(), self.bundle)
        self._outer.preview(weights, slices(self._sum.result_N * (1.0 / num_tokens), self.bundle))
        return self._publisher.preview(version, codec, weights)

    # -- state -----------------------------------------------------------------------------------------------------

    def saved_sizes(self) -> list[tuple[Fragment, Sizes]]:
        """The kinds and sizes of the arrays that a checkpoint holds of each fragment, as in `snapshot`."""
        return [(fragment, sizes_of(state)) for fragment, state in self._saved()]

    @property
    def saved_bytes(self) -> int:
        """Bytes of a snapshot."""
        return sum(array.nbytes for _, state in self._saved() for array in state.values())

    def snapshot(self, out: npt.NDArray[np.uint8] | None = None) -> list[FragmentState]:
        """Copy the weights, optimizer state and reference of each fragment, one after the other. Worker thread.

        The copies lie in `out`, which has at least `saved_bytes`; without it, in new memory.
        """
        if out is None:
            out = np.empty(self.saved_bytes, dtype=np.uint8)
        copies: list[FragmentState] = []
        begin = 0
        for fragment, state in self._saved():
            copied: State = {}
            for name, array in state.items():
                copy = out[begin : begin + array.nbytes]
                begin += array.nbytes
                # torch's copy releases the interpreter lock.
                torch.from_numpy(copy).copy_(torch.from_numpy(array.view(np.uint8)))
                copied[name] = copy.view(array.dtype)
            copies.append((fragment, copied))
        return copies

    def _saved(self) -> list[FragmentState]:
        """What a checkpoint holds of each fragment, as views."""
        states: list[State] = self._optimizer.state() if self._optimizer is not None else [{} for _ in self._weights]
        momenta = self._outer.momenta if self._outer is not None else []
        saved_N = self._publisher.saved()
        references = slices(saved_N, self.bundle) if saved_N is not None else []
        found = []
        for number, fragment in enumerate(self.bundle.fragments):
            state = {WEIGHT: self._weights[number].numpy(), **states[number]}
            if momenta:
                state[OUTER_MOMENTUM] = momenta[number].numpy()
            if references:
                state[REFERENCE] = references[number].numpy()
            found.append((fragment, state))
        return found

    def initialize(self, number: int, slice_N: torch.Tensor) -> None:
        """Copy the initial weights of fragment `number` of the bundle."""
        self._weights[number].copy_(slice_N)

    def take_base(self, reader: BaseReader) -> None:
        """Load the initial weights from a pretrained model, slice by slice. Raises CheckpointError."""
        for number, (fragment, tensor) in enumerate(zip(self.bundle.fragments, self._tensors, strict=True)):
            slice_N = reader.read(tensor.name, fragment.begin, fragment.end)
            self._weights[number].copy_(torch.from_numpy(slice_N))

    def take_start(self, reader: CheckpointReader, with_optimizer: bool) -> None:
        """Load the initial weights from another job's checkpoint, and the optimizer state if asked for.

        The reference is the new job's own: it begins with the weights. Raises CheckpointError.
        """
        self._load_weights(reader)
        if with_optimizer:
            self._load_optimizer(reader)

    def load(self, reader: CheckpointReader) -> None:
        """Load weights, optimizer state and the reference from a checkpoint. Raises CheckpointError."""
        self._load_weights(reader)
        self._load_optimizer(reader)
        saved_N = self._publisher.saved()
        if saved_N is None:
            return
        reference_N = torch.empty_like(saved_N)
        references = slices(reference_N, self.bundle)
        for number, (fragment, tensor) in enumerate(zip(self.bundle.fragments, self._tensors, strict=True)):
            slice_N = reader.read(REFERENCE, tensor.name, fragment.begin, fragment.end)
            references[number].copy_(torch.from_numpy(slice_N))
        self._publisher.restore(reference_N)

    def _load_weights(self, reader: CheckpointReader) -> None:
        for number, (fragment, tensor) in enumerate(zip(self.bundle.fragments, self._tensors, strict=True)):
            name = tensor.name
            if reader.shape(name) != tensor.shape:
                raise CheckpointError(
                    f"checkpoint {reader.directory}: tensor '{name}' has shape {list(reader.shape(name))}, the "
                    f"recipe's model {list(tensor.shape)}; use the model config of the checkpoint"
                )
            self._weights[number].copy_(torch.from_numpy(reader.read(WEIGHT, name, fragment.begin, fragment.end)))

    def _load_optimizer(self, reader: CheckpointReader) -> None:
        """Load the optimizer's state, and the outer momentum. The latter stays zeros if the checkpoint has none."""
        momenta = self._outer.momenta if self._outer is not None and OUTER_MOMENTUM in reader.kinds else []
        states: list[State] = []
        for number, (fragment, tensor) in enumerate(zip(self.bundle.fragments, self._tensors, strict=True)):
            name, begin, end = tensor.name, fragment.begin, fragment.end
            kinds = set(self._optimizer.names(number)) if self._optimizer is not None else set()
            state = {kind: reader.read(kind, name, begin, end) for kind in kinds - {STEP_COUNT}}
            state |= {kind: reader.scalar(kind, name, begin) for kind in kinds & {STEP_COUNT}}
            states.append(state)
            if momenta:
                momenta[number].copy_(torch.from_numpy(reader.read(OUTER_MOMENTUM, name, begin, end)))
        if self._optimizer is not None:
            self._optimizer.load(states)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, sum, optimizer state, outer momentum, reference and published bundles."""
        held = sum(part.state_bytes for part in (self._optimizer, self._outer) if part is not None)
        return 4 * self.bundle.num_elements + held + super().state_bytes
