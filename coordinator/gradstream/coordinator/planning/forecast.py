"""Forecast the cost of a plan before anything starts: time, memory, bytes on every link. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradstream.coordinator.planning.fitting import num_parameters
from gradstream.coordinator.planning.needs import NodeOffer, fits, server_bytes, stage_need
from gradstream.coordinator.planning.pipeline_planner import (
    LATENCY_SECONDS,
    group_speeds,
    group_workers,
    num_microbatches,
    segments_of_stages,
    stage_costs,
)
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import Op, make_schedule
from gradstream.core.pipeline.simulation import simulate
from gradstream.core.plan.bundles import codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.forecast import Forecast, LinkForecast, PlaceForecast, ServerForecast, StageForecast
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import encoded_bytes


def forecast(
    plan: Plan,
    reasons: dict[str, str],
    profiles: Sequence[SegmentProfile] | None,
    servers: Sequence[NodeOffer],
    workers: Sequence[NodeOffer],
    link_bits_per_second: float,
    latency_seconds: float = LATENCY_SECONDS,
) -> Forecast:
    """Forecast the cost of a step of a plan on these nodes, each with a link of `link_bits_per_second` both ways.

    With local steps it is the cost of a round.

    The time of compute comes from a simulation of the schedule, in which messages between stages take latency and
    transmission. Push overlaps the compute after the first slot's gradient begins to be final. Pull overlaps the
    forward pass of one microbatch. In a round, push overlaps the compute after the first slot's last inner step, and
    pull overlaps nothing: a round begins when its version has fully arrived.

    Not included: encoding and decoding, the servers' own work, the inner optimizer's update, commits and checkpoints,
    messages between stages that share a link with push and pull, data in messages besides tensors, the gain of
    variable-length codecs, `codec: auto` beyond its first choice, the speed of the fastest worker relative to the
    processor on which the profile was taken, and nodes that share a machine.
    """
    size = plan.replica_size
    groups = _groups(plan, workers)
    num_replicas = max(1, len(groups[0]))
    share = -(-plan.num_slots // num_replicas)
    local = plan.recipe.local
    # Replicas of several workers compute a run of all their slots in a step, and one of a single slot in an inner step.
    runs = share if local is not None and size > 1 else 1
    microbatches = num_microbatches(plan.recipe.training, num_replicas) // runs
    pushed, pulled = _transfers(plan)
    messages = _messages(plan, profiles) if size > 1 else []
    # The node with the most bytes determines the time: a worker of the busiest place, or a server with all workers.
    per_second = link_bits_per_second / 8
    push_seconds = _busiest(pushed, share, plan.num_slots) / per_second
    pull_seconds = _busiest(pulled, 1, num_replicas) / per_second
    compute = bubble = exposed = step = None
    num_steps = local.steps if local is not None else 1
    reduced = _reduced(plan) if local is not None else []
    if profiles:
        late = latency_seconds + max(messages, default=0) / per_second
        recompute = plan.recipe.training.recompute
        costs = stage_costs(_cut(plan, profiles), profiles, late, group_speeds(groups), recompute)
        schedule = make_schedule(plan.pipeline_schedule or "1f1b", size, microbatches, plan.num_chunks)
        simulation = simulate(schedule, costs)
        # A reduction goes through all places up and down.
        reduction = 2 * sum(latency_seconds + num_bytes / per_second for num_bytes in reduced)
        compute = num_steps * runs * (simulation.makespan + reduction)
        bubble = max(0.0, simulation.bubble)
        forward = min(cost[Op.FORWARD] for cost in costs.compute)
        backward = min(cost[Op.BACKWARD] for cost in costs.compute)
        if local is not None:
            forward = backward = 0.0
        exposed = max(0.0, push_seconds - compute * (1 - 1 / share) - backward) + max(0.0, pull_seconds - forward)
        step = (compute + exposed) / num_steps
    tokens = plan.recipe.training.global_batch * plan.recipe.training.sequence_length
    return Forecast(
        num_parameters=plan.num_parameters,
        num_replicas=num_replicas,
        num_microbatches=microbatches,
        stages=tuple(_stages(plan, profiles or ())),
        places=tuple(
            PlaceForecast(
                place,
                tuple(worker.name for worker in group),
                _need(plan, place, profiles or ()),
                min((worker.memory_bytes for worker in group if worker.memory_bytes), default=0),
            )
            for place, group in enumerate(groups)
        ),
        servers=tuple(_servers(plan, servers)),
        links=tuple(_links(plan, pushed, pulled, messages, reduced, share, num_steps * runs * microbatches)),
        schedule=plan.pipeline_schedule,
        link_bits_per_second=link_bits_per_second,
        compute_seconds=compute,
        bubble=bubble,
        push_seconds=push_seconds,
        pull_seconds=pull_seconds,
        exposed_seconds=exposed,
        step_seconds=step,
        tokens_per_second=tokens / step if step else None,
        reasons=reasons,
        round_steps=num_steps if local is not None else 0,
        worker_step_bytes=(_busiest(pushed, share, 0) + _busiest(pulled, 1, 0)) / num_steps,
        utilisation=compute / (num_steps * step) if compute is not None and step else None,
    )


Transfers = dict[tuple[int, int], int]
"""Bytes by (place, server)."""


def _groups(plan: Plan, workers: Sequence[NodeOffer]) -> Sequence[Sequence[NodeOffer]]:
    """The workers of each place, for as many replicas as their memory allows."""
    if not plan.has_pipeline:
        return [[worker for worker in workers if fits(worker.memory_bytes, stage_need(plan))]]
    size = plan.replica_size
    for num_replicas in range(len(workers) // size, 0, -1):
        for groups in group_workers(workers, size, num_replicas):
            needs = [(worker, stage_need(plan, place)) for place, group in enumerate(groups) for worker in group]
            if all(fits(worker.memory_bytes, need) for worker, need in needs):
                return groups
    return [[]] * size


def _need(plan: Plan, place: int, profiles: Sequence[SegmentProfile]) -> int:
    """Bytes that the worker in a place needs, including activations, which a plan without a pipeline leaves out."""
    need = stage_need(plan, place)
    if not plan.has_pipeline:
        need += sum(profile.activation_bytes for profile in profiles)
        need += max((profile.working_bytes for profile in profiles), default=0)
    return need


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
    cut = _cut(plan, profiles)
    return [encoded_bytes(codec, (profiles[segments[-1]].output_elements,)) for segments in cut[:-1]]


def _links(
    plan: Plan,
    pushed: Transfers,
    pulled: Transfers,
    messages: Sequence[int],
    reduced: Sequence[int],
    share: int,
    microbatches: int,
) -> Iterator[LinkForecast]:
    """The bytes on each link in a step or round. `microbatches` are those that a stage computes in it."""

    def worker(place: int) -> str:
        return f"worker in place {place}" if plan.has_pipeline else "worker"

    for (place, server), num_bytes in sorted(pushed.items()):
        yield LinkForecast("push", worker(place), plan.servers[server].name, share * num_bytes)
    for (place, server), num_bytes in sorted(pulled.items()):
        yield LinkForecast("pull", plan.servers[server].name, worker(place), num_bytes)
    for stage, num_bytes in enumerate(messages):
        before, after = f"stage {stage}", f"stage {stage + 1}"
        yield LinkForecast("activations", before, after, microbatches * num_bytes)
        yield LinkForecast("gradients", after, before, microbatches * num_bytes)
    num_reductions = share * plan.recipe.local.steps if plan.recipe.local is not None else 0
    for place, num_bytes in enumerate(reduced):
        if num_bytes:
            yield LinkForecast("tied gradients", worker(place), worker(place + 1), num_reductions * num_bytes)
            yield LinkForecast("tied gradients", worker(place + 1), worker(place), num_reductions * num_bytes)


def _cut(plan: Plan, profiles: Sequence[SegmentProfile]) -> list[range]:
    return segments_of_stages(plan.stage_ends, profiles) if plan.has_pipeline else [range(len(profiles))]


def _stages(plan: Plan, profiles: Sequence[SegmentProfile]) -> Iterator[StageForecast]:
    if not profiles:
        return
    for stage, segments in enumerate(_cut(plan, profiles)):
        found = [profiles[segment] for segment in segments]
        yield StageForecast(
            stage=stage,
            place=stage % plan.replica_size,
            segments=tuple(profile.name for profile in found),
            # Without a pipeline a tied tensor counts once.
            num_parameters=num_parameters(plan.tensors, [unit for profile in found for unit in profile.units])
            if plan.has_pipeline
            else plan.num_parameters,
            forward_seconds=sum(profile.forward_seconds for profile in found),
            backward_seconds=sum(profile.backward_seconds for profile in found),
            measured=all(profile.measured for profile in found),
        )


def _servers(plan: Plan, offers: Sequence[NodeOffer]) -> Iterator[ServerForecast]:
    offered = {offer.node_id: offer.memory_bytes for offer in offers}
    for index, server in enumerate(plan.servers):
        fragments = plan.fragments_of(index)
        need = server_bytes(plan.recipe, fragments, plan.tensors)
        count = sum(fragment.num_elements for fragment in fragments)
        yield ServerForecast(server.name, count, need.most, need.state, offered.get(server.node_id, 0))
