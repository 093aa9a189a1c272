"""What a server holds of every bundle: the sum of the step under way, and what workers pull.

`weight_bundle.py` has the bundles of weights, and `moment_bundle.py` those of the moments that slots share with local
steps. Methods marked "worker thread" run in the server's thread pool, one at a time for a bundle; all others run on the
event loop. A bundle's fragments lie end to end in flat tensors. Norms, digests and checkpoints are per fragment.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

import numpy as np

from gradstream.core.codecs import Payload
from gradstream.core.codecs.fixed_point import FixedPointSum
from gradstream.core.codecs.payloads import BundleCodec, slices
from gradstream.core.kernels import dense
from gradstream.core.plan.bundles import Bundle
from gradstream.services.parameter_server.publication import PublishedBundle, Publisher

MAX_ADDED_TOGETHER = 4
"""Contributions that one pass over the sum adds. More would be more streams of memory than a processor prefetches."""


class BundleState(ABC):
    """The state of one bundle. Contributions are added as they come, in any order: the sum is in fixed point."""

    def __init__(self, bundle: Bundle, num_slots: int, publisher: Publisher):
        self.bundle = bundle
        self.published_version = -1
        self.squared_norms = [0.0] * len(bundle.fragments)
        """The squared norm of each fragment's sum, once the sum is complete."""
        self._elements_F = np.array([fragment.num_elements for fragment in bundle.fragments], dtype=np.int64)
        self._num_slots, self._num_parts = num_slots, bundle.num_parts
        self._num_counted = num_slots  # slots that the sum is made of
        self._taken = bytearray(num_slots * bundle.num_parts)  # 1 for each contribution taken, by slot and part
        self.num_added = 0
        """Number of the step's contributions that are in the sum."""
        self._waiting: list[list[Payload]] = []  # contributions that were taken and are not in the sum yet
        self._adding: list[list[Payload]] = []  # those that are being added
        elements = [fragment.num_elements for fragment in bundle.fragments]
        self._sum = FixedPointSum(elements, len(self._taken))  # a round has fewer contributions: it fits, too
        self._sums = slices(self._sum.result_N, bundle)
        self._publishing = threading.Lock()
        self._publisher = publisher

    # -- accumulation ----------------------------------------------------------------------------------------------

    def has(self, slot: int, part: int) -> bool:
        """Return whether this contribution to the current step was taken."""
        return bool(self._taken[slot * self._num_parts + part])

    @property
    def _num_contributions(self) -> int:
        """The number of contributions that make the sum complete."""
        return self._num_counted * self._num_parts

    @property
    def complete(self) -> bool:
        """Whether every contribution is in the sum."""
        return self.num_added == self._num_contributions

    def count_slots(self, num_slots: int) -> None:
        """Set the number of slots whose contributions make the sum complete. It holds until it is set again."""
        self._num_counted = num_slots

    def take(self, slot: int, part: int) -> None:
        """Note that a contribution was taken. `put` follows, at once or when its slot is known to count."""
        self._taken[slot * self._num_parts + part] = 1

    def put(self, payloads: list[Payload]) -> None:
        """Let a contribution, still encoded, wait to be added."""
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

    @abstractmethod
    def reported_norms(self) -> list[float]:
        """What the server reports to the leader of each fragment's sum; a number that is not finite skips the step."""

    @abstractmethod
    def apply(self, num_tokens: int, clip_scale: float, rate: float, step: int) -> None:
        """Update the bundle by the clipped mean of the ordinary step `step` over its tokens; worker thread."""

    @abstractmethod
    def apply_round(self, num_tokens: int, num_steps: int) -> None:
        """Update the bundle by the mean of a round of `num_steps` inner steps over its tokens; worker thread."""

    @abstractmethod
    def preview_round(self, num_tokens: int, version: int, codec: str) -> PublishedBundle | None:
        """What workers with the version before will get at `version`, which the round under way makes; worker thread.

        It is what `apply_round` and `publish` will make if the round is not skipped. Nothing changes. The bundle must
        be complete. None if workers get the whole bundle at that version.
        """

    def publish(self, version: int, codec: str) -> None:
        """Encode a version for workers' pulls; `codec` is the codec of its differences. Worker thread."""
        with self._publishing:
            self._publisher.publish(version, codec)

    def begin_step(self, version: int, is_round: bool = False) -> None:
        """Let workers pull `version`, and reset for that step's contributions, of which a round has one part only."""
        self.published_version = version
        self._num_parts = 1 if is_round else self.bundle.num_parts
        self._taken = bytearray(self._num_slots * self._num_parts)
        self.num_added = 0

    def delta(self) -> PublishedBundle | None:
        """The difference for a worker that holds the version before; None if that worker gets the whole bundle."""
        return self._publisher.delta

    def full(self) -> PublishedBundle:
        """The whole bundle at the published version; worker thread."""
        with self._publishing:
            return self._publisher.full()

    @property
    def state_bytes(self) -> int:
        """Bytes of the sum and of what is published."""
        return self._sum.num_bytes + self._publisher.state_bytes

    @property
    def newcomer_bytes(self) -> int:
        """Bytes, among `state_bytes`, of the whole bundle for a worker without the version before."""
        return self._publisher.newcomer_bytes
