"""The smallest change of a recipe or a cluster with which a model has a layout. Pure functions.

Changes are tried in this order, and the first one that fits is the answer:
  1. settings of the layout: `pipeline.stages` and `pipeline.schedule`;
  2. settings that cost time: a smaller microbatch, recomputed activations, both;
  3. more workers, with the fewest of these settings;
  4. workers with more memory, with the settings that need least.

Where it is the servers that lack memory, for the streams of all workers, fewer slots are the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gradstream.coordinator.planning.fitting import NO_LIMIT, Fitter, segment_costs
from gradstream.coordinator.planning.needs import human_bytes
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, Tensor
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.wire.stream_limits import Traffic, more_than_usual_bytes

PRECISION_BYTES = 1 << 20
"""The memory that workers must offer is found up to this, or up to a thousandth where that is less."""


@dataclass(frozen=True)
class _Setting:
    """Keys of a recipe with other values, for people, and what can then be held."""

    keys: tuple[str, ...]
    fitter: Fitter


def smallest_change(
    recipe: Recipe, tensors: Sequence[Tensor], profiles: Sequence[SegmentProfile], memories: Sequence[int]
) -> str:
    """Name the smallest change with which workers of these memories hold the model, in words for one line.

    `memories` are bytes, NO_LIMIT where unknown; together they do not hold the model as the recipe is.
    """
    largest = sorted(memories, reverse=True)
    settings = list(_settings(recipe, tensors, profiles))
    for setting in settings:
        size = setting.fitter.fewest(largest)
        if size is not None:
            return _told(
                [*setting.keys], f"with {size} stage{'s' * (size > 1)} a replica" if _cuts_anew(setting) else ""
            )
    for setting in settings:
        count = _missing_workers(setting.fitter, largest)
        if count:
            size_text = "" if largest[0] == NO_LIMIT else f" of {human_bytes(largest[0])}"
            return _told([*setting.keys, f"{count} more worker{'s' * (count > 1)}{size_text}"])
    needs = [(_needed_memory(setting.fitter, len(largest)), setting) for setting in settings]
    need, setting = min(needs, key=lambda item: item[0])
    return _told([*setting.keys, f"workers of {_rounded_up(need)} instead of {human_bytes(largest[0])}"])


def _told(keys: Sequence[str], more: str = "") -> str:
    return f"the smallest change: {' and '.join(keys)}{', ' + more if more else ''}"


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(recipe: Recipe, tensors: Sequence[Tensor], profiles: Sequence[SegmentProfile]) -> Iterator[_Setting]:
    """The recipe's settings with few changes first, then many; the first one is the recipe itself."""
    training, pipeline = recipe.training, recipe.pipeline
    layouts: list[dict[str, object]] = [{}]
    if pipeline.schedule != "auto":
        layouts.append({"schedule": "auto"})
    if pipeline.stages != "auto" and pipeline.chunks == 1:
        layouts += [{**layout, "stages": "auto"} for layout in layouts]
    smaller = [size for size in range(training.microbatch - 1, 0, -1) if training.slot_batch % size == 0]
    batches = [(), *((size,) for size in smaller)]
    again = [False] if training.recompute else [False, True]
    tried = [(layout, batch, recompute) for recompute in again for batch in batches for layout in layouts]
    # Stable: among equally many keys a layout comes before a microbatch, and a microbatch before recomputation.
    tried.sort(key=lambda item: len(item[0]) + len(item[1]) + item[2])
    for layout, batch, recompute in tried:
        changed: dict[str, object] = {}
        keys = [f"pipeline.{key}={value}" for key, value in sorted(layout.items(), reverse=True)]
        found = list(profiles)
        if batch:
            changed["microbatch"] = batch[0]
            keys.append(f"training.microbatch={batch[0]} instead of {training.microbatch}")
            found = [smaller_microbatch(profile, batch[0], training.microbatch) for profile in found]
        if recompute:
            changed["recompute"] = True
            keys.append("training.recompute=true")
            found = recomputed(found)
        other = recipe.model_copy(
            update={
                "training": training.model_copy(update=changed),
                "pipeline": pipeline.model_copy(update=layout),
            }
        )
        yield _Setting(tuple(keys), Fitter(other, segment_costs(other, tensors, found), found))


