"""The payload of a bundle: its fragments' payloads, one after the other, each in the codec of its tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np
import torch

from gradstream.core.codecs import Codec, DenseCodec, Payload, State, TopK, codec_named
from gradstream.core.codecs.fixed_point import FixedPointSum
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels import dense
from gradstream.core.kernels.dense import I64, address_of, addresses_of
from gradstream.core.plan.bundles import WEIGHTS, Bundle, codec_for
from gradstream.core.plan.fragments import Tensor


class Slices(Sequence[torch.Tensor]):
    """The fragments of a bundle as flat views of fixed memory, made once with their addresses for the kernels.

    Making a view costs as much as arithmetic over thousands of elements. torch also releases the interpreter lock for
    each view, and on a machine with more threads than cores the lock may not come back soon.
    """

    def __init__(self, bundle: Bundle, views: Sequence[torch.Tensor]):
        self.bundle = bundle
        self._views = list(views)

    @cached_property
    def addresses_F(self) -> I64:
        """The fragments' addresses in the CPU's memory."""
        elements_F = np.array([fragment.num_elements for fragment in self.bundle.fragments], dtype=np.int64)
        return addresses_of(self._views, elements_F)

    def __len__(self) -> int:
        return len(self._views)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        return self._views[index]


def slices(flat_N: torch.Tensor, bundle: Bundle) -> Slices:
    """The fragments of a bundle as slices of a flat tensor of all its elements."""
    return Slices(bundle, [flat_N[begin:end] for begin, end in bundle.bounds])


def seed_of(version: int, fragment: int) -> int:
    """The seed for encoding a fragment's payload of a step or version."""
    return version << 32 | fragment


