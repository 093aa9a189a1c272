"""Forecast the cost of a plan before anything starts: time, memory, bytes on every link. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gradstream.coordinator.planning.exchange import Exchange, cut_of, exchange_of
from gradstream.coordinator.planning.fitting import num_parameters
from gradstream.coordinator.planning.local_advice import advise, exchange_options
from gradstream.coordinator.planning.needs import NodeOffer, fits, server_bytes, stage_need
from gradstream.coordinator.planning.pipeline_planner import LATENCY_SECONDS, group_speeds, group_workers
from gradstream.coordinator.planning.slot_steps import loads_of, utilisation_text
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.plan.forecast import (
    ExchangeOption,
    Forecast,
    LinkForecast,
    PlaceForecast,
    ServerForecast,
    StageForecast,
)
from gradstream.core.plan.plan import Plan


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
    transmission. Where slots take different numbers of inner steps, compute is that of the worker that takes longest
    with the slots that it would hold, and transfers are those of even numbers of slots. Push overlaps the compute after
    the first slot's gradient begins to be final. Pull overlaps the forward pass of one microbatch. In a round, push
    overlaps the compute after the first slot's last inner step, and pull the push of the last slot; a round begins when
    its version has fully arrived.

    Not included: encoding and decoding, the servers' own work, the inner optimizer's update, commits and checkpoints,
    messages between stages that share a link with push and pull, data in messages besides tensors, the gain of
    variable-length codecs, `codec: auto` beyond its first choice, the speed of the fastest worker relative to the
    processor on which the profile was taken, and nodes that share a machine.
    """
    groups = _groups(plan, workers)

    def exchange_with(changed: Plan) -> Exchange:
        return exchange_of(changed, profiles, groups, link_bits_per_second, latency_seconds)

    exchange = exchange_with(plan)
    local, pace = plan.recipe.local, exchange.pace
    num_steps = local.steps if local is not None else 1
    compute = exposed = step = None
    if pace is not None:
        loads = loads_of(plan, groups[0], pace.compute_seconds * group_speeds(groups)[0] / exchange.share)
        if loads:
            pace = replace(pace, compute_seconds=max(load.seconds for load in loads) / num_steps)
        compute, exposed = num_steps * pace.compute_seconds, pace.exposed_seconds(num_steps)
        step = (compute + exposed) / num_steps
        if loads:
            reasons = {**reasons, "utilisation": utilisation_text(loads, compute + exposed)}
    samples = plan.recipe.num_samples(local.after if local is not None else 0)
    tokens = samples * plan.recipe.training.sequence_length / num_steps
    options, advice = _advised(exchange_options(plan, exchange_with))
    return Forecast(
        num_parameters=plan.num_parameters,
        num_replicas=exchange.num_replicas,
        num_microbatches=exchange.num_microbatches,
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
        links=tuple(_links(plan, exchange, num_steps)),
        schedule=plan.pipeline_schedule,
        link_bits_per_second=link_bits_per_second,
        compute_seconds=compute,
        bubble=exchange.bubble,
        push_seconds=exchange.push_seconds,
        pull_seconds=exchange.pull_seconds,
        exposed_seconds=exposed,
        step_seconds=step,
        tokens_per_second=tokens / step if step else None,
        reasons=reasons,
        round_steps=num_steps if local is not None else 0,
        worker_step_bytes=exchange.worker_bytes / num_steps,
        utilisation=pace.utilisation(num_steps) if pace is not None else None,
        options=options,
        advice=advice,
    )


def _advised(options: Sequence[ExchangeOption]) -> tuple[tuple[ExchangeOption, ...], str]:
    """Mark the option that is advised; return the options with the reason. No options: no advice."""
    if not options:
        return (), ""
    chosen, reason = advise(options)
    return tuple(replace(option, advised=option is chosen) for option in options), reason


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


def _links(plan: Plan, exchange: Exchange, num_steps: int) -> Iterator[LinkForecast]:
    """The bytes on each link in a step, or in a round of `num_steps` inner steps."""
    share = exchange.share
    microbatches = num_steps * exchange.runs * exchange.num_microbatches

    def worker(place: int) -> str:
        return f"worker in place {place}" if plan.has_pipeline else "worker"

    for (place, server), num_bytes in sorted(exchange.pushed.items()):
        yield LinkForecast("push", worker(place), plan.servers[server].name, share * num_bytes)
    for (place, server), num_bytes in sorted(exchange.pulled.items()):
        yield LinkForecast("pull", plan.servers[server].name, worker(place), num_bytes)
    for stage, num_bytes in enumerate(exchange.messages):
        before, after = f"stage {stage}", f"stage {stage + 1}"
        yield LinkForecast("activations", before, after, microbatches * num_bytes)
        yield LinkForecast("gradients", after, before, microbatches * num_bytes)
    num_reductions = share * plan.recipe.local.steps if plan.recipe.local is not None else 0
    for place, num_bytes in enumerate(exchange.reduced):
        if num_bytes:
            yield LinkForecast("tied gradients", worker(place), worker(place + 1), num_reductions * num_bytes)
            yield LinkForecast("tied gradients", worker(place + 1), worker(place), num_reductions * num_bytes)


def _stages(plan: Plan, profiles: Sequence[SegmentProfile]) -> Iterator[StageForecast]:
    if not profiles:
        return
    for stage, segments in enumerate(cut_of(plan, profiles)):
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
