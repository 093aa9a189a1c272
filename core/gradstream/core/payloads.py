"""A bundle's payload: its fragments' payloads, one after the other, each in the codec of its tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradstream.core.bundles import Bundle, codec_for
from gradstream.core.codecs import Codec, Payload, ResidualCodec, State, codec_named
from gradstream.core.errors import ProtocolError
from gradstream.core.fragments import Tensor


def seed_of(version: int, fragment: int) -> int:
    """The seed with which a fragment's payload of a step, or of a version, is encoded."""
    return version << 32 | fragment


class BundleCodec:
    """How one bundle is written as bytes when the job's codec is `codec` and its embeddings have `embedding`.

    Flat tensors are fp32, contiguous, of the bundle's elements laid end to end. Stateless but for what is given in.
    """

    def __init__(self, bundle: Bundle, tensors: Sequence[Tensor], codec: str, embedding: str):
        self.bundle = bundle
        self.codec = codec_named(codec)
        self.codecs: tuple[Codec, ...] = tuple(
            codec_named(codec_for(tensors[fragment.tensor].kind, codec, embedding)) for fragment in bundle.fragments
        )
        self.most_bytes = sum(
            codec.encoded_bytes(fragment.shape) for codec, fragment in zip(self.codecs, bundle.fragments, strict=True)
        )
        """The most bytes that a payload can have."""

    def check_sizes(self, fragment_bytes: Sequence[int], payload_bytes: int) -> None:
        """Raise ProtocolError for announced sizes that no payload has; before anything is allocated for it."""
        if len(fragment_bytes) != len(self.codecs):
            raise ProtocolError(f"sizes of {len(fragment_bytes)} fragments, but there are {len(self.codecs)}")
        for codec, fragment, size in zip(self.codecs, self.bundle.fragments, fragment_bytes, strict=True):
            codec.check_size(size, fragment.shape)
        if sum(fragment_bytes) != payload_bytes:
            raise ProtocolError(f"{payload_bytes} bytes announced, but its fragments have {sum(fragment_bytes)}")

    def encode(self, values: Sequence[torch.Tensor], version: int) -> list[Payload]:
        """Each fragment's payload; `values` are the fragments' slices."""
        return [
            codec.encode(slice_N.view(fragment.shape), seed_of(version, fragment.index))
            for codec, fragment, slice_N in zip(self.codecs, self.bundle.fragments, values, strict=True)
        ]

    def encode_with(self, values: Sequence[torch.Tensor], states: dict[int, State], version: int) -> list[Payload]:
        """As `encode`; the residuals of codecs that keep one are kept in `states`, by fragment."""
        payloads = []
        for codec, fragment, slice_N in zip(self.codecs, self.bundle.fragments, values, strict=True):
            seed = seed_of(version, fragment.index)
            if isinstance(codec, ResidualCodec):
                state = states.get(fragment.index)
                if state is None:
                    state = states[fragment.index] = codec.new_state(fragment.shape, slice_N.device)
                payloads.append(codec.encode_with(slice_N.view(fragment.shape), state, seed))
            else:
                payloads.append(codec.encode(slice_N.view(fragment.shape), seed))
        return payloads

    def encode_delta(self, values: Sequence[torch.Tensor], held: Sequence[torch.Tensor], version: int) -> list[Payload]:
        """Each fragment's payload of values - held, which is added to `held` as the receiver will."""
        return [
            codec.encode_delta(
                slice_N.view(fragment.shape), held_N.view(fragment.shape), seed_of(version, fragment.index)
            )
            for codec, fragment, slice_N, held_N in zip(self.codecs, self.bundle.fragments, values, held, strict=True)
        ]

    def decode(self, payloads: Sequence[Payload], out: Sequence[torch.Tensor], version: int) -> None:
        """Write the values over the fragments' slices. Raises ProtocolError."""
        for codec, fragment, payload, out_N in zip(self.codecs, self.bundle.fragments, payloads, out, strict=True):
            codec.decode(payload, out_N.view(fragment.shape), seed_of(version, fragment.index))

    def decode_add(self, payloads: Sequence[Payload], out: Sequence[torch.Tensor], version: int) -> None:
        """Add the values to the fragments' slices. Raises ProtocolError."""
        for codec, fragment, payload, out_N in zip(self.codecs, self.bundle.fragments, payloads, out, strict=True):
            codec.decode_add(payload, out_N.view(fragment.shape), seed_of(version, fragment.index))


class CodecBook:
    """The codecs of a job's bundles, each made once. For both ends of a link, any thread."""

    def __init__(self, tensors: Sequence[Tensor], embedding: str):
        self._tensors = tensors
        self._embedding = embedding
        self._made: dict[tuple[int, str, str], BundleCodec] = {}

    def of(self, bundle: Bundle, codec: str) -> BundleCodec:
        """For gradients and for whole copies."""
        return self._get(bundle, codec, self._embedding)

    def delta(self, bundle: Bundle, codec: str) -> BundleCodec:
        """For differences of weights, of which an embedding's are as dense as a matrix's."""
        return self._get(bundle, codec, codec)

    def _get(self, bundle: Bundle, codec: str, embedding: str) -> BundleCodec:
        key = (bundle.index, codec, embedding)
        if key not in self._made:
            self._made[key] = BundleCodec(bundle, self._tensors, codec, embedding)
        return self._made[key]


def split(payload: Payload, fragment_bytes: Sequence[int]) -> list[Payload]:
    """A bundle's payload as its fragments' payloads: views, or copies where one would begin at an odd address, which
    the kernels are not compiled for."""
    pieces, begin = [], 0
    for size in fragment_bytes:
        piece = payload[begin : begin + size]
        pieces.append(piece.copy() if begin % 4 else piece)
        begin += size
    return pieces


def slices(flat_N: torch.Tensor, bundle: Bundle) -> list[torch.Tensor]:
    """Views of each fragment of a bundle in a flat tensor of all its elements."""
    return [flat_N[begin:end] for begin, end in bundle.bounds]
