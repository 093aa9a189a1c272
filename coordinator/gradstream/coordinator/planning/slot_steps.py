"""Decide how many inner steps each slot takes in a round, by the speeds of the workers. Pure functions.

A slot of a worker half as fast takes half the inner steps. All slots' rounds then take about as long, and no worker
waits long for another one. The numbers shape the trajectory, so they are decided once in a job and stored in its
recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.coordinator.planning.needs import MAX_NAMED, NodeOffer, named
from gradstream.core.plan.leases import assign_slots, slots_text
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe

EQUAL_SHARE = 0.15
"""Speeds that differ by at most this share count as equal."""


def choose_slot_steps(num_slots: int, num_steps: int, workers: Sequence[NodeOffer]) -> tuple[tuple[int, ...], str]:
    """Return the inner steps of each slot in a round of at most `num_steps`, and the reason.

    The workers take the slots in turn, fastest first; a slot has `num_steps` times the speed of its worker over that of
    the fastest one, rounded, and at least 1. At most `num_slots` workers count, the fastest ones.
    """
    everyone = f"slot steps: every slot takes {num_steps} inner steps a round"
    unknown = [worker.name for worker in workers if worker.flops_per_second <= 0]
    if not workers or unknown:
        cause = f"of {named(unknown)} no speed is known" if unknown else "no worker is known"
        return (num_steps,) * num_slots, f"{everyone}, because {cause}"
    ranked = sorted(workers, key=lambda worker: (-worker.flops_per_second, worker.name))[:num_slots]
    fastest = level = ranked[0].flops_per_second
    lengths = []
    for worker in ranked:
        if worker.flops_per_second < (1 - EQUAL_SHARE) * level:
            level = worker.flops_per_second
        lengths.append(max(1, round(num_steps * level / fastest)))
    slots = tuple(lengths[slot % len(lengths)] for slot in range(num_slots))
    if min(slots) == num_steps:
        cause = f"the speeds of {len(ranked)} workers are alike" if len(ranked) > 1 else "one worker computes"
        return slots, f"{everyone}, because {cause}"
    shown = [
        f"{worker.name} has {worker.flops_per_second / fastest:.2f} of the highest speed, its slots take {length}"
        for worker, length in list(zip(ranked, lengths, strict=True))[:MAX_NAMED]
    ]
    more = [f"and {len(ranked) - MAX_NAMED} more workers"] if len(ranked) > MAX_NAMED else []
    numbers = ", ".join(map(str, slots))
    return slots, "; ".join([f"slot steps: {numbers} inner steps of at most {num_steps} a round", *shown, *more])


def with_slot_steps(recipe: Recipe, workers: Sequence[NodeOffer]) -> tuple[Recipe, dict[str, str]]:
    """Decide the slots' inner steps where the recipe leaves them to the plan; return the recipe, and the reason."""
    local = recipe.local
    if local is None or not local.undecided:
        return recipe, {}
    chosen, reason = choose_slot_steps(recipe.training.num_slots, local.steps, workers)
    return recipe.model_copy(update={"local": local.model_copy(update={"chosen_slot_steps": chosen})}), {
        "slot steps": reason
    }


@dataclass(frozen=True)
class Load:
    """The slots that a worker would hold, and the seconds that it computes in a round."""

    worker: str
    slots: tuple[int, ...]
    seconds: float


def loads_of(plan: Plan, workers: Sequence[NodeOffer], pass_seconds: float) -> list[Load]:
    """The workers' loads in a round; empty unless slots take different numbers of inner steps.

    `pass_seconds` is the time of the fastest worker for an inner step of a slot.
    """
    lengths = plan.rounds.slot_lengths
    if not workers or len(set(lengths)) < 2:
        return []
    fastest = max(worker.flops_per_second for worker in workers)
    pace = {
        worker.name: pass_seconds * fastest / worker.flops_per_second if worker.flops_per_second else pass_seconds
        for worker in workers
    }
    holders, _ = assign_slots([""] * plan.num_slots, list(pace), pace, lengths)
    held = {name: tuple(slot for slot, holder in enumerate(holders) if holder == name) for name in pace}
    return [
        Load(name, slots, pace[name] * sum(lengths[slot] for slot in slots)) for name, slots in sorted(held.items())
    ]


def utilisation_text(loads: Sequence[Load], round_seconds: float) -> str:
    """The share of a round in which each worker computes, for people."""
    shown = [
        f"{load.worker} computes {100 * load.seconds / round_seconds:.1f} % of the time, with {slots_text(load.slots)}"
        if load.slots
        else f"{load.worker} has no slot"
        for load in loads[:MAX_NAMED]
    ]
    more = [f"and {len(loads) - MAX_NAMED} more workers"] if len(loads) > MAX_NAMED else []
    return f"utilisation: {'; '.join([*shown, *more])}"
