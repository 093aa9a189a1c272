"""Make a plan with its reasons: a pure function of the recipe and the cluster's offers.

Errors that can be predicted are raised here, before any data is loaded: memory, vocabulary, data shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradstream.coordinator.planning.fitting import NO_LIMIT
from gradstream.coordinator.planning.inventory import Inventory
from gradstream.coordinator.planning.needs import (
    NodeOffer,
    ServerBytes,
    fits,
    human_bytes,
    named,
    server_bytes,
    stage_need,
    worker_bytes,
)
from gradstream.coordinator.planning.pipeline_planner import LATENCY_SECONDS, Pipeline, plan_pipeline
from gradstream.coordinator.planning.placement import pieces_of, place
from gradstream.coordinator.planning.slot_steps import with_slot_steps
from gradstream.coordinator.planning.smallest_change import fewer_slots, smallest_change
from gradstream.core.data.manifest import Manifest
from gradstream.core.data.sampler import check_samples
from gradstream.core.errors import ConfigError, DataError, PlanError
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.optimizer.rules import whole_tensors
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, Fragment, Tensor, cut, num_fragments
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.plan.recorded import RecordedSlots
from gradstream.core.recipe.recipe import OptimizerConfig, Recipe
from gradstream.core.rpc.channel import MAX_MESSAGE_BYTES
from gradstream.core.wire.stream_limits import more_than_usual_bytes, traffic

# A plan is sent in one message; the rest of the message needs a little space too.
MAX_PLAN_BYTES = MAX_MESSAGE_BYTES - (64 << 10)
_NO_DATA = Manifest(token_dtype="uint32", vocab_size=1, end_of_text_id=0, tokenizer_sha256="0" * 64, shards=())


@dataclass(frozen=True, slots=True)
class CheckpointAt:
    """The checkpoint from which a plan starts."""

    version: int
    path: str


@dataclass(frozen=True, slots=True)
class NextEpoch:
    """The job and epoch of a plan to be made, its first checkpoint, and the directory of its own checkpoints.

    `recorded` has the slots that counted in rounds that the plan computes again.
    """

    job_id: str
    epoch: int
    checkpoint: CheckpointAt | None
    checkpoint_root: str
    recorded: tuple[RecordedSlots, ...] = ()


def make_plan(
    at: NextEpoch,
    recipe: Recipe,
    manifest: Manifest | None,
    model: Inventory,
    servers: Sequence[NodeOffer],
    workers: Sequence[NodeOffer],
    profiles: Sequence[SegmentProfile] | None = None,
    latency_seconds: float = LATENCY_SECONDS,
) -> tuple[Plan, dict[str, str]]:
    """Make the plan of an epoch on all the servers offered; return it with its reasons by subject.

    `profiles` are the profiles of the model's segments, required unless `pipeline.stages` is 1. `latency_seconds` is
    the latency of a message between two workers of a pipeline. Without a manifest the data is not checked, and the plan
    cannot be run. The plan's recipe has the inner steps of each slot, also where `recipe` leaves them to the plan.

    Raises DataError when the data does not fit the model, ConfigError when the model is empty or its pipeline is not
    possible, PlanError when a server's memory, or that of every worker, is too small, or the workers are too few for a
    replica.
    """
    if manifest is not None:
        check_data(recipe, manifest)
    fragment_elements = max(1, recipe.cluster.fragment_bytes // BYTES_PER_ELEMENT)
    fragments = _cut(recipe, model.tensors, fragment_elements)
    if not servers:
        raise PlanError("no parameter server is live; start one with `gradstream serve parameter-server`")
    # Sorted by name: the plan does not depend on the order in which the servers registered.
    whole = whole_tensors(recipe.optimizer, model.tensors)
    num_pieces = len(pieces_of(fragments, whole))
    chosen = sorted(servers, key=lambda server: server.name)[:num_pieces]
    placement, placement_reason = place(fragments, model.tensors, len(chosen), whole)
    try:
        memory_reason, needs = _check_server_memory(recipe, fragments, placement, chosen, model.tensors)
    except PlanError as refusal:
        try:
            _plan_workers(recipe, model, workers, profiles, latency_seconds)
        except PlanError as another:  # the person learns of both at once
            raise PlanError(f"{refusal}; and {another}") from None
        raise
    pipeline, worker_reason, pipeline_reasons = _plan_workers(recipe, model, workers, profiles, latency_seconds)
    plan = Plan(
        job_id=at.job_id,
        epoch=at.epoch,
        recipe=recipe,
        model_config={**recipe.model.config, "architectures": [model.architecture]},
        data_manifest=manifest if manifest is not None else _NO_DATA,
        tensors=tuple(model.tensors),
        fragment_elements=fragment_elements,
        placement=tuple(placement),
        servers=tuple(Server(server.node_id, server.name, server.address) for server in chosen),
        leader=0,
        start_version=at.checkpoint.version if at.checkpoint else 0,
        checkpoint_path=at.checkpoint.path if at.checkpoint else "",
        checkpoint_root=at.checkpoint_root,
        stage_ends=pipeline.stage_ends,
        num_chunks=pipeline.num_chunks,
        pipeline_schedule=pipeline.schedule,
        worker_bytes=pipeline.worker_bytes,
        recorded=at.recorded,
    )
    able = [worker for worker in workers if fits(worker.memory_bytes, stage_need(plan))]
    decided, slot_reasons = with_slot_steps(recipe, able)
    plan = replace(plan, recipe=decided)
    _check_streams(plan, chosen, needs)
    _check_message(plan)
    start = f"the checkpoint of version {at.checkpoint.version}" if at.checkpoint else plan.source
    reasons = {
        "servers": _servers_reason(chosen, len(servers) - len(chosen), num_pieces, bool(whole)),
        "placement": f"placement: {placement_reason}",
        "memory": f"memory: {memory_reason}{worker_reason}",
        "start": f"start: from {start}",
        **pipeline_reasons,
        **slot_reasons,
        **_quorum_reason(plan),
    }
    return plan, reasons


def _quorum_reason(plan: Plan) -> dict[str, str]:
    """What a quorum makes of the job's bits."""
    local, rounds = plan.recipe.local, plan.rounds
    if local is None or local.quorum is None:
        return {}
    again, end = "", 0
    if plan.recorded:
        end = min(plan.recorded[-1].end, plan.last_version)
        first, last = rounds.rounds_at(plan.recorded[0].begin) + 1, rounds.rounds_at(end)
        of = f"of job {local.replay} " if local.replay else ""
        again = f"rounds {first} to {last} take the slots that the ledger {of}has"
    if end == plan.last_version:
        return {"bits": f"bits: {again}"}
    return {
        "bits": f"bits: outside the exact class, because a round is committed with {local.quorum} of {plan.num_slots} "
        f"slots if the others are not there {local.grace:g} s later; the ledger has the slots, for `gradstream replay`"
        f"{'; ' if again else ''}{again}"
    }


