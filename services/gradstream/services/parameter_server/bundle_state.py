"""The state of one bundle on its server: master weights, optimizer, the sum in progress, published weights.

Methods marked "worker thread" run in the server's thread pool, one at a time for a bundle; all others run on the event
loop. A bundle's fragments lie end to end in flat tensors. Norms, digests and checkpoints are per fragment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import REFERENCE, CheckpointReader, Sizes, sizes_of
from gradstream.core.codecs import Payload
from gradstream.core.codecs.fixed_point import FixedPointSum
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, slices
from gradstream.core.errors import CheckpointError
from gradstream.core.kernels import dense
from gradstream.core.optimizer.optimizer import STEP_COUNT, Optimizer
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.downlink import Downlink
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.recipe.recipe import Recipe
from gradstream.services.parameter_server.bf16_moments import Bf16MomentsOptimizer
from gradstream.services.parameter_server.publication import PublishedBundle, publisher

State = dict[str, npt.NDArray[Any]]
FragmentState = tuple[Fragment, State]
"""A fragment and its arrays by name, as in a checkpoint."""


MAX_ADDED_TOGETHER = 4
"""Contributions that one pass over the sum adds. More would be more streams of memory than a processor prefetches."""


class BundleState:
    """The state of one bundle. Contributions are added as they come, in any order: the sum is in fixed point."""

    def __init__(self, bundle: Bundle, tensors: Sequence[Tensor], recipe: Recipe, form: Downlink, book: CodecBook):
        self.bundle = bundle
        self.published_version = -1
        self.squared_norms = [0.0] * len(bundle.fragments)
        self._tensors = [tensors[fragment.tensor] for fragment in bundle.fragments]
        self._elements_F = np.array([fragment.num_elements for fragment in bundle.fragments], dtype=np.int64)
        self._num_contributions = recipe.training.num_slots * bundle.num_parts
        self._taken = bytearray(self._num_contributions)  # 1 for each contribution that was taken, by slot and part
        self.num_added = 0
        """Number of the step's contributions that are in the sum."""
        self._waiting: list[list[Payload]] = []  # contributions that were taken and are not in the sum yet
        self._adding: list[list[Payload]] = []  # those that are being added
        self._weights_N = torch.zeros(bundle.num_elements)
        elements = [fragment.num_elements for fragment in bundle.fragments]
        self._sum = FixedPointSum(elements, self._num_contributions)
        self._weights = slices(self._weights_N, bundle)
        self._sums = slices(self._sum.result_N, bundle)
        self._optimizer: Optimizer | Bf16MomentsOptimizer
        if recipe.optimizer.moments == "bf16":
            self._optimizer = Bf16MomentsOptimizer(
                self._weights, self._sums, bundle.fragments, self._tensors, recipe.optimizer, recipe.seed
            )
        else:
            decays = [tensor.decay for tensor in self._tensors]
            self._optimizer = Optimizer(self._weights, self._sums, decays, recipe.optimizer)
        self._publishing = threading.Lock()
        self._publisher = publisher(form, bundle, self._weights_N, book, recipe.codec.keyframe_versions)

    # -- accumulation ----------------------------------------------------------------------------------------------

    def has(self, slot: int, part: int) -> bool:
        """Return whether this contribution to the current step was taken."""
        return bool(self._taken[slot * self.bundle.num_parts + part])

    @property
    def complete(self) -> bool:
        """Whether every contribution is in the sum."""
        return self.num_added == self._num_contributions

    def take(self, slot: int, part: int, payloads: list[Payload]) -> None:
        """Take a contribution, still encoded, to be added."""
        self._taken[slot * self.bundle.num_parts + part] = 1
        self._waiting.append(payloads)

    def start_adding(self) -> bool:
        """Start adding, if a contribution waits and none is being added.

        Returns whether it started. If so, the caller must call `add` and then `finish_adding`, and repeat both while
        others wait.
        """
        if self._adding or not self._waiting:
            return False
        self._next()
        return True

    def add(self, codec: BundleCodec, step: int) -> None:
        """Add the contributions that were started with; after the last one of the step compute the squared norms.

        Worker thread.
        """
        codec.add(self._adding, self._sum, step)
        if self.num_added + len(self._adding) == self._num_contributions:
            self._sum.finish()
            # In fp64, in a fixed order and per fragment, so norms do not depend on how fragments are bundled.
            norms_F = np.empty(len(self._sums))
            dense.squared_norms(self._elements_F, self._sums.addresses_F, norms_F)
            self.squared_norms = norms_F.tolist()

    def finish_adding(self) -> tuple[bool, int]:
        """Record that the contributions are in the sum.

        Returns whether others wait, which are then started with, and the payload bytes of those that were added.
        """
        added_bytes = sum(len(payload) for payloads in self._adding for payload in payloads)
        self.num_added += len(self._adding)
        self._next()
        return bool(self._adding), added_bytes

    def _next(self) -> None:
        self._adding, self._waiting = self._waiting[:MAX_ADDED_TOGETHER], self._waiting[MAX_ADDED_TOGETHER:]

    # -- commit ----------------------------------------------------------------------------------------------------

    def apply(self, num_tokens: int, clip_scale: float, rate: float, step: int) -> None:
        """Scale the sum to the clipped mean over the tokens of `step` and update the weights; worker thread."""
        self._sum.result_N.mul_(clip_scale / num_tokens)
        self._optimizer.step(rate, step)

    def publish(self, version: int, codec: str) -> None:
        """Encode a version for workers' pulls; `codec` is the codec of its differences. Worker thread."""
        with self._publishing:
            self._publisher.publish(version, codec)

    def begin_step(self, version: int) -> None:
        """Let workers pull `version`, and reset for that step's contributions."""
        self.published_version = version
        self._taken = bytearray(self._num_contributions)
        self.num_added = 0

    def delta(self) -> PublishedBundle | None:
        """The difference for a worker that holds the version before; None if that worker gets the whole bundle."""
        return self._publisher.delta

    def full(self) -> PublishedBundle:
        """The whole bundle at the published version; worker thread."""
        with self._publishing:
            return self._publisher.full()

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
        states = self._optimizer.state()
        saved_N = self._publisher.saved()
        references = slices(saved_N, self.bundle) if saved_N is not None else []
        found = []
        for number, fragment in enumerate(self.bundle.fragments):
            state = {WEIGHT: self._weights[number].numpy(), **states[number]}
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
        kinds = set(self._optimizer.names())
        states: list[State] = []
        for fragment, tensor in zip(self.bundle.fragments, self._tensors, strict=True):
            name, begin, end = tensor.name, fragment.begin, fragment.end
            state = {kind: reader.read(kind, name, begin, end) for kind in kinds - {STEP_COUNT}}
            state |= {kind: reader.scalar(kind, name, begin) for kind in kinds & {STEP_COUNT}}
            states.append(state)
        self._optimizer.load(states)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, sum, optimizer state, reference and published bundles."""
        weights = 4 * self.bundle.num_elements
        return weights + self._sum.num_bytes + self._optimizer.state_bytes + self._publisher.state_bytes

    @property
    def newcomer_bytes(self) -> int:
        """Bytes, among `state_bytes`, of the whole bundle for a worker without the version before."""
        return self._publisher.newcomer_bytes
