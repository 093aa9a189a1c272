"""Faults for tests of workers and servers. A fault strikes at a (step, slot), so tests need not wait for a moment.

GRADSTREAM_FAULTS holds faults separated by ";", each `KIND@key=value,…`:

    kill@step=3,slot=1                  SIGKILL of this worker before it computes slot 1 of step 3
    kill@step=3,slot=1,acknowledged=5   SIGKILL once servers have acknowledged 5 contributions of that slot
    kill@step=3,slot=1,sent=2           SIGKILL once this worker has given 2 tensors of that slot to its neighbours
    kill@step=3,decided=1               SIGKILL of this parameter server once it knows what is done with step 3, before
                                        anything of the next version is applied, published or written
    nan@step=4[,slot=1]                 the gradients of that step (and slot) are NaN
    hang@step=3,slot=1                  the compute thread hangs before that slot; heartbeats go on
    fail@step=3,slot=1                  that slot fails, as when memory is short
    slow@milliseconds=300               each slot takes this worker so much longer

In a job with local steps, kill (without a count, or with `sent`), nan, hang, fail and slow strike at the inner step
`step`, so they can strike in the middle of a round. `acknowledged` and `decided` count versions there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass

from gradstream.core.errors import ConfigError

VARIABLE = "GRADSTREAM_FAULTS"


@dataclass(frozen=True)
class Fault:
    """One fault; None matches every step or slot."""

    kind: str
    step: int | None = None
    slot: int | None = None
    acknowledged: int | None = None
    sent: int | None = None
    decided: int | None = None
    milliseconds: int = 0

    @property
    def is_before_slot(self) -> bool:
        """Whether the fault strikes before a slot is computed."""
        return self.acknowledged is self.sent is self.decided is None

    def matches(self, step: int, slot: int) -> bool:
        """Whether the fault is for this step and slot."""
        return self.step in (None, step) and self.slot in (None, slot)


def parse_faults(text: str) -> list[Fault]:
    """Parse the variable's value. Raises ConfigError."""
    faults = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        kind, _, rest = item.partition("@")
        try:
            fields = {key: int(value) for key, value in (pair.split("=") for pair in rest.split(","))}
            if kind not in ("kill", "nan", "hang", "fail", "slow"):
                raise ValueError(f"unknown kind '{kind}'")
            if kind != "slow" and "step" not in fields:
                raise ValueError("it names no step")
            faults.append(Fault(kind, **fields))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{VARIABLE}: '{item}' is not a fault ({error})") from None
    return faults


class Faults:
    """The faults of this process."""

    def __init__(self, text: str | None = None):
        self._faults = parse_faults(os.environ.get(VARIABLE, "") if text is None else text)
        self._acknowledged: dict[tuple[int, int], int] = {}
        self._sent: dict[tuple[int, int], int] = {}

    def before_slot(self, step: int, slot: int) -> None:
        """Strike before a slot is computed, if a fault says so."""
        if any(f.kind == "kill" and f.is_before_slot and f.matches(step, slot) for f in self._faults):
            _kill()
        if any(f.kind == "hang" and f.matches(step, slot) for f in self._faults):
            threading.Event().wait()
        time.sleep(sum(f.milliseconds for f in self._faults if f.kind == "slow" and f.matches(step, slot)) / 1000)
        if any(f.kind == "fail" and f.matches(step, slot) for f in self._faults):
            raise MemoryError(f"out of memory in slot {slot} of step {step}")

    def sent(self, step: int, slot: int) -> None:
        """Count a tensor that is about to go to a neighbour, and strike if a fault says so."""
        if not self._faults:
            return
        if any(
            f.kind == "kill" and f.sent == self._sent.get((step, slot), 0) and f.matches(step, slot)
            for f in self._faults
        ):
            _kill()
        self._sent[step, slot] = self._sent.get((step, slot), 0) + 1

    def acknowledged(self, step: int, slot: int) -> None:
        """Count a contribution that a server has acknowledged, and strike if a fault says so."""
        if not self._faults:
            return
        count = self._acknowledged[step, slot] = self._acknowledged.get((step, slot), 0) + 1
        if any(f.kind == "kill" and f.acknowledged == count and f.matches(step, slot) for f in self._faults):
            _kill()

    def decided(self, step: int) -> None:
        """Strike once a server has a step's decision, if a fault says so."""
        if any(fault.kind == "kill" and fault.decided and fault.step == step for fault in self._faults):
            _kill()

    def spoils(self, step: int, slot: int) -> bool:
        """Whether a fault makes the slot's gradients NaN."""
        return any(f.kind == "nan" and f.matches(step, slot) for f in self._faults)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
