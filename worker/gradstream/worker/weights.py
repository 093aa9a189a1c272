"""Installs an arriving version, and delays each layer's forward pass until its weights are in place.

There is one inbox a version. An inbox takes bundles, still encoded, from the pulls of all servers. Until an inbox is
installed it does not touch the model, so a slot that is being computed at the old version is safe. After that, each
bundle is decoded into the held arrays as it arrives, and the forward pass of a unit waits for its own bundles alone. A
round waits for the whole version, with the moments that slots share (gradstream.worker.held_version).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradstream.core.codecs import Payload, PlaneCodec, codec_on_wire
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, Slices, split
from gradstream.core.errors import ProtocolError
from gradstream.core.model.model import forward_units
from gradstream.core.plan.bundles import WEIGHTS, Bundle
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.plan import Plan
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.attempt import AbandonedError
from gradstream.worker.held_version import Array, HeldVersion
from gradstream.worker.timeline import Timeline


@dataclass(frozen=True)
class Arrival:
    """One bundle of a version, verified but still encoded."""

    header: pb.WeightsHeader
    payload: Payload


class Inbox:
    """Collects the bundles of one version as they arrive. `put` and `fail` run on the event loop."""

    def __init__(self, version: int, push_codec: str, checkpoint: bool = False):
        self.version = version
        self.push_codec = push_codec
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._arrived: list[Arrival] = []
        self._sink: WeightInstaller | None = None
        self.failed = False
        self.error: Exception | None = None

    def put(self, arrival: Arrival) -> None:
        """Take a bundle."""
        with self._lock:
            sink = self._sink
            if sink is None:
                self._arrived.append(arrival)
        if sink is not None:
            sink.arrived(self, arrival)

    def fail(self, error: Exception | None = None) -> None:
        """Mark that no more bundles will come.

        A thread that waits for a bundle gets `error`, or AbandonedError, after which the version is pulled again.
        """
        with self._lock:
            self.failed, self.error = True, error
            sink = self._sink
        if sink is not None:
            sink.wake()

    def connect(self, sink: WeightInstaller) -> list[Arrival]:
        """Give bundles to `sink` from now on; return those that have already arrived."""
        with self._lock:
            self._sink = sink
            arrived, self._arrived = self._arrived, []
        return arrived


class WeightInstaller:
    """Decodes bundles into the held version, and delays forward passes until their weights are in place."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[nn.Module],
        parameters: Mapping[tuple[int, int], nn.Parameter],
        timeline: Timeline,
    ):
        """`models` are the worker's stages, `parameters` their parameters by (tensor, part) of the plan.

        Two parts of one tensor share their memory.
        """
        self.held = HeldVersion(plan, parameters)
        self._plan = plan
        self._book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self._timeline = timeline
        self._number = {id(parameter): tensor for (tensor, _), parameter in parameters.items()}
        self.waiting: tuple[str, float] | None = None
        """What the compute thread waits for, in words, and since when in Unix seconds."""
        self._slices: dict[int, Slices] = {}  # of the held arrays, by bundle
        self._executor = ThreadPoolExecutor(1, "decode")
        self._condition = threading.Condition()
        self._inbox: Inbox | None = None
        self._error: BaseException | None = None
        self._versions: dict[int, int] = {}  # version of each bundle in place
        self._missing: dict[Array, int] = {}  # fragments of each array of the installed version
        for model in models:
            self._gate(model)

    def install(self, inbox: Inbox) -> None:
        """Begin to overwrite the held arrays with a version. The compute thread must be idle."""
        shared = self._plan.shares_moments(inbox.version)
        with self._condition:
            self._inbox = inbox
            self._missing = {
                array: count for array, count in self.held.num_fragments.items() if shared or array[1] == WEIGHTS
            }
        for arrival in inbox.connect(self):
            self.arrived(inbox, arrival)

    def arrived(self, inbox: Inbox, arrival: Arrival) -> None:
        """Decode a bundle of the installed inbox in the background."""
        self._executor.submit(self._decode, inbox, arrival)

    def wake(self) -> None:
        """Wake waiting forward passes to check their condition again."""
        with self._condition:
            self._condition.notify_all()

    def wait_all(self) -> None:
        """Wait until the whole version is in place. Raises AbandonedError when the version will not become complete."""
        self._wait(list(self._missing))

    def close(self) -> None:
        """Stop decoding."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _decode(self, inbox: Inbox, arrival: Arrival) -> None:
        header, bundle = arrival.header, self._plan.bundle(arrival.header.bundle)
        try:
            # A bundle is also decoded when the next version is already installed, as that may be a difference to it.
            if header.delta and self._versions.get(bundle.index) != inbox.version - 1:
                inbox.fail()  # a difference to a version that broke off: the weights are pulled again in full
                return
            if inbox is not self._inbox and self._versions.get(bundle.index, -1) > inbox.version:
                return  # late: a newer version of this bundle is in place
            self._versions.pop(bundle.index, None)
            with (
                torch.no_grad(),
                self._timeline.span(SpanKind.DECODE, item=bundle.index, num_bytes=len(arrival.payload)),
            ):
                self._put_in_place(bundle, arrival)
            self._versions[bundle.index] = inbox.version
        except BaseException as error:
            self._error = error
        with self._condition:
            if inbox is self._inbox:
                for fragment in bundle.fragments:
                    self._missing[fragment.tensor, bundle.array] -= 1
            self._condition.notify_all()

    def _put_in_place(self, bundle: Bundle, arrival: Arrival) -> None:
        header = arrival.header
        pull = self._plan.codec_of(bundle, self._plan.recipe.codec.pull)
        codec = pulled_codec(self._book, bundle, pull, header)
        payloads = split(arrival.payload, header.fragment_bytes)
        slices = self._slices.get(bundle.index)
        if slices is None:
            slices = self._slices[bundle.index] = Slices(bundle, self.held.slices(bundle))
        form = downlink(pull)
        if header.delta and form.xor:
            full = self._book.of(bundle, form.full)
            for plane, whole, fragment, payload, slice_N in zip(
                codec.codecs, full.codecs, bundle.fragments, payloads, slices, strict=True
            ):
                assert isinstance(plane, PlaneCodec)
                # Encoding the weights gives back exactly the bits that it was decoded from.
                held = whole.encode(slice_N)
                whole.decode(np.bitwise_xor(held, plane.unpack(payload, fragment.shape)), slice_N)
        elif header.delta:
            codec.decode_add(payloads, slices, header.version)
        else:
            codec.decode(payloads, slices, header.version)

    def _wait(self, arrays: Sequence[Array]) -> None:
        with self._condition:
            if not self._in_place(arrays):
                self.waiting = (self._awaited(arrays), time.time())
                try:
                    with self._timeline.waiting():
                        while not self._in_place(arrays):
                            self._condition.wait()
                finally:
                    self.waiting = None

    def _awaited(self, arrays: Sequence[Array]) -> str:
        assert self._inbox is not None
        plan, version = self._plan, self._inbox.version
        missing = {array for array in arrays if self._missing[array]}
        servers = {
            bundle.server
            for bundle in (*plan.bundles, *plan.moment_bundles)
            if self._versions.get(bundle.index) != version
            and any((fragment.tensor, bundle.array) in missing for fragment in bundle.fragments)
        }
        return f"weights of version {version} from {', '.join(plan.servers[server].name for server in sorted(servers))}"

    def _in_place(self, arrays: Sequence[Array]) -> bool:
        """Return whether the arrays are complete. The caller must hold the condition.

        Raises the error that keeps the arrays from becoming complete.
        """
        if self._error is not None:
            raise self._error
        if not any(self._missing[array] for array in arrays):
            return True
        if self._inbox is None or self._inbox.failed:
            raise (self._inbox.error if self._inbox is not None else None) or AbandonedError
        return False

    def _gate(self, model: nn.Module) -> None:
        """Hook every forward unit, and every module outside the units that has parameters of its own."""
        number = self._number
        covered: set[int] = set()
        for _, unit in forward_units(model):
            inside = {id(module) for module in unit.modules()}
            covered |= inside
            self._hook(unit, [number[id(parameter)] for parameter in unit.parameters() if id(parameter) in number])
        for module in model.modules():
            if id(module) not in covered:
                own = [number[id(p)] for p in module.parameters(recurse=False) if id(p) in number]
                self._hook(module, own)

    def _hook(self, module: nn.Module, tensors: list[int]) -> None:
        if tensors:
            arrays = [(tensor, WEIGHTS) for tensor in tensors]
            module.register_forward_pre_hook(lambda *_: self._wait(arrays))


def pulled_codec(book: CodecBook, bundle: Bundle, pull: str, header: pb.WeightsHeader) -> BundleCodec:
    """The codec of a pulled bundle. Raises ProtocolError when it does not follow from the recipe's `codec.pull`."""
    form, name = downlink(pull), codec_on_wire(header.codec).name
    if header.delta:
        if form.delta is None or (name != form.delta and pull != "auto"):
            raise ProtocolError(f"a difference in codec {name}, but the recipe says pull: {pull}")
        return book.delta(bundle, name)
    if name != form.full:
        raise ProtocolError(f"codec {name}, but the recipe says pull: {pull}")
    return book.of(bundle, name)
