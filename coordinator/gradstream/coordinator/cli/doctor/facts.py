"""What `gradstream doctor` finds out about a cluster, before it concludes anything."""

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
    """How a call failed: the gRPC status, the name of gradstream's error class if it named one, and its text."""

    status: str
    error_class: str
    text: str


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """What was found when one service was called from this machine."""

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
    """Why there is no bandwidth, if it was asked for."""

    @property
    def answers(self) -> bool:
        """Whether it is what it should be, and can be spoken to."""
        return self.connection.ok and self.refusal is None and self.told_role == self.role


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node as the coordinator knows it, and as it answered here (None: it was not called)."""

    name: str
    role: str
    address: str
    alive: bool
    last_heard_seconds: float
    memory_bytes: int
    machine: Machine | None = None
    link: RoundTrip | None = None
    """From the node to the coordinator."""
    service: ServiceFacts | None = None

    @property
    def title(self) -> str:
        """Kind and name."""
        return f"{'server' if self.role == SERVER else self.role} {self.name}"


@dataclass(frozen=True, slots=True)
class RefusedFacts:
    """A node that the coordinator did not let in."""

    title: str
    reason: str
    age_seconds: float


@dataclass(frozen=True, slots=True)
class CredentialFacts:
    """One's own credentials. `problem` is a diagnosis of what makes them unusable."""

    directory: str
    problem: Diagnosis | None = None
    certificate: CertificateFacts | None = None
    has_token: bool = True
    token_cluster: str = ""
    """Empty when the token does not look like one."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A job whose bytes give a link's speed a meaning."""

    title: str
    num_parameters: int
    codec: str


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """What came of having the coordinator and all servers write to and read from one directory."""

    directory: str
    problem: str = ""
    """One line; empty when all see the same."""
    num_servers: int = 0
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All that was found. `now` is Unix time in seconds, `version` this client's."""

    now: float
    version: str
    credentials: CredentialFacts | None = None
    coordinator: ServiceFacts | None = None
    fine_tuning: ServiceFacts | None = None
    nodes: Sequence[NodeFacts] = ()
    nodes_refusal: Refusal | None = None
    refused: Sequence[RefusedFacts] = ()
    warnings: Sequence[str] = ()
    """The coordinator's own, of what needs somebody's hand soon."""
    num_not_called: int = 0
    """Live nodes that there was no time for."""
    model: ModelFacts | None = None
    storage: StorageFacts | None = None
    """None: there was no directory to look at."""
