"""Watch the servers of a plan: silent ones, machines that refuse connections, newcomers with a silent server's name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.nodes.membership import SERVER, Membership, make_node_id
from gradstream.coordinator.nodes.reunion import Verdict, judge_servers, refuses_connections
from gradstream.coordinator.timing import Timing
from gradstream.core.errors import BusyError
from gradstream.proto.v1 import coordinator_pb2


class ServerWatch:
    """Watches the membership and, in tasks of its own, the machines of silent servers."""

    def __init__(self, members: Membership, timing: Timing, on_refusal: Callable[[], None]):
        """Create a watch that calls `on_refusal` when a machine has refused a connection."""
        self._members = members
        self._timing = timing
        self._on_refusal = on_refusal
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, active: ActiveJob, now: float) -> tuple[Verdict, str]:
        """Judge whether the plan stands, and why. The job must have a plan."""
        assert active.plan is not None
        sights = active.reunion.look(active.plan, active.record.epoch, self._members, now)
        self._ring(active, now, self._timing.server_grace_seconds)
        return judge_servers(sights)

    def settled(self, active: ActiveJob) -> bool:
        """Whether all of the plan's servers are present and every step that the leader has decided was reported.

        After a cut network the servers may be further than the coordinator knows. The job must have a plan.
        """
        assert active.plan is not None
        nodes = [self._members.get(server.node_id) for server in active.plan.servers]
        if not all(node is not None and node.present for node in nodes):
            return False
        leader = nodes[active.plan.leader]
        assert leader is not None
        return leader.activity.job_id != active.job_id or leader.activity.step <= active.version

    def keep_name(self, active: ActiveJob | None, request: coordinator_pb2.RegisterRequest, now: float) -> None:
        """Reserve the name of a silent server until its process is known to be gone or its time has passed.

        Raises BusyError for a newcomer with this name, which then retries.
        """
        if active is None or active.plan is None or request.kind != SERVER:
            return
        node_id = make_node_id(request.kind, request.name, request.incarnation)
        server = next((server for server in active.plan.servers if server.name == request.name), None)
        if server is None or server.node_id == node_id or server.address == request.address:
            return  # two processes cannot listen on one address
        if self._members.named(SERVER, request.name) is not None:
            return
        active.reunion.visited_at = now
        active.reunion.look(active.plan, active.record.epoch, self._members, now)
        absence = active.reunion.absences.get(server.node_id)
        if absence is None or absence.refuses or active.reunion.patience_seconds(server.node_id, now) <= 0:
            return
        self._ring(active, now, grace_seconds=0.0)
        raise BusyError(
            f"the parameter server '{request.name}' of job {active.job_id} is silent and may still hold its state; "
            f"this process is admitted once that one is known to be gone, or after {self._timing.reunion_seconds:g} s"
        )

    def _ring(self, active: ActiveJob, now: float, grace_seconds: float) -> None:
        """Try to connect to the silent servers."""
        assert active.plan is not None
        for server in active.reunion.due_rings(active.plan, grace_seconds, now):
            self._spawn(self._probe(active, server.node_id, server.address))

    async def _probe(self, active: ActiveJob, node_id: str, address: str) -> None:
        refused = await refuses_connections(address)
        absence = active.reunion.absences.get(node_id)
        if absence is not None:
            absence.heard(refused)
        if refused:
            self._on_refusal()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel the attempts to connect."""
        for task in list(self._tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
