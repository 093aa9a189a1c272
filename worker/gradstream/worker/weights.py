"""Weights arriving: an inbox a version, and hooks that hold each layer's forward pass until its weights are in place.

An inbox takes fragments, still encoded, from the pulls of all servers. Until it is installed nothing of it touches the
model, so a slot that is being computed at the old version is safe. Once installed, each fragment is decoded into its
parameter as it arrives, and the forward pass of a unit waits for that unit's fragments alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from gradstream.core.codecs import Codec, Payload
from gradstream.core.model import forward_units
from gradstream.core.plan import Plan
from gradstream.worker.compute import AbandonedError


class Inbox:
    """The fragments of one version as they arrive. `put` and `fail` run on the event loop."""

    def __init__(self, version: int):
        self.version = version
        self._lock = threading.Lock()
        self._arrived: list[tuple[int, Payload]] = []
        self._sink: WeightInstaller | None = None
        self.failed = False
        self.error: Exception | None = None

    def put(self, fragment: int, payload: Payload) -> None:
        """Take a fragment's verified payload."""
        with self._lock:
            sink = self._sink
            if sink is None:
                self._arrived.append((fragment, payload))
        if sink is not None:
            sink.arrived(self, fragment, payload)

    def fail(self, error: Exception | None = None) -> None:
        """Nothing more will come: whoever waits for a fragment gets `error`, or AbandonedError to pull again."""
        with self._lock:
            self.failed, self.error = True, error
            sink = self._sink
        if sink is not None:
            sink.wake()

    def connect(self, sink: WeightInstaller) -> list[tuple[int, Payload]]:
        """From now on give fragments to `sink`; return those that have arrived."""
        with self._lock:
            self._sink = sink
            arrived, self._arrived = self._arrived, []
        return arrived


class WeightInstaller:
    """Decodes fragments into the parameters and gates the forward pass."""

    def __init__(self, plan: Plan, model: nn.Module, parameters: Sequence[nn.Parameter], codec: Codec):
        self._codec = codec
        self._parameters = parameters
        self._fragments = plan.fragments
        self._executor = ThreadPoolExecutor(1, "decode")
        self._condition = threading.Condition()
        self._inbox: Inbox | None = None
        self._error: BaseException | None = None
        self._missing: dict[int, int] = {}
        self._needed: dict[int, int] = {}
        for fragment in plan.fragments:
            self._needed[fragment.tensor] = self._needed.get(fragment.tensor, 0) + 1
        self._gate(model)

    def install(self, inbox: Inbox) -> None:
        """Begin to put a version in place; the compute thread must be idle. What was in place is overwritten."""
        with self._condition:
            self._inbox = inbox
            self._missing = dict(self._needed)
        for fragment, payload in inbox.connect(self):
            self.arrived(inbox, fragment, payload)

    def arrived(self, inbox: Inbox, fragment: int, payload: Payload) -> None:
        """Decode a fragment of the installed inbox in the background."""
        self._executor.submit(self._decode, inbox, fragment, payload)

    def wake(self) -> None:
        """Make waiting forward passes look again."""
        with self._condition:
            self._condition.notify_all()

    def wait_all(self) -> None:
        """Wait until the whole version is in place. Raises AbandonedError when it will not be."""
        self._wait(range(len(self._parameters)))

    def close(self) -> None:
        """Stop decoding."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _decode(self, inbox: Inbox, index: int, payload: Payload) -> None:
        if inbox is not self._inbox:
            return
        fragment = self._fragments[index]
        try:
            with torch.no_grad():
                slice_N = self._parameters[fragment.tensor].data.view(-1)[fragment.begin : fragment.end]
                if slice_N.device.type == "cpu":
                    self._codec.decode(payload, slice_N)
                else:
                    staging_N = torch.empty(fragment.num_elements, pin_memory=True)
                    self._codec.decode(payload, staging_N)
                    slice_N.copy_(staging_N)
        except BaseException as error:
            self._error = error
        with self._condition:
            if inbox is self._inbox:  # else the next version was installed meanwhile, and this is none of its own
                self._missing[fragment.tensor] -= 1
            self._condition.notify_all()

    def _wait(self, tensors: Sequence[int]) -> None:
        with self._condition:
            while True:
                if self._error is not None:
                    raise self._error
                if not any(self._missing[tensor] for tensor in tensors):
                    return
                if self._inbox is None or self._inbox.failed:
                    raise (self._inbox.error if self._inbox is not None else None) or AbandonedError
                self._condition.wait()

    def _gate(self, model: nn.Module) -> None:
        """Hook every forward unit, and every module above the units for parameters of its own."""
        number = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        covered: set[int] = set()
        for _, unit in forward_units(model):
            inside = {id(module) for module in unit.modules()}
            covered |= inside
            self._hook(unit, [number[id(parameter)] for parameter in unit.parameters()])
        for module in model.modules():
            if id(module) not in covered:
                self._hook(module, [number[id(parameter)] for parameter in module.parameters(recurse=False)])

    def _hook(self, module: nn.Module, tensors: list[int]) -> None:
        if tensors:
            module.register_forward_pre_hook(lambda *_: self._wait(tensors))
