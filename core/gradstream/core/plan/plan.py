"""The plan, on which all processes of a job agree for one epoch. See docs/protocol.md."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gradstream.core.data.manifest import Manifest, parse_manifest
from gradstream.core.data.sampler import samples_by_slot
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.optimizer.rules import all_moments, shared_moments, whole_tensors
from gradstream.core.plan.bundles import WEIGHTS, Bundle, Use
from gradstream.core.plan.bundles import bundle as bundle_fragments
from gradstream.core.plan.fragments import Fragment, Tensor, TensorKind, cut, num_fragments
from gradstream.core.plan.recorded import RecordedSlots, problem_of, slots_at
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import plan_pb2

_KINDS: dict[TensorKind, plan_pb2.TensorKind.ValueType] = {
    "matrix": plan_pb2.TENSOR_KIND_MATRIX,
    "head": plan_pb2.TENSOR_KIND_HEAD,
    "embedding": plan_pb2.TENSOR_KIND_EMBEDDING,
    "vector": plan_pb2.TENSOR_KIND_VECTOR,
}
_KINDS_ON_WIRE = {wire: kind for kind, wire in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Server:
    """A parameter server of a plan."""

    node_id: str
    name: str
    address: str

    @property
    def title(self) -> str:
        """The server's name and address, for error messages and `status`."""
        return f"parameter server {self.name} at {self.address}"


