"""Plans: a pure function from what the recipe asks and the cluster offers to a plan, with its reasons.

All that can be known to fail is found here, before a byte is loaded: memory, vocabulary, data shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.core.bundles import codec_for, first_push_codec
from gradstream.core.config import RESIDUAL_CODECS, OptimizerConfig, Recipe
from gradstream.core.data import Manifest, SlotSampler
from gradstream.core.downlink import downlink
from gradstream.core.encoded_size import encoded_bytes
from gradstream.core.errors import ConfigError, DataError, PlanError
from gradstream.core.fragments import BYTES_PER_ELEMENT, Fragment, Tensor, cut
from gradstream.core.placement import place
from gradstream.core.plan import Plan, Server
from gradstream.core.rpc import MAX_MESSAGE_BYTES

# fp32 arrays that an optimizer keeps beside the weights.
NUM_MOMENTS = {"adamw": 2, "sgd": 1}
# A plan travels in one message; its envelope needs a little too.
MAX_PLAN_BYTES = MAX_MESSAGE_BYTES - (64 << 10)


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node as the planner sees it. `memory_bytes` 0 means that it did not say."""

    node_id: str
    name: str
    address: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class CheckpointAt:
    """Where a plan starts from."""

    version: int
    path: str


def make_plan(
    job_id: str,
    recipe: Recipe,
    manifest: Manifest,
    tensors: Sequence[Tensor],
    architecture: str,
    servers: Sequence[NodeOffer],
    workers: Sequence[NodeOffer],
    epoch: int,
    checkpoint: CheckpointAt | None,
    checkpoint_root: str,
) -> tuple[Plan, dict[str, str]]:
    """Make the plan of an epoch on all the servers offered; return it with its reasons by subject.

    Raises DataError when the data does not fit the model, ConfigError when the model is empty, PlanError when a
    server's memory, or that of every worker, is too small.
    """
    check_data(recipe, manifest)
    fragment_elements = max(1, recipe.cluster.fragment_bytes // BYTES_PER_ELEMENT)
    fragments = cut(tensors, fragment_elements)
    if not fragments:
        raise ConfigError("the model has no parameters; check model.config")
    if not servers:
        raise PlanError("no parameter server is live; start one with `gradstream serve parameter-server`")
    # By name, so that the same cluster gives the same plan in whatever order its servers registered.
    chosen = sorted(servers, key=lambda server: server.name)[: len(fragments)]
    placement, placement_reason = place(fragments, tensors, len(chosen))
    memory_reason = _check_server_memory(recipe, fragments, placement, chosen, tensors)
    worker_need = worker_bytes(recipe, sum(tensor.num_elements for tensor in tensors))
    _check_worker_memory(worker_need, workers)
    plan = Plan(
        job_id=job_id,
        epoch=epoch,
        recipe=recipe,
        model_config={**recipe.model.config, "architectures": [architecture]},
        data_manifest=manifest,
        tensors=tuple(tensors),
        fragment_elements=fragment_elements,
        placement=tuple(placement),
        servers=tuple(Server(server.node_id, server.name, server.address) for server in chosen),
        leader=0,
        start_version=checkpoint.version if checkpoint else 0,
        checkpoint_path=checkpoint.path if checkpoint else "",
        checkpoint_root=checkpoint_root,
    )
    plan_bytes = plan.to_proto().ByteSize()
    if plan_bytes > MAX_PLAN_BYTES:
        raise PlanError(
            f"the plan takes {human_bytes(plan_bytes)}, more than the {human_bytes(MAX_PLAN_BYTES)} that one message "
            f"may carry; raise cluster.fragment_bytes (now {recipe.cluster.fragment_bytes})"
        )
    idle = len(servers) - len(chosen)
    names = ", ".join(server.name for server in chosen)
    start = f"from the checkpoint of version {checkpoint.version}" if checkpoint else "from the seed"
    reasons = {
        "servers": f"servers: all {len(chosen)} that were live ({names}), led by {chosen[0].name}"
        + (f"; {idle} more stay idle, as there are only {len(fragments)} fragments" if idle else ""),
        "placement": f"placement: {placement_reason}",
        "memory": f"memory: {memory_reason}; a worker needs {human_bytes(worker_need)} and its activations",
        "start": f"start: {start}",
    }
    return plan, reasons


def check_data(recipe: Recipe, manifest: Manifest) -> None:
    """What can be said of a recipe and its data without a cluster. Raises DataError with one line."""
    config = recipe.model.config
    vocab_size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if isinstance(vocab_size, int) and vocab_size < manifest.vocab_size:
        raise DataError(
            f"vocabulary mismatch: the data set {recipe.data.path} has {manifest.vocab_size} tokens, the model's "
            f"vocab_size is {vocab_size}; set model.config.vocab_size={manifest.vocab_size} or prepare the data with a "
            f"smaller vocabulary"
        )
    training = recipe.training
    num_shards = len(manifest.split("train"))
    if num_shards % training.num_slots:
        cure = f"prepare it with a multiple of {training.num_slots}" if training.num_slots > 1 else "prepare it again"
        raise DataError(
            f"the data set {recipe.data.path} has {num_shards} training shards, which {training.num_slots} slots "
            f"cannot share evenly; {cure} (data.prepare.num_shards) or change training.num_slots"
        )
    splits = ["train", "validation"] if recipe.validation.interval_steps else ["train"]
    for split in splits:
        for slot in range(training.num_slots):
            SlotSampler(manifest, split, slot, training.num_slots, training.sequence_length, recipe.seed)


@dataclass(frozen=True, slots=True)
class ServerBytes:
    """Memory that a server needs for its fragments, in bytes."""

    # Held all the time: master copy, moments, accumulator and the published copies, encoded or as workers hold them.
    state: int
    # On top while a checkpoint is written: a copy of what is saved, and the same once more as the file's bytes.
    checkpoint: int
    # On top for a version that a newcomer pulls, where the others pull differences: the whole copy for it.
    newcomer: int
    # Most that contributions can take which wait for their turn.
    early: int

    @property
    def most(self) -> int:
        """All of it at once."""
        return self.state + self.checkpoint + self.newcomer + self.early


def server_bytes(recipe: Recipe, fragments: Sequence[Fragment], tensors: Sequence[Tensor]) -> ServerBytes:
    """What a server with these fragments needs."""

    def encoded(codec: str, embedding: str) -> int:
        return sum(
            encoded_bytes(codec_for(tensors[fragment.tensor].kind, codec, embedding), fragment.shape)
            for fragment in fragments
        )

    array = BYTES_PER_ELEMENT * sum(fragment.num_elements for fragment in fragments)
    form, embedding = downlink(recipe.codec.pull), recipe.codec.embedding
    whole = encoded(form.full, embedding)
    saved = (1 + NUM_MOMENTS[recipe.optimizer.kind] + form.keeps_copy) * array
    if form.delta is None:
        copies, newcomer = whole, 0
    else:
        copies, newcomer = (array if form.keeps_copy else whole), whole
        copies += encoded(form.delta, form.delta)
    state = (2 + NUM_MOMENTS[recipe.optimizer.kind]) * array + copies
    early = recipe.training.num_slots * encoded(first_push_codec(recipe.codec), embedding)
    return ServerBytes(state, 2 * saved, newcomer, early)


def worker_bytes(recipe: Recipe, num_parameters: int) -> int:
    """Bytes that a worker needs beside its activations, should it hold every slot.

    Weights, the gradients of the slot under way and of the one being encoded, the slots' encoded gradients until they
    are acknowledged, the next version's weights as they arrive, and each slot's residual where the codec keeps one.
    """
    push, pull = first_push_codec(recipe.codec), downlink(recipe.codec.pull).full
    slot = encoded_bytes(push, (num_parameters,))
    if push in RESIDUAL_CODECS:
        # Its residual at the version, and the one that the step leaves behind.
        slot += 2 * BYTES_PER_ELEMENT * num_parameters
    arriving = encoded_bytes(pull, (num_parameters,))
    return 3 * BYTES_PER_ELEMENT * num_parameters + recipe.training.num_slots * slot + arriving


def human_bytes(count: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


def _check_server_memory(
    recipe: Recipe,
    fragments: Sequence[Fragment],
    placement: Sequence[int],
    servers: Sequence[NodeOffer],
    tensors: Sequence[Tensor],
) -> str:
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
    return (
        f"a server needs {human_bytes(least.most)} to {human_bytes(largest.most)} "
        f"({human_bytes(largest.state)} of state, {human_bytes(largest.checkpoint)} more while a checkpoint is "
        f"written, at most {human_bytes(largest.early)} of contributions that wait)"
    )


def _check_worker_memory(need: int, workers: Sequence[NodeOffer]) -> None:
    """A worker that is too small is only left out, so the plan fails when all are."""
    if not workers or any(fits(worker.memory_bytes, need) for worker in workers):
        return
    best = max(workers, key=lambda worker: worker.memory_bytes)
    raise PlanError(
        f"worker {best.name} needs {human_bytes(need)} for weights and gradients but offers "
        f"{human_bytes(best.memory_bytes)} ({human_bytes(need - best.memory_bytes)} missing), and no other offers "
        f"more; start a worker with more memory, then `gradstream resume`; or submit a smaller model"
    )


def fits(memory_bytes: int, need: int) -> bool:
    """Whether a node's memory is enough; one that did not say how much it has is believed to have enough."""
    return not memory_bytes or memory_bytes >= need


def _at_least(count: int) -> str:
    return "another server" if count == 1 else f"at least {count} more servers"


def _lighter(optimizer: OptimizerConfig) -> str:
    return " or optimizer.kind=sgd" if optimizer.kind == "adamw" else ""