def _cut(recipe: Recipe, tensors: Sequence[Tensor], fragment_elements: int) -> list[Fragment]:
    """Cut the model into fragments. Raises PlanError when they are too many, ConfigError when there are none."""
    count = num_fragments(tensors, fragment_elements)
    if count > MAX_PLAN_BYTES:  # even at one byte per fragment the plan would be too large, so do not cut
        raise PlanError(
            f"the model would be cut into {count} fragments, more than the plan's {human_bytes(MAX_PLAN_BYTES)} can "
            f"place; raise cluster.fragment_bytes (now {recipe.cluster.fragment_bytes}) or submit a smaller model"
        )
    fragments = cut(tensors, fragment_elements)
    if not fragments:
        raise ConfigError("the model has no parameters; check model.config")
    return fragments


def _plan_workers(
    recipe: Recipe,
    model: Inventory,
    workers: Sequence[NodeOffer],
    profiles: Sequence[SegmentProfile] | None,
    latency_seconds: float,
) -> tuple[Pipeline, str, dict[str, str]]:
    """Return (the pipeline, a text on a worker's memory, the pipeline's reasons). Raises as `make_plan` does."""
    if recipe.pipeline.stages != 1:
        if profiles is None:
            raise ConfigError("pipeline.stages other than 1 needs the profile of the model's segments")
        pipeline, reasons = plan_pipeline(recipe, model.tensors, profiles, workers, latency_seconds)
        return pipeline, "", reasons
    num_trained = sum(tensor.num_elements for tensor in model.tensors)
    need = worker_bytes(recipe, num_trained, model.num_frozen_parameters)
    try:
        _check_worker_memory(need, workers)
    except PlanError as refusal:
        if profiles is None or recipe.keeps_slot_state():  # no pipeline is possible, or its segments are unknown
            raise
        memories = [worker.memory_bytes or NO_LIMIT for worker in workers]
        raise PlanError(f"{refusal}; {smallest_change(recipe, model.tensors, profiles, memories)}") from None
    # With frozen parameters the memory does not follow from the trained tensors, so it is stored in the plan.
    pipeline = Pipeline(worker_bytes=(need,)) if model.num_frozen_parameters else Pipeline()
    return pipeline, f"; a worker needs {human_bytes(need)} and its activations", {}


def _check_message(plan: Plan) -> None:
    """Raise PlanError when the plan does not fit into one message."""
    plan_bytes = plan.to_proto().ByteSize()
    if plan_bytes > MAX_PLAN_BYTES:
        raise PlanError(
            f"the plan takes {human_bytes(plan_bytes)}, more than the {human_bytes(MAX_PLAN_BYTES)} that one message "
            f"may carry; raise cluster.fragment_bytes (now {plan.recipe.cluster.fragment_bytes})"
        )


