"""The moments that slots keep from round to round, on the worker that computes them (local.inner_state: keep).

A slot's moments at version t and those that its round leaves behind are kept apart. So a round that is computed again
begins from the same moments, and the moments of version t can be copied for its checkpoint meanwhile. A slot goes on
from its moments only on the worker that computed its last round. On any other worker they begin with zeros.

Shape legend: N elements of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from gradstream.core.codecs import State
from gradstream.core.log import get_logger
from gradstream.core.optimizer.rule import STEP_COUNT
from gradstream.core.plan.fragments import Fragment
from gradstream.core.plan.plan import Plan

log = get_logger()

Moments = dict[int, dict[str, torch.Tensor]]
"""The arrays of a slot's optimizer by tensor of the plan and name: flat [N] in fp32, and AdamW's count of steps. Empty:
zeros."""


class KeptMoments:
    """The moments of this worker's slots. All methods may be called in any thread; arrays are never written to.

    `on_fresh(version, slot)` is called when a slot begins with zeros in the middle of a plan.
    """

    def __init__(self, plan: Plan):
        local = plan.recipe.local
        self.active = local is not None and local.inner_state == "keep"
        self.on_fresh: Callable[[int, int], None] = lambda version, slot: None
        self._plan = plan
        # The first version at which a slot that has none has lost them.
        self._owed_from = max(plan.start_version, local.after if local is not None else 0) + 1
        self._lock = threading.Lock()
        self._slots: dict[int, dict[int, Moments]] = {}  # by slot and version

    def at(self, version: int, slot: int) -> Moments:
        """The moments with which a slot's round from a version begins."""
        with self._lock:
            return self._slots.get(slot, {}).get(version, {})

    def keep(self, version: int, slot: int, moments: Moments) -> None:
        """Keep what a slot's round from a version leaves behind, unless it is not finite: the round will be skipped."""
        finite = all(bool(torch.isfinite(array.sum())) for arrays in moments.values() for array in arrays.values())
        with self._lock:
            held = self._slots.setdefault(slot, {})
            before = held.get(version, {})
            self._slots[slot] = {version: before, version + 1: moments if finite else before}

    def adopt(self, slot: int, states: Mapping[int, State]) -> None:
        """Go on from the moments in the checkpoint of the plan's start version, which are by fragment."""
        pieces: dict[int, list[State]] = {}
        for index, state in sorted(states.items()):
            pieces.setdefault(self._plan.fragments[index].tensor, []).append(state)
        moments = {
            tensor: {
                name: parts[0][name].reshape(()) if name == STEP_COUNT else torch.cat([part[name] for part in parts])
                for name in parts[0]
            }
            for tensor, parts in pieces.items()
        }
        with self._lock:
            self._slots[slot] = {self._plan.start_version: moments}

    def settle(self, version: int, slots: Iterable[int]) -> None:
        """Bring slots to a version. Those without moments of it begin with zeros there."""
        fresh = []
        with self._lock:
            for slot, held in list(self._slots.items()):
                if max(held) < version:
                    del self._slots[slot]
            for slot in slots:
                if version not in self._slots.get(slot, {}):
                    self._slots[slot] = {version: {}}
                    fresh.append(slot)
        for slot in fresh if version >= self._owed_from else ():
            log.info("a slot's moments begin with zeros: its last round was not computed here", slot=slot)
            self.on_fresh(version, slot)

    def snapshot(self, version: int) -> dict[int, dict[int, State]]:
        """Copy to the CPU the moments at a version, of all slots that have some there, by slot and fragment."""
        with self._lock:
            found = {slot: held[version] for slot, held in self._slots.items() if held.get(version)}
        return {slot: self._by_fragment(moments) for slot, moments in found.items()}

    def _by_fragment(self, moments: Moments) -> dict[int, State]:
        return {
            fragment.index: {
                name: _piece(name, array, fragment).to("cpu", copy=True)
                for name, array in moments[fragment.tensor].items()
            }
            for fragment in self._plan.fragments
            if fragment.tensor in moments
        }


def _piece(name: str, array: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    return array.reshape(1) if name == STEP_COUNT else array.view(-1)[fragment.begin : fragment.end]
