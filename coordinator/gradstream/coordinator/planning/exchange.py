"""What workers and servers exchange after a step or a round of a plan: bytes, seconds, and the share left to compute.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.coordinator.planning.needs import NodeOffer
from gradstream.coordinator.planning.pipeline_planner import (
    group_speeds,
    num_microbatches,
    segments_of_stages,
    stage_costs,
)
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import Op, make_schedule
from gradstream.core.pipeline.simulation import simulate
from gradstream.core.plan.bundles import codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import encoded_bytes

Transfers = dict[tuple[int, int], int]
"""Bytes by (place, server)."""


@dataclass(frozen=True)
class Pace:
    """The seconds of an exchange, and of the compute of each step before it.

    A worker computes `share` slots. Push overlaps the compute after the first slot's, and `push_overlap` seconds
    besides, but at least `late_push_seconds` of it overlap none. Pull overlaps `pull_overlap` seconds of compute or
    push.
    """

    compute_seconds: float
    push_seconds: float
    pull_seconds: float
    share: int = 1
    push_overlap: float = 0.0
    pull_overlap: float = 0.0
    late_push_seconds: float = 0.0

    def exposed_seconds(self, num_steps: int) -> float:
        """The time of an exchange after `num_steps` steps that does not overlap compute."""
        pushed_late = self.push_seconds - num_steps * self.compute_seconds * (1 - 1 / self.share) - self.push_overlap
        return max(self.late_push_seconds, pushed_late) + max(0.0, self.pull_seconds - self.pull_overlap)

    def utilisation(self, num_steps: int) -> float | None:
        """The share of the time in which workers compute, with an exchange every `num_steps` steps."""
        compute = num_steps * self.compute_seconds
        exposed = self.exposed_seconds(num_steps)
        return compute / (compute + exposed) if compute + exposed else None


@dataclass(frozen=True)
class Exchange:
    """An exchange of a plan: of a step, or of a round. `pace` and `bubble` are None without profiles.

    `pushed` and `pulled` have the bytes of one slot's contribution and of one version, `messages` those of activations
    between the stages and `reduced` those of tied gradients between the places. A worker computes `share` slots in
    `runs` runs of `num_microbatches`, and sends and receives `worker_bytes` at most.
    """

    num_replicas: int
    share: int
    runs: int
    num_microbatches: int
    pushed: Transfers
    pulled: Transfers
    messages: list[int]
    reduced: list[int]
    push_seconds: float
    pull_seconds: float
    worker_bytes: int
    bubble: float | None
    pace: Pace | None


def exchange_of(
    plan: Plan,
    profiles: Sequence[SegmentProfile] | None,
    groups: Sequence[Sequence[NodeOffer]],
    link_bits_per_second: float,
    latency_seconds: float,
) -> Exchange:
    """The exchange of a plan's step, or of its round, for the workers of each place.

    Raises ConfigError if the plan's schedule does not exist for its number of microbatches.
    """
    size, local = plan.replica_size, plan.recipe.local
    num_replicas = max(1, len(groups[0]))
    share = -(-plan.num_slots // num_replicas)
    # Replicas of several workers compute a run of all their slots in a step, and one of a single slot in an inner step.
    runs = share if local is not None and size > 1 else 1
    microbatches = num_microbatches(plan.recipe.training, num_replicas) // runs
    pushed, pulled = _transfers(plan)
    messages = _messages(plan, profiles) if size > 1 else []
    reduced = _reduced(plan) if local is not None else []
    # The node with the most bytes determines the time: a worker of the busiest place, or a server with all workers.
    per_second = link_bits_per_second / 8
    push_seconds = _busiest(pushed, share, plan.num_slots) / per_second
    pull_seconds = _busiest(pulled, 1, num_replicas) / per_second
    bubble = pace = None
    if profiles:
        late = latency_seconds + max(messages, default=0) / per_second
        recompute = plan.recipe.training.recompute
        costs = stage_costs(cut_of(plan, profiles), profiles, late, group_speeds(groups), recompute)
        schedule = make_schedule(plan.pipeline_schedule or "1f1b", size, microbatches, plan.num_chunks)
        simulation = simulate(schedule, costs)
        # A reduction goes through all places up and down.
        reduction = 2 * sum(latency_seconds + num_bytes / per_second for num_bytes in reduced)
        bubble = max(0.0, simulation.bubble)
        # A round's last slot is sent when its compute is over. Its bundles come back while the next ones are sent.
        last_slot = push_seconds / share if local is not None else 0.0
        pace = Pace(
            compute_seconds=runs * (simulation.makespan + reduction),
            push_seconds=push_seconds,
            pull_seconds=pull_seconds,
            share=share,
            push_overlap=min(cost[Op.BACKWARD] for cost in costs.compute) if local is None else 0.0,
            pull_overlap=min(cost[Op.FORWARD] for cost in costs.compute) if local is None else last_slot,
            late_push_seconds=last_slot,
        )
    return Exchange(
        num_replicas=num_replicas,
        share=share,
        runs=runs,
        num_microbatches=microbatches,
        pushed=pushed,
        pulled=pulled,
        messages=messages,
        reduced=reduced,
        push_seconds=push_seconds,
        pull_seconds=pull_seconds,
        worker_bytes=_busiest(pushed, share, 0) + _busiest(pulled, 1, 0),
        bubble=bubble,
        pace=pace,
    )


def cut_of(plan: Plan, profiles: Sequence[SegmentProfile]) -> list[range]:
    """The segments of each stage."""
    return segments_of_stages(plan.stage_ends, profiles) if plan.has_pipeline else [range(len(profiles))]


def _transfers(plan: Plan) -> tuple[Transfers, Transfers]:
    """Bytes that a worker of each place pushes to each server for one slot, and pulls from it for one version.

    With local steps these are those of a round, with the moments that slots share.
    """
    codec = plan.recipe.codec
    push, form = first_push_codec(codec), downlink(codec.pull)
    pull, table = (form.delta, form.delta) if form.delta is not None else (form.full, codec.embedding)
    pushed: Transfers = {}
    pulled: Transfers = {}
    for fragment in plan.fragments:
        tensor, server = plan.tensors[fragment.tensor], plan.placement[fragment.index]
        places = plan.places_of(tensor)
        num_bytes = encoded_bytes(codec_for(tensor.kind, push, codec.embedding), fragment.shape)
        for place in places if plan.recipe.local is None else places[:1]:
            pushed[place, server] = pushed.get((place, server), 0) + num_bytes
        num_bytes = encoded_bytes(codec_for(tensor.kind, pull, table), fragment.shape)
        for place in set(places):
            pulled[place, server] = pulled.get((place, server), 0) + num_bytes
    if plan.recipe.local is not None:
        for bundle in plan.moment_bundles:
            sizes = (encoded_bytes(plan.codec_of(bundle, push), fragment.shape) for fragment in bundle.fragments)
            num_bytes = sum(sizes)
            places = plan.places_of(plan.tensors[bundle.fragments[0].tensor])
            for transfers, of_places in ((pushed, places[:1]), (pulled, sorted(set(places)))):
                for place in of_places:
                    transfers[place, bundle.server] = transfers.get((place, bundle.server), 0) + num_bytes
    return pushed, pulled


def _reduced(plan: Plan) -> list[int]:
    """Bytes of tied gradients that pass, in each direction, between each place and the next one in a reduction."""
    found = [0] * (plan.replica_size - 1)
    for tensor in plan.tensors:
        places = plan.places_of(tensor)
        for place in range(min(places), max(places)):
            found[place] += BYTES_PER_ELEMENT * tensor.num_elements
    return found


def _busiest(transfers: Transfers, per_worker: int, per_server: int) -> int:
    """Bytes of the busiest node; each transfer counts `per_worker` times at the worker, `per_server` at the server."""
    workers: dict[int, int] = {}
    servers: dict[int, int] = {}
    for (place, server), num_bytes in transfers.items():
        workers[place] = workers.get(place, 0) + per_worker * num_bytes
        servers[server] = servers.get(server, 0) + per_server * num_bytes
    return max([*workers.values(), *servers.values()])


def _messages(plan: Plan, profiles: Sequence[SegmentProfile] | None) -> list[int]:
    """Bytes of a microbatch's activations, equal to those of their gradients, between each stage and the next."""
    if not profiles:
        return []
    codec = plan.recipe.pipeline.activations
    cut = cut_of(plan, profiles)
    return [encoded_bytes(codec, (profiles[segments[-1]].output_elements,)) for segments in cut[:-1]]