class BundleCodec:
    """The codec of one bundle, for a job with codec `codec` and the codec `embedding` for embeddings.

    Flat tensors are fp32, contiguous, and have the bundle's concatenated elements. Stateless except for the arguments.
    Moments have `codec` whatever the kind of their tensor.
    """

    def __init__(self, bundle: Bundle, tensors: Sequence[Tensor], codec: str, embedding: str):
        self.bundle = bundle
        self.codec = codec_named(codec)
        of_weights = bundle.array == WEIGHTS
        self.codecs: tuple[Codec, ...] = tuple(
            codec_named(codec_for(tensors[fragment.tensor].kind, codec, embedding) if of_weights else codec)
            for fragment in bundle.fragments
        )
        self._sizes = [
            codec.encoded_bytes(fragment.shape) for codec, fragment in zip(self.codecs, bundle.fragments, strict=True)
        ]
        self.max_bytes = sum(self._sizes)
        """The most bytes that a payload can have."""
        self._offsets = [0, *accumulate(self._sizes)][:-1]
        self._dense_codecs = [codec for codec in self.codecs if isinstance(codec, DenseCodec)]
        # If a payload would begin at an unaligned address, the kernels get copies, fragment by fragment.
        self._dense = len(self._dense_codecs) == len(self.codecs) and not any(offset % 4 for offset in self._offsets)
        self._kinds_F = np.array([codec.kind for codec in self._dense_codecs], dtype=np.int64)
        self._elements_F = np.array([fragment.num_elements for fragment in bundle.fragments], dtype=np.int64)
        self._offsets_F = np.array(self._offsets, dtype=np.int64)

    def check_sizes(self, fragment_bytes: Sequence[int], payload_bytes: int) -> None:
        """Raise ProtocolError for announced sizes that no payload has, before memory is allocated for it."""
        if self._dense and list(fragment_bytes) == self._sizes and payload_bytes == self.max_bytes:
            return
        if len(fragment_bytes) != len(self.codecs):
            raise ProtocolError(f"sizes of {len(fragment_bytes)} fragments, but there are {len(self.codecs)}")
        for codec, fragment, size in zip(self.codecs, self.bundle.fragments, fragment_bytes, strict=True):
            codec.check_size(size, fragment.shape)
        if sum(fragment_bytes) != payload_bytes:
            raise ProtocolError(f"{payload_bytes} bytes announced, but its fragments have {sum(fragment_bytes)}")

    def encode(self, values: Sequence[torch.Tensor], version: int) -> list[Payload]:
        """Encode each fragment. `values` are the fragments' slices."""
        if not self._together(values):
            return [
                codec.encode(slice_N.view(fragment.shape), seed_of(version, fragment.index))
                for codec, fragment, slice_N in zip(self.codecs, self.bundle.fragments, values, strict=True)
            ]
        payload, payloads = self._allocate()
        dense.encode(*self._call(version), self._at(values), address_of(payload) + self._offsets_F)
        return payloads

    def keeps_residual(self, codec: Codec) -> bool:
        """Whether fragments in this codec keep a residual, in a job whose codec does.

        Fragments whose kind gives them another codec, such as vectors, keep none.
        """
        return codec is self.codec

    def encode_with(
        self, values: Sequence[torch.Tensor], states: dict[int, State], version: int, decay: float = 1.0
    ) -> list[Payload]:
        """Encode each fragment, with the residuals of those that keep one in `states`, by fragment."""
        payloads = []
        for codec, fragment, slice_N in zip(self.codecs, self.bundle.fragments, values, strict=True):
            seed = seed_of(version, fragment.index)
            if self.keeps_residual(codec):
                state = states.get(fragment.index)
                if state is None:
                    state = states[fragment.index] = codec.new_state(fragment.shape, slice_N.device)
                payloads.append(codec.encode_with(slice_N.view(fragment.shape), state, seed, decay))
            else:
                payloads.append(codec.encode(slice_N.view(fragment.shape), seed))
        return payloads

    def encode_delta(self, values: Sequence[torch.Tensor], held: Sequence[torch.Tensor], version: int) -> list[Payload]:
        """Encode values - held of each fragment, and add the decoded payloads to `held`, as the receiver does."""
        if not self._together(values):
            return [
                codec.encode_delta(
                    slice_N.view(fragment.shape), held_N.view(fragment.shape), seed_of(version, fragment.index)
                )
                for codec, fragment, slice_N, held_N in zip(
                    self.codecs, self.bundle.fragments, values, held, strict=True
                )
            ]
        payload, payloads = self._allocate()
        into_F = address_of(payload) + self._offsets_F
        dense.encode_delta(*self._call(version), self._at(values), self._at(held), into_F)
        return payloads

    def decode(self, payloads: Sequence[Payload], out: Sequence[torch.Tensor], version: int) -> None:
        """Decode the payloads and write the values to the fragments' slices. Raises ProtocolError."""
        if self._together(out):
            self._decode_together(payloads, out, version, add=False)
            return
        for codec, fragment, payload, out_N in zip(self.codecs, self.bundle.fragments, payloads, out, strict=True):
            codec.decode(payload, out_N.view(fragment.shape), seed_of(version, fragment.index))

    def decode_add(self, payloads: Sequence[Payload], out: Sequence[torch.Tensor], version: int) -> None:
        """Decode the payloads and add the values to the fragments' slices. Raises ProtocolError."""
        if self._together(out):
            self._decode_together(payloads, out, version, add=True)
            return
        for codec, fragment, payload, out_N in zip(self.codecs, self.bundle.fragments, payloads, out, strict=True):
            codec.decode_add(payload, out_N.view(fragment.shape), seed_of(version, fragment.index))

    def add(self, contributions: Sequence[Sequence[Payload]], total: FixedPointSum, version: int) -> None:
        """Decode contributions, each the payloads of all fragments, and add them to a sum. Raises ProtocolError."""
        if self._dense:
            for payloads in contributions:
                self.check_sizes([len(payload) for payload in payloads], sum(map(len, payloads)))
            from_FC = np.array([[address_of(each[f]) for each in contributions] for f in range(len(self.codecs))])
            total.add(*self._call(version), from_FC)
            return
        for payloads in contributions:
            for number, payload in enumerate(payloads):
                self._add_fragment(number, payload, total, version)

    def _add_fragment(self, number: int, payload: Payload, total: FixedPointSum, version: int) -> None:
        """Add one fragment of a contribution to a sum: only the elements that are sent, or all of them decoded."""
        codec, fragment = self.codecs[number], self.bundle.fragments[number]
        if isinstance(codec, TopK):
            total.add_elements(number, *codec.checked_elements(payload, fragment.num_elements))
            return
        decoded = torch.empty(fragment.shape)
        codec.decode(payload, decoded, seed_of(version, fragment.index))
        fp32_F, one = np.full(1, dense.FP32, dtype=np.int64), slice(number, number + 1)
        elements_F = self._elements_F[one]
        total.add(fp32_F, elements_F, fp32_F, addresses_of([decoded], elements_F)[:, None], one)

    # -- all fragments in one call -----------------------------------------------------------------------------------

    def _together(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the kernels can take all fragments at once."""
        return self._dense and tensors[0].device.type == "cpu"

    def _at(self, tensors: Sequence[torch.Tensor]) -> I64:
        if isinstance(tensors, Slices) and tensors.bundle is self.bundle:
            return tensors.addresses_F
        return addresses_of(tensors, self._elements_F)

    def _call(self, version: int) -> tuple[I64, I64, I64]:
        """Kinds, numbers of elements and keys, as arguments of a kernel for all fragments."""
        keys = [
            codec.key(seed_of(version, fragment.index))
            for codec, fragment in zip(self._dense_codecs, self.bundle.fragments, strict=True)
        ]
        return self._kinds_F, self._elements_F, np.array(keys, dtype=np.int64)

    def _allocate(self) -> tuple[Payload, list[Payload]]:
        """Allocate a payload; return it, and its fragments' payloads as views of it."""
        payload = np.empty(self.max_bytes, dtype=np.uint8)
        return payload, [payload[begin : begin + size] for begin, size in zip(self._offsets, self._sizes, strict=True)]

    def _decode_together(
        self, payloads: Sequence[Payload], out: Sequence[torch.Tensor], version: int, add: bool
    ) -> None:
        self.check_sizes([len(payload) for payload in payloads], sum(map(len, payloads)))
        from_F = np.array([address_of(payload) for payload in payloads], dtype=np.int64)
        dense.decode(*self._call(version), from_F, self._at(out), add)


class CodecBook:
    """The codecs of a job's bundles, each made once. Used on both sides of a link, from any thread."""

    def __init__(self, tensors: Sequence[Tensor], embedding: str):
        self._tensors = tensors
        self._embedding = embedding
        self._made: dict[tuple[int, str, str], BundleCodec] = {}

    def of(self, bundle: Bundle, codec: str) -> BundleCodec:
        """The codec of a bundle for gradients and for whole weights."""
        return self._get(bundle, codec, self._embedding)

    def delta(self, bundle: Bundle, codec: str) -> BundleCodec:
        """The codec of a bundle for differences of weights, where an embedding's are as dense as a matrix's."""
        return self._get(bundle, codec, codec)

    def _get(self, bundle: Bundle, codec: str, embedding: str) -> BundleCodec:
        key = (bundle.index, codec, embedding)
        if key not in self._made:
            self._made[key] = BundleCodec(bundle, self._tensors, codec, embedding)
        return self._made[key]


def split(payload: Payload, fragment_bytes: Sequence[int]) -> list[Payload]:
    """Split a bundle's payload into its fragments' payloads.

    They are views, or copies if one would begin at an unaligned address, for which the kernels are not compiled.
    """
    pieces, begin = [], 0
    for size in fragment_bytes:
        piece = payload[begin : begin + size]
        pieces.append(piece.copy() if begin % 4 else piece)
        begin += size
    return pieces
