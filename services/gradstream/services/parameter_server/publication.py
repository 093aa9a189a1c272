"""Encodes a bundle for workers' pulls: in full or as a difference, in messages that are framed once for all workers.

`publish` and `full` run in the server's thread pool, one at a time for a bundle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from gradstream.core.codecs import Payload, PlaneCodec
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, Slices, slices
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.downlink import Downlink
from gradstream.core.wire.frames import checksum, frames
from gradstream.proto.v1 import parameter_server_pb2 as pb


@dataclass(frozen=True)
class PublishedBundle:
    """One version of a bundle as messages, ready to be sent to any number of workers."""

    version: int
    messages: tuple[bytes, ...]
    num_bytes: int


def frame_bundle(version: int, codec: BundleCodec, payloads: list[Payload], delta: bool) -> PublishedBundle:
    """Frame a version's payloads as messages."""
    num_bytes = sum(map(len, payloads))
    header = pb.WeightsHeader(
        version=version,
        bundle=codec.bundle.index,
        codec=codec.codec.wire,
        payload_bytes=num_bytes,
        crc32c=checksum(*payloads),
        delta=delta,
        fragment_bytes=[len(payload) for payload in payloads],
    )
    return PublishedBundle(version, tuple(frames(header, payloads)), num_bytes)


class Publisher(ABC):
    """Encodes one bundle for workers' pulls at each version."""

    delta: PublishedBundle | None = None
    """The difference for a worker that holds the version before; None if that worker gets the whole bundle."""

    def __init__(self, bundle: Bundle, weights: Slices):
        self._bundle = bundle
        self._weights = weights
        self._full: PublishedBundle | None = None

    @abstractmethod
    def publish(self, version: int, codec: str) -> None:
        """Encode the current weights as a version; `codec` is the codec of its differences."""

    @abstractmethod
    def preview(self, version: int, codec: str, weights: Slices) -> PublishedBundle | None:
        """What workers with the version before would get if these weights were published as `version`.

        Nothing changes. None if that is not a difference although the codec has differences.
        """

    @abstractmethod
    def full(self) -> PublishedBundle:
        """The whole bundle at the version published last."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the reference and of the framed messages."""
        return sum(framed.num_bytes for framed in (self.delta, self._full) if framed is not None)

    @property
    def newcomer_bytes(self) -> int:
        """Bytes, among `state_bytes`, of a whole bundle that was framed only for workers without the version before.

        It is framed when the first of these workers pulls, and held until the next version is published.
        """
        full = self._full
        return full.num_bytes if full is not None else 0

    def saved(self) -> torch.Tensor | None:
        """The values, one an element of the bundle, that a checkpoint must hold beside the weights; None if none."""
        return None

    def restore(self, saved_N: torch.Tensor) -> None:
        """Load values that `saved` returned."""
        raise NotImplementedError("a publisher that saves nothing has nothing to restore")


class WholePublisher(Publisher):
    """Publishes the whole bundle in one codec for every pull."""

    def __init__(self, bundle: Bundle, weights: Slices, codec: BundleCodec):
        super().__init__(bundle, weights)
        self._codec = codec

    def publish(self, version: int, codec: str) -> None:
        self._full = self.preview(version, codec, self._weights)

    def preview(self, version: int, codec: str, weights: Slices) -> PublishedBundle:
        return frame_bundle(version, self._codec, self._codec.encode(weights, version), delta=False)

    def full(self) -> PublishedBundle:
        assert self._full is not None
        return self._full

    @property
    def newcomer_bytes(self) -> int:
        return 0


