"""One fragment on its server: master weights, optimizer, the sum in progress, and the copy that workers pull.

Methods marked "worker thread" run in the server's thread pool, one at a time for a fragment; everything else on the
event loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.checkpoint import WEIGHT, CheckpointReader
from gradstream.core.codecs import Codec, Payload
from gradstream.core.config import OptimizerConfig
from gradstream.core.errors import CheckpointError
from gradstream.core.fragments import Fragment, Tensor
from gradstream.core.wire import checksum
from gradstream.services.parameter_server.optimizer import STEP_COUNT, FragmentOptimizer


class FragmentState:
    """The state of one fragment. `num_parts` contributions a slot are added in (slot, part) order."""

    def __init__(
        self, fragment: Fragment, tensor: Tensor, num_slots: int, push: Codec, pull: Codec, optimizer: OptimizerConfig
    ):
        self.fragment = fragment
        self.tensor = tensor
        self.num_slots = num_slots
        self.weights_N = torch.zeros(fragment.num_elements)
        self.published: Payload = np.empty(0, dtype=np.uint8)
        self.published_crc32c = 0
        self.published_version = -1
        self.next_slot = 0
        self.adding = False
        self.early: dict[int, Payload] = {}
        self.squared_norm = 0.0
        self._push = push
        self._pull = pull
        self._optimizer = FragmentOptimizer(self.weights_N, tensor.decay, optimizer)
        self._sum_N = torch.zeros(fragment.num_elements)

    # -- accumulation ----------------------------------------------------------------------------------------------

    def has(self, slot: int) -> bool:
        """Whether the slot's contribution to the current step was taken."""
        return slot < self.next_slot or slot in self.early

    @property
    def complete(self) -> bool:
        """Whether every slot's contribution is in the sum."""
        return self.next_slot == self.num_slots

    @property
    def ready_to_add(self) -> bool:
        """Whether the contribution whose turn it is has arrived and nothing is being added."""
        return not self.adding and self.next_slot in self.early

    def add_next(self, payload: Payload, slot: int) -> None:
        """Add slot `slot`'s contribution to the sum; worker thread. After the last one, take the squared norm."""
        if slot == 0:
            self._push.decode(payload, self._sum_N)
        else:
            self._push.decode_add(payload, self._sum_N)
        if slot == self.num_slots - 1:
            # Summed in fp64, so that the global norm is the same to the last bit that matters in fp32.
            self.squared_norm = float(torch.linalg.vector_norm(self._sum_N, dtype=torch.float64)) ** 2

    # -- commit ----------------------------------------------------------------------------------------------------

    def apply(self, num_tokens: int, clip_scale: float, rate: float) -> None:
        """Divide the sum by the step's tokens, clip, update the weights, encode the copy to publish; worker thread."""
        self._sum_N.div_(float(num_tokens))
        self._sum_N.mul_(clip_scale)
        self._optimizer.step(self._sum_N, rate)
        self.encode()

    def encode(self) -> None:
        """Encode the copy to publish; worker thread."""
        self.published = self._pull.encode(self.weights_N)
        self.published_crc32c = checksum(self.published)

    def begin_step(self, version: int) -> None:
        """Publish the copy as `version` and be ready for that step's contributions."""
        self.published_version = version
        self.next_slot = 0
        self.early.clear()

    # -- state -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, npt.NDArray[np.float32]]:
        """A copy of weights and optimizer state; worker thread."""
        arrays = {WEIGHT: self.weights_N.numpy(), **self._optimizer.state()}
        return {name: array.copy() for name, array in arrays.items()}

    def initialize(self, tensor: torch.Tensor) -> None:
        """Take the initial weights from the whole tensor."""
        self.weights_N.copy_(tensor.reshape(-1)[self.fragment.begin : self.fragment.end])

    def load(self, reader: CheckpointReader) -> None:
        """Take weights and optimizer state from a checkpoint. Raises CheckpointError."""
        name, begin, end = self.tensor.name, self.fragment.begin, self.fragment.end
        if reader.shape(name) != self.tensor.shape:
            raise CheckpointError(
                f"checkpoint {reader.directory}: tensor '{name}' has shape {list(reader.shape(name))}, the recipe's "
                f"model {list(self.tensor.shape)}; use the model config of the checkpoint"
            )
        self.weights_N.copy_(torch.from_numpy(reader.read(WEIGHT, name, begin, end)))
        read: Callable[[str], npt.NDArray[np.float32]] = lambda kind: (  # noqa: E731
            reader.scalar(kind, name, begin) if kind == STEP_COUNT else reader.read(kind, name, begin, end)
        )
        self._optimizer.load({kind: read(kind) for kind in self._optimizer.names()})

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, sum, optimizer state and published copy."""
        return 8 * self.fragment.num_elements + self._optimizer.state_bytes + self.published.nbytes

    @property
    def early_bytes(self) -> int:
        """Bytes of contributions that wait for their turn."""
        return sum(payload.nbytes for payload in self.early.values())
