"""Bundles: the fragments that travel together, and how each of their tensors is encoded.

A model has many small tensors, and a message costs what some hundreds of kilobytes cost. So neighbouring fragments of
one server, up to a fragment's size together, form a bundle: one contribution a slot, one message down. What is in a
bundle depends on the placement, but no bit of a result depends on it: codecs, norms and optimizer see fragments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from gradstream.core.plan.fragments import Fragment, TensorKind
from gradstream.core.recipe.recipe import RESIDUAL_CODECS, CodecConfig


@dataclass(frozen=True)
class Bundle:
    """Fragments of server `server` that travel together; `index` is the bundle's place in the plan.

    Each slot contributes `num_parts` times: 2 where the tensors are tied across two pipeline stages.
    """

    index: int
    server: int
    fragments: tuple[Fragment, ...]
    num_parts: int = 1

    def is_of(self, tensors: Collection[int]) -> bool:
        """Whether it has fragments of these tensors: all of its tensors are used alike."""
        return self.fragments[0].tensor in tensors

    @cached_property
    def num_elements(self) -> int:
        return sum(fragment.num_elements for fragment in self.fragments)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """For each fragment its (begin, end) in the bundle's elements laid end to end."""
        bounds, begin = [], 0
        for fragment in self.fragments:
            bounds.append((begin, begin + fragment.num_elements))
            begin += fragment.num_elements
        return tuple(bounds)


@dataclass(frozen=True)
class Use:
    """Where a tensor is used: by which pipeline stage first, and in how many parts its gradient comes."""

    stage: int = 0
    num_parts: int = 1


def bundle(
    fragments: Sequence[Fragment], placement: Sequence[int], max_elements: int, uses: Sequence[Use] = ()
) -> list[Bundle]:
    """Bundle the fragments of each server, in forward order: at most `max_elements`, unless it is a single fragment,
    and of tensors of one use alone; `uses` has that of each tensor, or is empty where all are used alike.

    Bundles are numbered by their first fragment.
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
"""Codecs that every kind of tensor may have."""


def keeps_residuals(codec: CodecConfig) -> bool:
    """Whether the slots of a job keep residuals, which are then part of its checkpoints."""
    return codec.push in RESIDUAL_CODECS


def codec_for(kind: TensorKind, codec: str, embedding: str) -> str:
    """The codec of a tensor when a job's codec is `codec` and its tables are to have `embedding`.

    Vectors (norms, biases) are few bytes and touch every activation: they stay bf16. Of an embedding a step touches
    single rows, whose scale a block shares with rows that were not touched: it has a codec of its own, unless the
    job's is at least as fine.
    """
    if codec in LOSSLESS_ENOUGH or kind == "matrix":
        return codec
    return "bf16" if kind == "vector" else embedding


AUTO_FIRST = "bf16"
"""What `codec: auto` begins with, and what it must never lose to."""


def is_tuned(codec: CodecConfig) -> bool:
    """Whether the leader chooses a codec by what workers measure."""
    return "auto" in (codec.push, codec.pull)


def first_push_codec(codec: CodecConfig) -> str:
    """The codec of the contributions to a plan's first step."""
    return AUTO_FIRST if codec.push == "auto" else codec.push
