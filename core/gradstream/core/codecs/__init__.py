"""Codecs, which encode a slice of a tensor as bytes.

| name          | ratio | error  | what it loses; its state                                                  |
|---------------|-------|--------|---------------------------------------------------------------------------|
| fp32          | 1     | 0      | nothing                                                                   |
| bf16          | 2     | 0.0017 | 16 bits of mantissa, rounded to nearest even                              |
| int8          | 3.94  | 0.007  | blocks of 256 scaled by their largest magnitude, 255 steps                |
| int4          | 7.76  | 0.13   | likewise, 15 steps                                                        |
| int4-hadamard | 7.76  | 0.13   | int4 of rotated blocks: as good on heavy tails, where int4 alone is not   |
| int2          | 15.06 | 0.34   | all but the sign and one of two levels, in blocks of 256                  |
| fp32-zstd     | ~1.2  | 0      | nothing                                                                   |
| bf16-zstd     | ~2.8  | 0.0017 | what bf16 loses                                                           |
| factored      | 512   | 0.60   | all but the means of a matrix's rows and columns; for numbers of one sign |
| topk          | 64    | 0.94   | all but 64 of 4096 elements; residual: 4 bytes an element                 |
| sign          | 28.4  | 0.60   | all but sign and mean magnitude; residual: 4 bytes an element             |
| powersgd      | 128   | 0.996  | all but rank 4; residual: 4 bytes an element, and a basis of 4 columns    |
| sparse        | 141   | 0.94   | what topk loses, and all but sign and level; residual: 4 bytes an element |

`ratio` is fp32's bytes over the payload's for 1024 x 1024 elements (powersgd at R x C: R C / (4 R + 4 C)). `error` is
the relative error of one call, measured by the norm, for normally distributed numbers. This is the worst case for the
last four codecs: they send the rest later, and gradients, whose rows and columns differ, suit them better.

One rule says which jobs are in the exact class: those that keep no residual, `codec.residual_decay` 0. Then
decode(encode(x)) depends only on x and the seed, which only int4-hadamard uses. 0 is the default of the codecs up to
bf16-zstd. The last four keep a residual by default, with decay 1, or .95 for sparse: a payload depends on what its slot
sent before. With a decay above 0 any codec coarser than bf16 keeps a residual (`Codec.encode_with`), and sparse, topk
and sign go without one at 0. No payload, and no server, depends on the decay.

A value that is not finite stays not finite through every codec, so that the server detects it and skips the step. A
codec with a residual then sends a payload of NaN and keeps its state: the residual is still to be sent, because the
step is skipped.
"""

from __future__ import annotations

from gradstream.core.codecs._base import Codec, Payload, ResidualCodec, State
from gradstream.core.codecs._dense import Bf16, DenseCodec, Fp32, Int2, Int4, Int4Hadamard, Int8
from gradstream.core.codecs._factored import Factored
from gradstream.core.codecs._lossless import Bf16Zstd, Fp32Zstd, PlaneCodec
from gradstream.core.codecs._powersgd import PowerSgd
from gradstream.core.codecs._residual import Elements, Sign, TopK
from gradstream.core.codecs._sparse import Sparse
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.sizes import Shape
from gradstream.proto.v1 import plan_pb2

__all__ = [
    "CODEC_NAMES",
    "Codec",
    "DenseCodec",
    "Elements",
    "Payload",
    "PlaneCodec",
    "ResidualCodec",
    "Shape",
    "State",
    "TopK",
    "codec_named",
    "codec_on_wire",
]

_CODECS: tuple[Codec, ...] = (
    Fp32(),
    Bf16(),
    Int8(),
    Int4(),
    Int4Hadamard(),
    Int2(),
    Fp32Zstd(),
    Bf16Zstd(),
    TopK(),
    Sign(),
    PowerSgd(),
    Sparse(),
    Factored(),
)
_BY_NAME = {codec.name: codec for codec in _CODECS}
_BY_WIRE = {codec.wire: codec for codec in _CODECS}
if set(_BY_WIRE) != set(plan_pb2.Codec.values()) - {plan_pb2.CODEC_UNSPECIFIED}:
    raise RuntimeError("the codecs of gradstream.core.codecs and of plan.proto differ")
CODEC_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def codec_named(name: str) -> Codec:
    """The codec with a recipe's name. Raises KeyError for an unknown name: recipes are validated before."""
    return _BY_NAME[name]


def codec_on_wire(wire: int) -> Codec:
    """The codec with a message's number. Raises ProtocolError for an unknown number."""
    codec = _BY_WIRE.get(wire)  # type: ignore[call-overload]
    if codec is None:
        raise ProtocolError(f"unknown codec {wire}; do both sides run the same gradstream version?")
    return codec  # type: ignore[no-any-return]
