"""Judge the silent servers of a plan: whether each may come back with its state, and until when the job waits for it.

A silent server may still have its state: the network may be cut while workers and servers go on. The state is lost when
the server comes back without it, when its process was restarted, when it reported a failure, or when its machine
refuses connections to it. Without such a proof the job waits for the state. It waits `reunion_seconds` from the latest
of three moments: when the server fell silent, when the coordinator could again reach any server at all, and when the
first server of the same plan came back. While no server can be reached, no state is given up, because then the
coordinator itself is cut off. A newcomer that asks for a silent server's name counts as reachable, although it is not
admitted yet.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from gradstream.coordinator.nodes.membership import SERVER, Membership
from gradstream.core.plan.plan import Plan, Server

RING_SECONDS = 0.5
"""Between two attempts to connect to a silent server."""
CONNECT_SECONDS = 2.0
VISIT_SECONDS = 10.0
"""For how long a newcomer that was told to retry counts as reachable: it retries at least every 3 s."""
REFUSALS = 2
"""Number of consecutive refused connections that prove that no process listens there any more."""


class Verdict(Enum):
    """The judgement on a plan's servers."""

    HOLD = "hold"  # all are present
    WAIT = "wait"  # some are silent and may come back with their state
    LOST = "lost"  # state is lost, so a new epoch must start from a checkpoint


@dataclass(frozen=True, slots=True)
class ServerSight:
    """The current situation of one of a plan's servers."""

    name: str
    present: bool
    holds: bool  # it holds the plan's epoch in memory
    replaced: bool  # another process with its name is live
    patience_seconds: float  # time until its state is given up, if it is silent
    refuses: bool = False  # its machine refuses connections to it
    failure: str = ""  # the failure that it reported, if it cannot go on


def judge_servers(servers: Sequence[ServerSight]) -> tuple[Verdict, str]:
    """Decide whether the plan stands. A server's lost state cannot be recovered, so any loss ends the epoch."""
    for server in servers:
        title = f"parameter server {server.name}"
        if server.failure:
            return Verdict.LOST, f"{title} cannot go on: {server.failure}"
        if server.replaced:
            return Verdict.LOST, f"{title} was restarted and has lost its state"
        if server.present and not server.holds:
            return Verdict.LOST, f"{title} came back without its state"
        if not server.present and server.refuses:
            return Verdict.LOST, f"{title} is lost: its machine refuses connections to it"
    for server in servers:
        if not server.present and server.patience_seconds <= 0:
            return Verdict.LOST, f"parameter server {server.name} is lost: it was silent for too long"
    silent = [server.name for server in servers if not server.present]
    if silent:
        return Verdict.WAIT, f"parameter server {', '.join(silent)} is silent"
    return Verdict.HOLD, "all servers hold the plan"


@dataclass
class Absence:
    """A server of the plan without a session. Times are of the coordinator's clock."""

    since: float
    num_refusals: int = 0
    ring_at: float = 0.0

    @property
    def refuses(self) -> bool:
        """Whether its machine has proved that its process is gone."""
        return self.num_refusals >= REFUSALS

    def heard(self, refused: bool) -> None:
        """Note the outcome of an attempt to connect."""
        self.num_refusals = self.num_refusals + 1 if refused else 0


@dataclass
class Reunion:
    """The memory of a plan's silent servers from one `look` to the next."""

    reunion_seconds: float = math.inf
    absences: dict[str, Absence] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    # Since when some server, of the plan or not, can be reached; None while none can.
    company_since: float | None = None
    # When a newcomer last asked for the name of a silent server.
    visited_at: float = -math.inf
    # When the first of the servers that were silent at the same time came back; None while none has.
    returned_at: float | None = None

    def look(self, plan: Plan, epoch: int, members: Membership, now: float) -> list[ServerSight]:
        """Update the absences from the membership; return the situation of each of the plan's servers."""
        if not members.present(SERVER) and now - self.visited_at > VISIT_SECONDS:
            self.company_since = None
        elif self.company_since is None:
            self.company_since = now
        nodes = {server.node_id: members.get(server.node_id) for server in plan.servers}
        present = {node_id for node_id, node in nodes.items() if node is not None and node.present}
        returned = [node_id for node_id in self.absences if node_id in present]
        for node_id in returned:
            del self.absences[node_id]
        for node_id in nodes.keys() - present:
            self.absences.setdefault(node_id, Absence(now, ring_at=now))
        if not self.absences or not present:
            self.returned_at = None
        elif returned and self.returned_at is None:
            self.returned_at = now
        sights = []
        live = members.live(SERVER)
        for server in plan.servers:
            node, absence = nodes[server.node_id], self.absences.get(server.node_id)
            namesake = live.get(server.name)
            sights.append(
                ServerSight(
                    name=server.name,
                    present=absence is None,
                    holds=node is not None and node.holds.get(plan.job_id) == epoch,
                    replaced=namesake is not None and namesake.node_id != server.node_id,
                    patience_seconds=self.patience_seconds(server.node_id, now),
                    refuses=absence is not None and absence.refuses,
                    failure=self.failures.get(server.node_id, ""),
                )
            )
        return sights

    def patience_seconds(self, node_id: str, now: float) -> float:
        """For how much longer the job waits for the state of a silent server; inf while no server can be reached."""
        absence = self.absences.get(node_id)
        if absence is None or self.company_since is None:
            return math.inf
        return max(absence.since, self.company_since, self.returned_at or 0.0) + self.reunion_seconds - now

    def due_rings(self, plan: Plan, grace_seconds: float, now: float) -> list[Server]:
        """The silent servers to which to try a connection now; each at most every RING_SECONDS."""
        due = []
        for server in plan.servers:
            absence = self.absences.get(server.node_id)
            if absence is None or absence.refuses or now < max(absence.ring_at, absence.since + grace_seconds):
                continue
            absence.ring_at = now + RING_SECONDS
            due.append(server)
        return due

    def forgive(self, seconds: float) -> None:
        """Move all times by a time in which the coordinator could not read messages."""
        for absence in self.absences.values():
            absence.since += seconds
        if self.company_since is not None:
            self.company_since += seconds
        if self.returned_at is not None:
            self.returned_at += seconds


async def refuses_connections(address: str) -> bool:
    """Whether the machine at `address` (host:port) answers that no process listens there.

    A cut network, an unknown host name or a process that hangs does not count.
    """
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), CONNECT_SECONDS)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, OverflowError, TimeoutError):
        return False
    writer.close()
    return False
