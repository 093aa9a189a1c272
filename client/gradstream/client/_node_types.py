"""Nodes, as the client returns them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from gradstream.client._values import Value, time_or_none
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


class NodeKind(StrEnum):
    """What a node is."""

    UNSPECIFIED = "unspecified"
    PARAMETER_SERVER = "parameter-server"
    WORKER = "worker"


_NODE_KINDS = {
    number: NodeKind(name.removeprefix("NODE_KIND_").lower().replace("_", "-"))
    for name, number in coordinator_pb2.NodeKind.items()
}


@dataclass(frozen=True, slots=True)
class Activity(Value):
    """What a node does."""

    job_id: str
    phase: str
    step: int
    waiting_for: str
    waiting_since: datetime | None
    sent_bytes: int
    received_bytes: int
    resident_bytes: int
    missing_slots: tuple[int, ...]
    state_bytes: int
    early_bytes: int
    num_parameters: int
    detail: str = ""
    """What a worker computes within a round of local steps, as "inner step 7 of 30 of slot 2"."""

    @classmethod
    def from_proto(cls, message: coordinator_pb2.Activity) -> Activity:
        """The activity that a message describes."""
        return cls(
            job_id=message.job_id,
            phase=message.phase or "idle",
            step=message.step,
            waiting_for=message.waiting_for,
            waiting_since=time_or_none(message.waiting_since_unix_ms),
            sent_bytes=message.sent_bytes,
            received_bytes=message.received_bytes,
            resident_bytes=message.resident_bytes,
            missing_slots=tuple(message.missing_slots),
            state_bytes=message.state_bytes,
            early_bytes=message.early_bytes,
            num_parameters=message.num_parameters,
            detail=message.detail,
        )


@dataclass(frozen=True, slots=True)
class Node(Value):
    """A node of the cluster."""

    node_id: str
    name: str
    kind: NodeKind
    address: str
    alive: bool
    last_heartbeat: datetime | None
    activity: Activity
    memory_bytes: int
    device: str
    flops_per_second: float

    @classmethod
    def from_proto(cls, message: jobs_pb2.Node) -> Node:
        """The node that a message describes."""
        return cls(
            node_id=message.node_id,
            name=message.name,
            kind=_NODE_KINDS.get(message.kind, NodeKind.UNSPECIFIED),
            address=message.address,
            alive=message.alive,
            last_heartbeat=time_or_none(message.last_heartbeat_unix_ms),
            activity=Activity.from_proto(message.activity),
            memory_bytes=message.memory_bytes,
            device=message.device,
            flops_per_second=message.flops_per_second,
        )
