"""The state of one bundle on its server: master weights, optimizer, the sum in progress, published weights.

Methods marked "worker thread" run in the server's thread pool, one at a time for a bundle; all others run on the event
loop. A bundle's fragments lie end to end in flat tensors. Norms, digests and checkpoints are per fragment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import REFERENCE, CheckpointReader, Sizes, sizes_of
from gradstream.core.codecs import Payload
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, slices
from gradstream.core.errors import CheckpointError
from gradstream.core.kernels import dense
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.downlink import Downlink
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.recipe.recipe import Recipe
from gradstream.services.parameter_server.optimizer import STEP_COUNT, BundleOptimizer
from gradstream.services.parameter_server.publication import PublishedBundle, publisher

State = dict[str, npt.NDArray[np.float32]]
FragmentState = tuple[Fragment, State]
"""A fragment and its arrays by name, as in a checkpoint."""


class BundleState:
    """The state of one bundle. Contributions are added in turn: in slot order, and within a slot part by part."""

    def __init__(self, bundle: Bundle, tensors: Sequence[Tensor], recipe: Recipe, form: Downlink, book: CodecBook):
        self.bundle = bundle
        self.published_version = -1
        self.next_turn = 0
        """The turn of the contribution that will be added next, or is being added now."""
        self.squared_norms = [0.0] * len(bundle.fragments)
        self._tensors = [tensors[fragment.tensor] for fragment in bundle.fragments]
        self._elements_F = np.array([fragment.num_elements for fragment in bundle.fragments], dtype=np.int64)
        self._num_turns = recipe.training.num_slots * bundle.num_parts
        self._early: dict[int, list[Payload]] = {}  # contributions not in the sum yet, by turn
        self._adding = False  # whether contributions are being added
        self._weights_N = torch.zeros(bundle.num_elements)
        self._sum_N = torch.zeros(bundle.num_elements)
        self._weights = slices(self._weights_N, bundle)
        self._sums = slices(self._sum_N, bundle)
        self._optimizer = BundleOptimizer(
            self._weights, self._sums, [tensor.decay for tensor in self._tensors], recipe.optimizer
        )
        self._publishing = threading.Lock()
        self._publisher = publisher(form, bundle, self._weights_N, book, recipe.codec.keyframe_versions)

    # -- accumulation ----------------------------------------------------------------------------------------------

    def turn(self, slot: int, part: int) -> int:
        """The position of a contribution in the order of addition."""
        return slot * self.bundle.num_parts + part

    def has(self, turn: int) -> bool:
        """Return whether this contribution to the current step was taken."""
        return turn < self.next_turn or turn in self._early

    def has_slot(self, slot: int) -> bool:
        """Return whether all parts of a slot's contribution to the current step were taken."""
        return all(self.has(self.turn(slot, part)) for part in range(self.bundle.num_parts))

    @property
    def complete(self) -> bool:
        """Whether every contribution is in the sum."""
        return self.next_turn == self._num_turns

    def take(self, turn: int, payloads: list[Payload]) -> None:
        """Keep a contribution, still encoded, until its turn comes."""
        self._early[turn] = payloads

    def start_adding(self) -> bool:
        """Start adding, if the contribution whose turn it is has arrived and none is being added.

        Returns whether it started. If so, the caller must call `add_next` and then `finish_adding`, and repeat both
        while `finish_adding` returns True.
        """
        if self._adding or self.next_turn not in self._early:
            return False
        self._adding = True
        return True

    def add_next(self, codec: BundleCodec, step: int) -> None:
        """Add the contribution whose turn it is to the sum; after the last one, compute the squared norms.

        Worker thread.
        """
        turn, payloads = self.next_turn, self._early[self.next_turn]
        if turn == 0:
            codec.decode(payloads, self._sums, step)
        else:
            codec.decode_add(payloads, self._sums, step)
        if turn == self._num_turns - 1:
            # In fp64, in a fixed order and per fragment, so norms do not depend on how fragments are bundled.
            norms_F = np.empty(len(self._sums))
            dense.squared_norms(self._elements_F, self._sums.addresses_F, norms_F)
            self.squared_norms = norms_F.tolist()

    def finish_adding(self) -> bool:
        """Record that the contribution whose turn it was is in the sum; return whether the next one has arrived."""
        # Not earlier: until a contribution is added, its entry here is how duplicates are recognized.
        del self._early[self.next_turn]
        self.next_turn += 1
        self._adding = self.next_turn in self._early
        return self._adding

    # -- commit ----------------------------------------------------------------------------------------------------

    def apply(self, num_tokens: int, clip_scale: float, rate: float) -> None:
        """Scale the sum to the clipped mean over the step's tokens and update the weights; worker thread."""
        self._sum_N.mul_(clip_scale / num_tokens)
        self._optimizer.step(rate)

    def publish(self, version: int, codec: str) -> None:
        """Encode a version for workers' pulls; `codec` is the codec of its differences. Worker thread."""
        with self._publishing:
            self._publisher.publish(version, codec)

    def begin_step(self, version: int) -> None:
        """Let workers pull `version`, and reset for that step's contributions."""
        self.published_version = version
        self.next_turn = 0
        self._early.clear()

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
                copied[name] = out[begin : begin + array.nbytes].view(array.dtype)
                begin += array.nbytes
                # torch's copy releases the interpreter lock.
                torch.from_numpy(copied[name]).copy_(torch.from_numpy(array))
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
        return 8 * self.bundle.num_elements + self._optimizer.state_bytes + self._publisher.state_bytes

    @property
    def newcomer_bytes(self) -> int:
        """Bytes, among `state_bytes`, of the whole bundle for a worker without the version before."""
        return self._publisher.newcomer_bytes

    @property
    def early_bytes(self) -> int:
        """Bytes of contributions that wait for their turn."""
        return sum(len(payload) for payloads in self._early.values() for payload in payloads)