def smaller_microbatch(profile: SegmentProfile, samples: int, instead_of: int) -> SegmentProfile:
    """Estimate a segment's profile for a microbatch of another size: everything is proportional to its samples."""
    share = samples / instead_of
    return replace(
        profile,
        forward_seconds=share * profile.forward_seconds,
        backward_seconds=share * profile.backward_seconds,
        backward_input_seconds=share * profile.backward_input_seconds,
        backward_weight_seconds=share * profile.backward_weight_seconds,
        activation_bytes=-(-profile.activation_bytes * samples // instead_of),
        working_bytes=-(-profile.working_bytes * samples // instead_of),
        output_elements=profile.output_elements * samples // instead_of,
    )


def recomputed(profiles: Sequence[SegmentProfile]) -> list[SegmentProfile]:
    """Estimate the profiles with recomputed activations: a layer keeps its input, and computes its forward pass again.

    The first and the last segment (embedding, head) do not recompute.
    """
    found = list(profiles)
    for index in range(1, len(profiles) - 1):
        profile = profiles[index]
        found[index] = replace(
            profile,
            backward_seconds=profile.backward_seconds + profile.forward_seconds,
            backward_input_seconds=profile.backward_input_seconds + profile.forward_seconds,
            activation_bytes=min(profile.activation_bytes, BYTES_PER_ELEMENT * profiles[index - 1].output_elements),
            working_bytes=profile.activation_bytes,
        )
    return found


def _cuts_anew(setting: _Setting) -> bool:
    return any(key.startswith("pipeline.stages") for key in setting.keys)


# --- servers ----------------------------------------------------------------------------------------------------------


def fewer_slots(plan: Plan, rooms: Sequence[int], found: Sequence[Traffic]) -> str:
    """Name the largest number of slots with whose workers' streams the servers have room, in words that end a line.

    `rooms` are the bytes that each server has beside its shard, `found` the traffic with each of them. Empty when no
    number of slots is low enough.
    """
    training = plan.recipe.training
    for slots in range(plan.num_slots - 1, 0, -1):
        if training.global_batch % (slots * training.microbatch):
            continue
        workers = slots * plan.replica_size
        fewer = [
            replace(each, step_bytes=each.step_bytes and each.step_bytes * slots // plan.num_slots) for each in found
        ]
        if all(more_than_usual_bytes(workers, each) <= room for each, room in zip(fewer, rooms, strict=True)):
            return f"; the smallest change: training.num_slots={slots} instead of {plan.num_slots}"
    return ""


# --- machines ---------------------------------------------------------------------------------------------------------


def _missing_workers(fitter: Fitter, memories: Sequence[int]) -> int:
    """The fewest workers like the largest one that must be added; 0 when more workers do not help."""
    low, high = 0, fitter.sizes[-1]
    if fitter.fewest([memories[0]] * high + list(memories)) is None:
        return 0
    while low + 1 < high:  # `high` more are enough, `low` are not
        middle = (low + high) // 2
        if fitter.fewest([memories[0]] * middle + list(memories)) is None:
            low = middle
        else:
            high = middle
    return high


def _needed_memory(fitter: Fitter, num_workers: int) -> int:
    """The memory in bytes that each of `num_workers` workers needs."""
    low, high = 0, PRECISION_BYTES
    while fitter.fewest([high] * num_workers) is None:
        low, high = high, 2 * high
        if high >= NO_LIMIT:
            return NO_LIMIT
    while high - low > min(PRECISION_BYTES, max(1, high >> 10)):
        middle = (low + high) // 2
        if fitter.fewest([middle] * num_workers) is None:
            low = middle
        else:
            high = middle
    return high


def _rounded_up(count: int) -> str:
    """`human_bytes`, rounded up to the digits that it shows."""
    unit = 1
    while count >= 1024 * unit and unit < 1 << 40:
        unit <<= 10
    return human_bytes(-(-count * 10 // unit) * unit // 10) if unit > 1 else human_bytes(count)
