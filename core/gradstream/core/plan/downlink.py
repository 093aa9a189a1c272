"""The forms in which workers pull weights, as `codec.pull` names them.

| pull                  | a worker that holds the version before gets            | a newcomer gets        | reference |
|-----------------------|--------------------------------------------------------|------------------------|-----------|
| fp32, bf16, int8, …   | the weights in that codec                              | the same               | —         |
| delta-int8, -int4, …  | the difference to the reference, in that codec         | the reference, in fp32 | 4 bytes   |
| xor-fp32, xor-bf16    | the bits that changed, byte-sorted and zstd-compressed | the weights, in it     | —         |
| auto                  | a delta, in the codec chosen for the version           | the reference, in fp32 | 4 bytes   |

The reference is the weights that every worker holds. The server keeps the same reference, adds to it exactly what it
sends, and sends the next difference to it. The error of one version is therefore corrected in the next and never adds
up (the error feedback of downlink compression in DoubleSqueeze, Tang et al. 2019). The reference is part of the
trajectory, and of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradstream.core.plan.bundles import AUTO_FIRST


@dataclass(frozen=True)
class Downlink:
    """The codecs of a job's pulls.

    `full` is the codec of a whole bundle, `delta` that of a difference, or None if every pull is whole. With `xor` the
    difference is between bits, not between values.
    """

    full: str
    delta: str | None = None
    xor: bool = False

    @property
    def keeps_reference(self) -> bool:
        """Whether the server holds a reference, which checkpoints then save."""
        return self.delta is not None and not self.xor


def downlink(pull: str) -> Downlink:
    """The downlink for a recipe's `codec.pull`. With "auto" the delta's codec is that of the first version."""
    kind, _, codec = pull.partition("-")
    if pull == "auto":
        return Downlink("fp32", AUTO_FIRST)
    if kind == "delta":
        return Downlink("fp32", codec)
    if kind == "xor":
        return Downlink(codec, f"{codec}-zstd", xor=True)
    return Downlink(pull)
