"""Bounds the encoded gradients that a worker holds: those of at most two slots, whatever the number of its slots.

A contribution is held from its gradients' last pass until its server acknowledges it. The bound is a stage's: in a
schedule with several stages a worker, or with split backward passes, slots overlap, but each stage finishes its slots
one after the other. A stage's third slot therefore waits, before the pass that makes its gradients final, for the
oldest slot of the same stage. No other worker and no later slot has a part in that wait, so it cannot be circular.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import MAX_ENCODED_SLOTS
from gradstream.worker.attempt import AbandonedError
from gradstream.worker.timeline import Timeline

Key = tuple[int, int]
"""A contribution of a slot: (bundle, part)."""


@dataclass(eq=False)
class _Slot:
    """One computation of a slot on one stage, with its contributions that no server has acknowledged."""

    step: int
    slot: int
    held: set[Key] = field(default_factory=set)


class Backlog:
    """The contributions of a worker that are not acknowledged, by stage and slot.

    `make_room` and `add` are called in the compute thread, the rest from any thread.
    """

    def __init__(self, plan: Plan, timeline: Timeline):
        self.waiting: tuple[str, float] | None = None
        """What the compute thread waits for, in words, and since when in Unix seconds."""
        self._plan = plan
        self._timeline = timeline
        self._slots: dict[int, list[_Slot]] = {}
        """By stage, the slots that may have contributions, oldest first."""
        self._condition = threading.Condition()

    def make_room(self, step: int, slot: int, stage: int, wanted: Callable[[], bool]) -> None:
        """Wait until a stage has room for another slot's gradients, and begin that slot.

        Call this before the pass after which the stage's gradients of the slot are final. Raises AbandonedError when
        `wanted()` turns false, of which `wake` tells.
        """
        with self._condition:
            if not self._has_room(stage):
                oldest = self._slots[stage][0]
                self.waiting = (self._awaited(oldest), time.time())
                try:
                    with self._timeline.waiting(bundle=min(oldest.held)[0]):
                        while not self._has_room(stage):
                            if not wanted():
                                raise AbandonedError
                            self._condition.wait()
                finally:
                    self.waiting = None
            self._slots[stage].append(_Slot(step, slot))

    def add(self, step: int, slot: int, stage: int, key: Key) -> Callable[[], None]:
        """Hold a contribution of the slot that the stage has begun last. Returns the function that lets go of it."""
        with self._condition:
            slots = self._slots.setdefault(stage, [])
            if not slots or (slots[-1].step, slots[-1].slot) != (step, slot):
                slots.append(_Slot(step, slot))
            slots[-1].held.add(key)
            return partial(self._let_go, slots[-1], key)

    def wake(self) -> None:
        """Wake the compute thread to check whether its attempt is still wanted."""
        with self._condition:
            self._condition.notify_all()

    def _let_go(self, slot: _Slot, key: Key) -> None:
        with self._condition:
            slot.held.discard(key)
            if not slot.held:
                self._condition.notify_all()

    def _has_room(self, stage: int) -> bool:
        """Whether fewer than the maximum of slots are held. The last pass of each slot of the list is over."""
        self._slots[stage] = [slot for slot in self._slots.get(stage, []) if slot.held]
        return len(self._slots[stage]) < MAX_ENCODED_SLOTS

    def _awaited(self, slot: _Slot) -> str:
        servers = sorted({self._plan.bundle(bundle).server for bundle, _ in slot.held})
        names = ", ".join(self._plan.servers[server].name for server in servers)
        return f"{names} to acknowledge slot {slot.slot} of {self._plan.rounds.title(slot.step)}"
