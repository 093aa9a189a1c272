"""Bundles: the fragments that are sent together, and the codec of each of their tensors.

A model has many small tensors, and each message costs as much as some hundreds of kilobytes of payload. Neighbouring
fragments of one server, up to a fragment's size together, therefore form a bundle: one contribution for each slot, and
one message of weights. Bundles depend on the placement, but no bit of a result depends on bundles, because codecs,
norms and optimizer work on fragments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from gradstream.core.plan.fragments import Fragment, TensorKind
from gradstream.core.recipe.recipe import CodecConfig

WEIGHTS = "weights"
"""The array of a bundle whose contributions are gradients, or differences of weights."""


@dataclass(frozen=True)
class Bundle:
    """Fragments of server `server` that are sent together. `index` is the bundle's place in the plan.

    Each slot contributes `num_parts` times: 2 if the tensors are tied across two pipeline stages, else 1. `array` is
    what is sent of the fragments: their weights, or a moment that slots share with local steps.
    """

    index: int
    server: int
    fragments: tuple[Fragment, ...]
    num_parts: int = 1
    array: str = WEIGHTS

    def is_of(self, tensors: Collection[int]) -> bool:
        """Whether the bundle's fragments belong to these tensors. All tensors of a bundle have the same use."""
        return self.fragments[0].tensor in tensors

    @cached_property
    def num_elements(self) -> int:
        return sum(fragment.num_elements for fragment in self.fragments)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each fragment among the bundle's concatenated elements."""
        bounds, begin = [], 0
        for fragment in self.fragments:
            bounds.append((begin, begin + fragment.num_elements))
            begin += fragment.num_elements
        return tuple(bounds)


@dataclass(frozen=True)
class Use:
    """The use of a tensor: the first pipeline stage that uses it, and the number of parts of its gradient.

    `own` is the tensor's number if its fragments share no bundle with those of others, because a rule updates the
    tensor only as a whole and it has several fragments; else -1.
    """

    stage: int = 0
    num_parts: int = 1
    own: int = -1


def bundle(
    fragments: Sequence[Fragment], placement: Sequence[int], max_elements: int, uses: Sequence[Use] = ()
) -> list[Bundle]:
    """Bundle the fragments of each server, in forward order.

    A bundle has at most `max_elements`, unless it is a single fragment, and only tensors with the same use. `uses` has
    the use of each tensor, or is empty if all have the same use. Bundles are numbered in the order of their first
    fragments.
    """
    groups: list[tuple[int, Use, list[Fragment]]] = []
    open_groups: dict[tuple[int, Use], tuple[int, list[Fragment]]] = {}
    for fragment in fragments:
        server, use = placement[fragment.index], uses[fragment.tensor] if uses else Use()
        elements, group = open_groups.get((server, use), (0, []))
        if not group or elements + fragment.num_elements > max_elements:
            elements, group = 0, []
            groups.append((server, use, group))
        group.append(fragment)
        open_groups[server, use] = (elements + fragment.num_elements, group)
    return [Bundle(index, server, tuple(group), use.num_parts) for index, (server, use, group) in enumerate(groups)]


LOSSLESS_ENOUGH = frozenset({"fp32", "bf16", "fp32-zstd", "bf16-zstd"})
"""Codecs that are fine enough for every kind of tensor."""


def codec_for(kind: TensorKind, codec: str, embedding: str) -> str:
    """The codec of a tensor, for a job with codec `codec` and the codec `embedding` for embeddings.

    Vectors (norms, biases) have few bytes and affect every activation: they stay bf16. A step changes only some rows of
    an embedding, and these share blocks, and so scales, with unchanged rows. An embedding therefore has its own codec,
    unless the job's is at least as fine.
    """
    if codec in LOSSLESS_ENOUGH or kind in ("matrix", "head"):
        return codec
    return "bf16" if kind == "vector" else embedding


AUTO_FIRST = "bf16"
"""The codec with which `codec: auto` begins, and to which it must never lose."""


def is_tuned(codec: CodecConfig) -> bool:
    """Whether the leader chooses a codec from the workers' measurements."""
    return "auto" in (codec.push, codec.pull)


def first_push_codec(codec: CodecConfig) -> str:
    """The codec of the contributions to a plan's first step."""
    return AUTO_FIRST if codec.push == "auto" else codec.push