@dataclass(frozen=True)
class Plan:
    """The plan of one epoch. The fragments follow from the tensors and `fragment_elements`.

    Pipeline stage s has the forward units from the end of the stage before it up to `stage_ends[s]`. Worker w of a
    replica of P workers has the `num_chunks` stages w, w + P, ..., and needs `worker_bytes[w]` of memory. Without
    `stage_ends` there is one stage with all units, and no `worker_bytes`. `recorded` has the slots that count in rounds
    with a quorum that are computed again.
    """

    job_id: str
    epoch: int
    recipe: Recipe
    model_config: dict[str, Any]
    data_manifest: Manifest
    tensors: tuple[Tensor, ...]
    fragment_elements: int
    placement: tuple[int, ...]
    servers: tuple[Server, ...]
    leader: int
    start_version: int
    checkpoint_path: str
    checkpoint_root: str
    stage_ends: tuple[int, ...] = ()
    num_chunks: int = 1
    pipeline_schedule: str = ""
    worker_bytes: tuple[int, ...] = ()
    recorded: tuple[RecordedSlots, ...] = ()

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """All fragments, in forward order."""
        return tuple(cut(self.tensors, self.fragment_elements))

    @cached_property
    def bundles(self) -> tuple[Bundle, ...]:
        """All bundles, in forward order."""
        num_pieces = Counter(fragment.tensor for fragment in self.fragments)
        own = {number for number in self.whole_tensors if num_pieces[number] > 1}
        uses = [
            Use(self.stage_of(tensor.unit), self.num_parts(tensor), number if number in own else -1)
            for number, tensor in enumerate(self.tensors)
        ]
        return tuple(bundle_fragments(self.fragments, self.placement, self.fragment_elements, uses))

    @cached_property
    def whole_tensors(self) -> frozenset[int]:
        """The numbers of the tensors that are updated only as a whole. All fragments of each are on one server."""
        return whole_tensors(self.recipe.optimizer, self.tensors)

    def update_groups_of(self, server: int) -> list[list[Bundle]]:
        """The bundles of server number `server`, in groups that are updated together: one each, or all of a tensor."""
        groups: dict[int, list[Bundle]] = {}
        for bundle in self.bundles_of(server):
            tensors = {fragment.tensor for fragment in bundle.fragments}
            is_of_one = len(tensors) == 1 and tensors <= self.whole_tensors
            groups.setdefault(min(tensors) if is_of_one else -1 - bundle.index, []).append(bundle)
        return list(groups.values())

    @cached_property
    def moment_bundles(self) -> tuple[Bundle, ...]:
        """The bundles of the moments that slots share with local steps, numbered after `bundles`; else none.

        Each has the fragments of one of `bundles` of which the optimizer keeps a moment, and this moment.
        """
        moments = [shared_moments(self.recipe, tensor) for tensor in self.tensors]
        held = [
            (array, bundle.server, fragments)
            for array in all_moments(self.recipe.optimizer)
            for bundle in self.bundles
            if (fragments := tuple(fragment for fragment in bundle.fragments if array in moments[fragment.tensor]))
        ]
        return tuple(
            Bundle(number, server, fragments, array=array)
            for number, (array, server, fragments) in enumerate(held, len(self.bundles))
        )

    def bundle(self, index: int) -> Bundle:
        """The bundle with this index, of weights or of a moment."""
        own = len(self.bundles)
        return self.bundles[index] if index < own else self.moment_bundles[index - own]

    def codec_of(self, bundle: Bundle, codec: str) -> str:
        """The codec of what is sent of a bundle, by name: `codec` for weights and gradients, else the recipe's."""
        local = self.recipe.local
        return codec if local is None or bundle.array == WEIGHTS else local.moments.codec(bundle.array)

    @cached_property
    def held_out_samples(self) -> tuple[int, ...]:
        """Number of validation samples in each slot's group."""
        length = self.recipe.training.sequence_length
        return tuple(samples_by_slot(self.data_manifest, "validation", self.num_slots, length))

    @property
    def has_pipeline(self) -> bool:
        """Whether the job has pipeline stages, even if it is a single one."""
        return bool(self.stage_ends)

    @property
    def num_stages(self) -> int:
        return max(1, len(self.stage_ends))

    @property
    def replica_size(self) -> int:
        """Number of workers of a replica."""
        return self.num_stages // self.num_chunks

    def stage_of(self, unit: int) -> int:
        """The stage that has a forward unit."""
        return bisect_right(self.stage_ends, unit) if self.stage_ends else 0

    def num_parts(self, tensor: Tensor) -> int:
        """Number of parts of a slot's gradient of a tensor.

        A tied tensor has two parts in every job with pipeline stages, even if one stage has both uses, because the
        number of stages must not change a bit.
        """
        return 2 if self.has_pipeline and tensor.is_tied else 1

    def parts_of(self, bundle: Bundle, version: int) -> int:
        """Number of contributions of a slot to a bundle in the step or round from a version.

        In a round it is 1: the workers of a replica add the parts of a tied tensor's gradient after each inner step.
        """
        return 1 if self.rounds.is_round(version) else bundle.num_parts

    def places_of(self, tensor: Tensor) -> list[int]:
        """For each part of a slot's gradient of a tensor, the place in a replica of the worker that computes it."""
        units = (tensor.unit, tensor.last_unit)[: self.num_parts(tensor)]
        return [self.stage_of(unit) % self.replica_size for unit in units]

    def stages_of_worker(self, worker: int) -> list[int]:
        """The stages of worker number `worker` of a replica."""
        return list(range(worker, self.num_stages, self.replica_size))

    def uses_of_worker(self, worker: int) -> list[tuple[int, int]]:
        """The (tensor, part) pairs whose gradients worker number `worker` of a replica computes, in forward order."""
        stages = set(self.stages_of_worker(worker))
        return [
            (number, part)
            for number, tensor in enumerate(self.tensors)
            for part, unit in enumerate((tensor.unit, tensor.last_unit)[: self.num_parts(tensor)])
            if self.stage_of(unit) in stages
        ]

    @property
    def source(self) -> str:
        """The origin of the servers' first weights, for people."""
        tuning = self.recipe.fine_tuning
        if self.checkpoint_path:
            return self.checkpoint_path
        if self.recipe.start_from is not None:
            return self.recipe.start_from.title
        seed = f"seed {self.recipe.seed}"
        if tuning is None:
            return seed
        return tuning.base.title if tuning.lora is None else f"{tuning.base.title}, its adapters from {seed}"

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None when all weights are trained."""
        return self.recipe.lora

    @property
    def architecture(self) -> str:
        """The name of the model's class in transformers."""
        return str(next(iter(self.model_config.get("architectures") or [""])))

    @property
    def num_slots(self) -> int:
        return self.recipe.training.num_slots

    @property
    def max_workers(self) -> int:
        """Maximum number of workers that can hold a slot, or a stage of one, at the same time."""
        return self.num_slots * self.replica_size

    @property
    def last_version(self) -> int:
        """The version at which all steps are done. Without local steps it is the number of steps."""
        return self.rounds.last_version

    @cached_property
    def rounds(self) -> Rounds:
        """The steps for which each version stands."""
        return self.recipe.rounds

    def shares_moments(self, version: int) -> bool:
        """Whether the step from a version is a round that begins with shared moments and contributes its own."""
        return bool(self.moment_bundles) and self.rounds.is_round(version)

    @property
    def has_quorum(self) -> bool:
        """Whether rounds are committed without the slots that are late."""
        return self.recipe.local is not None and self.recipe.local.quorum is not None

    def counted_slots(self, version: int) -> tuple[int, ...] | None:
        """The slots that count in the step or round from a version; None where the leader decides it by the quorum."""
        if not self.has_quorum or not self.rounds.is_round(version):
            return tuple(range(self.num_slots))
        return slots_at(self.recorded, version)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    def fragments_of(self, server: int) -> list[Fragment]:
        """The fragments that server number `server` holds, in forward order."""
        return [fragment for fragment in self.fragments if self.placement[fragment.index] == server]

    def bundles_of(self, server: int) -> list[Bundle]:
        """The bundles that server number `server` holds, in forward order."""
        return [bundle for bundle in self.bundles if bundle.server == server]

    def server_index(self, node_id: str) -> int | None:
        """The index of the server with this node id, or None when the plan does not name it."""
        return next((index for index, server in enumerate(self.servers) if server.node_id == node_id), None)

    def to_proto(self) -> plan_pb2.Plan:
        """Encode this plan as a message."""
        return plan_pb2.Plan(
            job_id=self.job_id,
            epoch=self.epoch,
            recipe_json=self.recipe.model_dump_json(),
            model_config_json=json.dumps(self.model_config),
            data_manifest_json=self.data_manifest.model_dump_json(),
            tensors=[
                plan_pb2.Tensor(
                    name=tensor.name,
                    shape=tensor.shape,
                    decay=tensor.decay,
                    unit=tensor.unit,
                    kind=_KINDS[tensor.kind],
                    last_unit=tensor.last_unit,
                )
                for tensor in self.tensors
            ],
            fragment_elements=self.fragment_elements,
            placement=self.placement,
            servers=[
                plan_pb2.PlanServer(node_id=server.node_id, name=server.name, address=server.address)
                for server in self.servers
            ],
            leader=self.leader,
            start_version=self.start_version,
            checkpoint_path=self.checkpoint_path,
            checkpoint_root=self.checkpoint_root,
            stage_ends=self.stage_ends,
            num_chunks=self.num_chunks,
            pipeline_schedule=self.pipeline_schedule,
            worker_bytes=self.worker_bytes,
            sum_form=plan_pb2.SUM_FORM_FIXED_POINT,
            recorded=[
                plan_pb2.RecordedSlots(begin_version=run.begin, end_version=run.end, slots=run.slots)
                for run in self.recorded
            ],
        )

    @classmethod
    def from_proto(cls, message: plan_pb2.Plan) -> Plan:
        """Check and decode a plan.

        Raises ProtocolError when the plan contradicts itself, ConfigError for its recipe and DataError for its data
        manifest.
        """
        try:
            model_config = json.loads(message.model_config_json)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(
                f"plan {message.job_id}/{message.epoch} has a model config that is not JSON ({one_line(error)})"
            ) from None
        plan = cls(
            job_id=message.job_id,
            epoch=message.epoch,
            recipe=parse_recipe(message.recipe_json),
            model_config=model_config,
            data_manifest=parse_manifest(message.data_manifest_json),
            tensors=tuple(_tensor(t) for t in message.tensors),
            fragment_elements=message.fragment_elements,
            placement=tuple(message.placement),
            servers=tuple(Server(s.node_id, s.name, s.address) for s in message.servers),
            leader=message.leader,
            start_version=message.start_version,
            checkpoint_path=message.checkpoint_path,
            checkpoint_root=message.checkpoint_root,
            stage_ends=tuple(message.stage_ends),
            num_chunks=message.num_chunks or 1,
            pipeline_schedule=message.pipeline_schedule,
            worker_bytes=tuple(message.worker_bytes),
            recorded=tuple(
                RecordedSlots(run.begin_version, run.end_version, tuple(run.slots)) for run in message.recorded
            ),
        )
        ends = plan.stage_ends
        if plan.num_stages % plan.num_chunks or sorted(set(ends)) != list(ends):
            raise ProtocolError(f"plan {plan.job_id}/{plan.epoch} has impossible stage ends: {list(ends)}")
        if plan.worker_bytes and len(plan.worker_bytes) != plan.replica_size:
            raise ProtocolError(
                f"plan {plan.job_id}/{plan.epoch} has the memory needs of {len(plan.worker_bytes)} workers, but a "
                f"replica has {plan.replica_size}"
            )
        if not isinstance(model_config, dict):
            raise ProtocolError(f"plan {plan.job_id}/{plan.epoch} has a model config that is not a JSON object")
        count = num_fragments(plan.tensors, plan.fragment_elements)
        if not plan.fragment_elements or len(plan.placement) != count:
            raise ProtocolError(
                f"plan {plan.job_id}/{plan.epoch} places {len(plan.placement)} fragments but has {count}"
            )
        if not plan.servers or max(plan.placement, default=0) >= len(plan.servers) or plan.leader >= len(plan.servers):
            raise ProtocolError(f"plan {plan.job_id}/{plan.epoch} names a server that it does not list")
        problem = problem_of(plan.recorded, plan.num_slots)
        if problem:
            raise ProtocolError(f"plan {plan.job_id}/{plan.epoch} records impossible slots: {problem}")
        holders = {(f.tensor, plan.placement[f.index]) for f in plan.fragments if f.tensor in plan.whole_tensors}
        if len(holders) != len(plan.whole_tensors):
            raise ProtocolError(
                f"plan {plan.job_id}/{plan.epoch} places a matrix on several servers, but optimizer.kind "
                f"{plan.recipe.optimizer.kind} updates a matrix as a whole"
            )
        return plan


def _tensor(message: plan_pb2.Tensor) -> Tensor:
    kind = _KINDS_ON_WIRE.get(message.kind)
    if kind is None:
        raise ProtocolError(f"tensor '{message.name}' of the plan has an unknown kind {message.kind}")
    return Tensor(message.name, tuple(message.shape), message.decay, message.unit, kind, message.last_unit)