class DeltaPublisher(Publisher):
    """Publishes differences to the reference, which the workers hold. A new worker gets the reference in fp32.

    At every `keyframe_versions`-th version all workers get the weights in fp32. This bounds how long an undetected
    error in a reference can last.
    """

    def __init__(self, bundle: Bundle, weights_N: torch.Tensor, book: CodecBook, keyframe_versions: int):
        super().__init__(bundle, slices(weights_N, bundle))
        self._weights_N = weights_N
        self._book = book
        self._keyframe_versions = keyframe_versions
        self._reference_N = torch.zeros_like(weights_N)
        self._references = slices(self._reference_N, bundle)
        self._restored = False
        self._version = -1

    def publish(self, version: int, codec: str) -> None:
        self._full = self.delta = None
        first = self._version < 0
        self._version = version
        if first:
            if not self._restored:
                self._reference_N.copy_(self._weights_N)
        elif self._is_keyframe(version):
            self._reference_N.copy_(self._weights_N)
        else:
            self.delta = self._difference(version, codec, self._weights, self._references)

    def preview(self, version: int, codec: str, weights: Slices) -> PublishedBundle | None:
        if self._is_keyframe(version):
            return None
        return self._difference(version, codec, weights, slices(self._reference_N.clone(), self._bundle))

    def _is_keyframe(self, version: int) -> bool:
        return version % self._keyframe_versions == 0

    def _difference(self, version: int, codec: str, weights: Slices, references: Slices) -> PublishedBundle:
        """Encode the difference of weights to references, and add it to the latter as workers do."""
        bundle_codec = self._book.delta(self._bundle, codec)
        payloads = bundle_codec.encode_delta(weights, references, version)
        return frame_bundle(version, bundle_codec, payloads, delta=True)

    def full(self) -> PublishedBundle:
        if self._full is None:
            codec = self._book.of(self._bundle, "fp32")
            payloads = codec.encode(self._references, self._version)
            self._full = frame_bundle(self._version, codec, payloads, delta=False)
        return self._full

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + 4 * self._reference_N.numel()

    def saved(self) -> torch.Tensor:
        return self._reference_N

    def restore(self, saved_N: torch.Tensor) -> None:
        self._reference_N.copy_(saved_N)
        self._restored = True


class XorPublisher(Publisher):
    """Publishes the bits that changed since the version before: few if the learning rate is tiny, as in fine-tuning."""

    def __init__(self, bundle: Bundle, weights: Slices, full: BundleCodec, delta: BundleCodec):
        super().__init__(bundle, weights)
        self._full_codec = full
        self._delta_codec = delta
        self._held: list[Payload] = []
        self._version = -1

    def publish(self, version: int, codec: str) -> None:
        payloads = self._full_codec.encode(self._weights, version)
        held, self._held = self._held, payloads
        self._full = self.delta = None
        self._version = version
        if held:
            self.delta = self._difference(version, payloads, held)

    def preview(self, version: int, codec: str, weights: Slices) -> PublishedBundle:
        return self._difference(version, self._full_codec.encode(weights, version), self._held)

    def _difference(self, version: int, now: list[Payload], before: list[Payload]) -> PublishedBundle:
        packed = []
        for plane, payload, held in zip(self._delta_codec.codecs, now, before, strict=True):
            assert isinstance(plane, PlaneCodec)
            packed.append(plane.pack(np.bitwise_xor(payload, held)))
        return frame_bundle(version, self._delta_codec, packed, delta=True)

    def full(self) -> PublishedBundle:
        if self._full is None:
            self._full = frame_bundle(self._version, self._full_codec, self._held, delta=False)
        return self._full

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + sum(map(len, self._held))


def publisher(
    form: Downlink, bundle: Bundle, weights_N: torch.Tensor, book: CodecBook, keyframe_versions: int
) -> Publisher:
    """Make the publisher for a form of downlink."""
    if form.delta is None:
        return WholePublisher(bundle, slices(weights_N, bundle), book.of(bundle, form.full))
    if form.xor:
        return XorPublisher(
            bundle, slices(weights_N, bundle), book.of(bundle, form.full), book.delta(bundle, form.delta)
        )
    return DeltaPublisher(bundle, weights_N, book, keyframe_versions)
