"""The facts that `gradstream doctor` collects about a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.core.credentials.certificate_facts import CertificateFacts
from gradstream.core.credentials.tls_diagnosis import Diagnosis
from gradstream.core.machine.facts import Machine
from gradstream.core.node.probe import Bandwidth, RoundTrip
from gradstream.core.rpc.access import SERVER


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failed call: the gRPC status, the name of gradstream's error class if there is one, and the text."""

    status: str
    error_class: str
    text: str


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """The facts from a call of one service from this machine."""

    role: str
    address: str
    connection: Diagnosis
    refusal: Refusal | None = None
    told_role: str = ""
    version: str = ""
    uptime_seconds: float = 0.0
    machine: Machine | None = None
    round_trip: RoundTrip | None = None
    bandwidth: Bandwidth | None = None
    not_measured: str = ""
    """Why the bandwidth is missing, if it was to be measured."""

    @property
    def answers(self) -> bool:
        """Whether the service has the expected role and answers calls."""
        return self.connection.ok and self.refusal is None and self.told_role == self.role


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node: the coordinator's facts, and those from a call from here (None: it was not called)."""

    name: str
    role: str
    address: str
    alive: bool
    last_heard_seconds: float
    memory_bytes: int
    machine: Machine | None = None
    link: RoundTrip | None = None
    """The round trip from the node to the coordinator."""
    service: ServiceFacts | None = None

    @property
    def title(self) -> str:
        """Kind and name."""
        return f"{'server' if self.role == SERVER else self.role} {self.name}"


@dataclass(frozen=True, slots=True)
class RefusedFacts:
    """A node whose registration the coordinator refused."""

    title: str
    reason: str
    age_seconds: float


@dataclass(frozen=True, slots=True)
class CredentialFacts:
    """The user's own credentials. `problem` is a diagnosis if they are unusable."""

    directory: str
    problem: Diagnosis | None = None
    certificate: CertificateFacts | None = None
    has_token: bool = True
    token_cluster: str = ""
    """The cluster in the token; empty if the token is malformed."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A job, for the effect of a link's speed on its steps."""

    title: str
    num_parameters: int
    codec: str


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """The result of a check in which the coordinator and all servers write to and read from one directory."""

    directory: str
    problem: str = ""
    """One line; empty if all of them share the directory."""
    num_servers: int = 0
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All facts about a cluster. `now` is Unix time in seconds, `version` the version of this client."""

    now: float
    version: str
    credentials: CredentialFacts | None = None
    coordinator: ServiceFacts | None = None
    fine_tuning: ServiceFacts | None = None
    nodes: Sequence[NodeFacts] = ()
    nodes_refusal: Refusal | None = None
    refused: Sequence[RefusedFacts] = ()
    warnings: Sequence[str] = ()
    """The coordinator's warnings about things that a person must do soon."""
    num_not_called: int = 0
    """Number of live nodes that were not called for lack of time."""
    model: ModelFacts | None = None
    storage: StorageFacts | None = None
    """None if there was no directory to check."""