def _servers_reason(chosen: Sequence[NodeOffer], num_idle: int, num_pieces: int, has_whole: bool) -> str:
    names = named([server.name for server in chosen])
    pieces = "whole matrices and other fragments" if has_whole else "fragments"
    idle = f"; {num_idle} more stay idle, as there are only {num_pieces} {pieces}" if num_idle else ""
    return f"servers: all {len(chosen)} that were live ({names}), led by {chosen[0].name}{idle}"


def check_data(recipe: Recipe, manifest: Manifest) -> None:
    """Check a recipe against its data, as far as possible without a cluster. Raises DataError with one line."""
    config = recipe.model.config
    text_config = config.get("text_config")
    inner = text_config.get("vocab_size") if isinstance(text_config, dict) else None
    vocab_size = config.get("vocab_size", inner)
    if isinstance(vocab_size, int) and vocab_size < manifest.vocab_size:
        raise DataError(
            f"vocabulary mismatch: the data set {recipe.data.path} has {manifest.vocab_size} tokens, the model's "
            f"vocab_size is {vocab_size}; set model.config.vocab_size={manifest.vocab_size} or prepare the data with a "
            f"smaller vocabulary"
        )
    training = recipe.training
    for split in ["train", "validation"] if recipe.validation.interval_steps else ["train"]:
        check_samples(manifest, split, training.num_slots, training.sequence_length)


def _check_server_memory(
    recipe: Recipe,
    fragments: Sequence[Fragment],
    placement: Sequence[int],
    servers: Sequence[NodeOffer],
    tensors: Sequence[Tensor],
) -> tuple[str, list[ServerBytes]]:
    shards: list[list[Fragment]] = [[] for _ in servers]
    for fragment in fragments:
        shards[placement[fragment.index]].append(fragment)
    needs = [server_bytes(recipe, shard, tensors) for shard in shards]
    for server, needed in zip(servers, needs, strict=True):
        need = needed.most
        if server.memory_bytes and need > server.memory_bytes:
            total = sum(other.most for other in needs)
            num_parameters = sum(tensor.num_elements for tensor in tensors)
            more = max(1, -(-total // server.memory_bytes) - len(servers))
            raise PlanError(
                f"parameter server {server.name} needs {human_bytes(need)} for its share of {num_parameters:,} "
                f"parameters but offers {human_bytes(server.memory_bytes)} "
                f"({human_bytes(need - server.memory_bytes)} missing); start {_at_least(more)} like it, "
                f"or give it more memory, then `gradstream resume`; "
                f"or submit a smaller model{_lighter(recipe.optimizer)}"
            )
    least, largest = min(needs, key=lambda needed: needed.most), max(needs, key=lambda needed: needed.most)
    scratch = f" or {human_bytes(largest.scratch)} while matrices are updated" if largest.scratch else ""
    reason = (
        f"a server needs {human_bytes(least.most)} to {human_bytes(largest.most)} "
        f"({human_bytes(largest.state)} of state, {human_bytes(largest.checkpoint)} more while a checkpoint is "
        f"written, at most {human_bytes(largest.early)} of contributions that wait{scratch})"
    )
    return reason, needs


def _check_streams(plan: Plan, servers: Sequence[NodeOffer], needs: Sequence[ServerBytes]) -> None:
    """Raise PlanError when a server lacks memory for the streams of all workers that can share the job."""
    found = traffic(plan)
    for server, needed, peers in zip(servers, needs, found, strict=True):
        streams = more_than_usual_bytes(plan.max_workers, peers)
        if server.memory_bytes and needed.most + streams > server.memory_bytes:
            rooms = [
                max(0, s.memory_bytes - n.most) if s.memory_bytes else NO_LIMIT
                for s, n in zip(servers, needs, strict=True)
            ]
            change = fewer_slots(plan, rooms, found)
            raise PlanError(
                f"up to {plan.max_workers} workers may share this job (training.num_slots is {plan.num_slots}), "
                f"and their streams may hold {human_bytes(streams)} at parameter server {server.name}, which needs "
                f"{human_bytes(needed.most)} for its share of the model and offers {human_bytes(server.memory_bytes)}; "
                f"lower training.num_slots, or give it more memory, then `gradstream resume`{change}"
            )


def _check_worker_memory(need: int, workers: Sequence[NodeOffer]) -> None:
    """Raise PlanError when every worker is too small; a single worker that is too small is only left out."""
    if not workers or any(fits(worker.memory_bytes, need) for worker in workers):
        return
    best = max(workers, key=lambda worker: worker.memory_bytes)
    raise PlanError(
        f"worker {best.name} needs {human_bytes(need)} for weights and gradients but offers "
        f"{human_bytes(best.memory_bytes)} ({human_bytes(need - best.memory_bytes)} missing), and no other offers "
        f"more; start a worker with more memory, then `gradstream resume`; or submit a smaller model"
    )


def _at_least(count: int) -> str:
    return "another server" if count == 1 else f"at least {count} more servers"


def _lighter(optimizer: OptimizerConfig) -> str:
    return " or optimizer.kind=sgd" if optimizer.kind != "sgd" else ""
