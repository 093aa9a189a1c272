"""Collect facts about a cluster for `gradstream doctor`: call each service from this machine, one step at a time.

A problem of the cluster raises no error here. It is recorded as a fact.
"""

from __future__ import annotations

import asyncio
import json
import os.path
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from gradstream.coordinator.cli.doctor.facts import (
    ClusterFacts,
    CredentialFacts,
    ModelFacts,
    NodeFacts,
    Refusal,
    RefusedFacts,
    ServiceFacts,
    StorageFacts,
)
from gradstream.core import __version__
from gradstream.core.credentials.certificate_facts import read_certificates
from gradstream.core.credentials.tls_diagnosis import Cause, Diagnosis, Identity, check_own, diagnose_connection
from gradstream.core.errors import CredentialsError
from gradstream.core.machine.facts import Machine
from gradstream.core.node import probe
from gradstream.core.rpc import access
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.errors import ERROR_CLASS_KEY
from gradstream.core.rpc.transport import Transport
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, jobs_pb2_grpc, probe_pb2_grpc

CALL_SECONDS = 10.0
REACH_SECONDS = 20.0
"""Maximum time to call nodes; the remaining nodes are left out."""
MEASURE_SECONDS = 20.0
"""Maximum time to measure links to nodes."""
STORAGE_SECONDS = 45.0
"""Maximum time for the coordinator and the servers to write and read small files."""
MAX_CALLS = 16
ROLES = {
    coordinator_pb2.NODE_KIND_PARAMETER_SERVER: access.SERVER,
    coordinator_pb2.NODE_KIND_WORKER: access.WORKER,
}


@dataclass(frozen=True, slots=True)
class Targets:
    """What to check: addresses as host:port, and the directory of the credentials to use."""

    coordinator: str | None = None
    fine_tuning: str | None = None
    credentials: Path | None = None
    run_root: str | None = None
    """A directory that the coordinator and all servers must share; None for that of the newest job."""


async def gather(
    targets: Targets, progress: Callable[[str], None] = lambda what: None, clock: Callable[[], float] = time.time
) -> ClusterFacts:
    """Collect all facts. `progress` is called with the current step; `clock` is Unix time in seconds."""
    facts = ClusterFacts(now=clock(), version=__version__)
    identity = None
    if targets.credentials is not None:
        own, identity = await asyncio.to_thread(read_credentials, targets.credentials, clock())
        facts = replace(facts, credentials=own)
        if identity is None:
            return facts
    try:
        transport = Transport(targets.credentials)
    except CredentialsError as error:
        text, _, cure = str(error).partition("; ")
        assert facts.credentials is not None
        problem = Diagnosis(Cause.OWN_CREDENTIALS, text, cure)
        return replace(facts, credentials=replace(facts.credentials, problem=problem))
    with ThreadPoolExecutor(MAX_CALLS, "doctor") as threads:
        visit = _Visit(transport, identity, threads, clock)
        if targets.coordinator is not None:
            progress(f"coordinator {targets.coordinator}")
            facts = replace(
                facts, coordinator=await visit.service(access.COORDINATOR, targets.coordinator, measure=True)
            )
        if targets.fine_tuning is not None:
            progress(f"fine-tuning service {targets.fine_tuning}")
            facts = replace(
                facts, fine_tuning=await visit.service(access.FINE_TUNING, targets.fine_tuning, measure=True)
            )
        if targets.coordinator is None or facts.coordinator is None or not facts.coordinator.answers:
            return facts
        return await _cluster(visit, facts, targets, progress)


async def _cluster(
    visit: _Visit, facts: ClusterFacts, targets: Targets, progress: Callable[[str], None]
) -> ClusterFacts:
    """Add the coordinator's nodes, and the facts from calling them from here."""
    coordinator = targets.coordinator
    assert coordinator is not None
    # 1. Ask the coordinator.
    async with visit.channel(access.COORDINATOR, coordinator) as channel:
        stub: Any = jobs_pb2_grpc.JobsServiceStub(channel)
        try:
            listed = await stub.ListNodes(jobs_pb2.ListNodesRequest(), timeout=CALL_SECONDS)
            jobs = await stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            return replace(facts, nodes_refusal=_refusal(error))
        run_root = targets.run_root or _run_root(jobs.jobs)
        if run_root:
            progress(f"the storage at {run_root}")
            facts = replace(facts, storage=await _storage(stub, run_root))
    now_ms = 1000 * visit.clock() + 1000 * (_clock_ahead(facts.coordinator))
    nodes = [_node(message, now_ms) for message in listed.nodes]
    # 2. Call the nodes.
    progress(f"{sum(node.alive for node in nodes)} nodes")
    began, free = time.monotonic(), asyncio.Semaphore(MAX_CALLS)

    async def call(node: NodeFacts) -> NodeFacts:
        async with free:
            if not node.alive or time.monotonic() - began > REACH_SECONDS:
                return node
            return replace(node, service=await visit.service(node.role, node.address, measure=False))

    nodes = list(await asyncio.gather(*map(call, nodes)))
    # 3. Measure the links one after the other, first those for which every step waits.
    began = time.monotonic()
    for index, node in sorted(enumerate(nodes), key=lambda item: item[1].role != access.SERVER):
        if node.service is None or node.service.machine is None or time.monotonic() - began > MEASURE_SECONDS:
            continue
        progress(f"the link to {node.title}")
        nodes[index] = replace(node, service=await visit.measured(node.service))
    return replace(
        facts,
        nodes=nodes,
        warnings=listed.warnings,
        num_not_called=sum(node.alive and node.service is None for node in nodes),
        refused=[
            RefusedFacts(f"{ROLES.get(one.kind, 'node')} {one.name}", one.reason, max(0, now_ms - one.unix_ms) / 1000)
            for one in listed.refused
        ],
        model=_model(jobs.jobs),
    )


class _Visit:
    """Calls services, with the user's credentials or without encryption."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity | None,
        threads: ThreadPoolExecutor,
        clock: Callable[[], float],
    ):
        self._transport = transport
        self._identity = identity
        self._threads = threads
        self.clock = clock

    async def service(self, role: str, address: str, measure: bool) -> ServiceFacts:
        """Collect the facts of a service at `address`, from its port to its link."""
        host, _, port = address.rpartition(":")
        connection = await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: diagnose_connection(
                host, int(port) if port.isascii() and port.isdigit() else 0, self._identity, role, self.clock()
            ),
        )
        facts = ServiceFacts(role, address, connection)
        if not connection.ok:
            return facts
        async with self.channel(role, address) as channel:
            stub = probe_pb2_grpc.ProbeServiceStub(channel)
            try:
                info, round_trip = await probe.ask_info(stub, clock=self.clock)
            except grpc.aio.AioRpcError as error:
                return replace(facts, refusal=_refusal(error))
        facts = replace(
            facts,
            told_role=info.role,
            version=info.version,
            uptime_seconds=info.uptime_ms / 1000,
            machine=Machine.from_proto(info.machine),
            round_trip=round_trip,
        )
        return await self.measured(facts) if measure else facts

    async def measured(self, facts: ServiceFacts) -> ServiceFacts:
        """Add the bandwidth of the link to a service."""
        async with self.channel(facts.role, facts.address) as channel:
            try:
                bandwidth = await probe.measure_bandwidth(probe_pb2_grpc.ProbeServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                return replace(facts, not_measured=" ".join((error.details() or error.code().name).split()))
        return replace(facts, bandwidth=bandwidth)

    def channel(self, role: str, address: str) -> grpc.aio.Channel:
        """Open a channel to a service of a role at `address`."""
        return open_channel(address, role, self._transport)


def read_credentials(directory: Path, now: float) -> tuple[CredentialFacts, Identity | None]:
    """Read a credential directory; return its facts, and the identity to use in calls (None if unusable)."""
    place = str(directory)
    contents: dict[str, bytes] = {}
    for name in ("ca.pem", "cert.pem", "key.pem", "token"):
        try:
            contents[name] = (directory / name).read_bytes()
        except OSError as error:
            if name == "token":
                continue
            cause = error.strerror or type(error).__name__
            missing = Diagnosis(
                Cause.OWN_CREDENTIALS,
                f"{name} cannot be read ({cause})",
                "issue credentials with `gradstream certs issue`, or name another directory",
            )
            return CredentialFacts(place, missing, has_token=(directory / "token").exists()), None
    identity = Identity(contents["ca.pem"], contents["cert.pem"], contents["key.pem"])
    token = contents.get("token", b"").decode("ascii", errors="replace").strip()
    parts = token.split("_", 3)
    facts = CredentialFacts(
        place,
        problem=check_own(identity, now),
        has_token=bool(token),
        token_cluster=parts[1] if len(parts) == 4 and parts[0] == "gst" else "",
    )
    try:
        facts = replace(facts, certificate=read_certificates(identity.cert)[0])
    except ValueError:
        pass
    return facts, identity if facts.problem is None else None


def _refusal(error: grpc.aio.AioRpcError) -> Refusal:
    metadata: Any = error.trailing_metadata() or ()
    name = next((str(value) for key, value in metadata if key == ERROR_CLASS_KEY), "")
    return Refusal(error.code().name, name, " ".join((error.details() or "").split()))


def _clock_ahead(service: ServiceFacts | None) -> float:
    return service.round_trip.clock_ahead_seconds if service is not None and service.round_trip is not None else 0.0


def _node(message: jobs_pb2.Node, now_ms: float) -> NodeFacts:
    vitals = message.vitals if message.HasField("vitals") else None
    return NodeFacts(
        name=message.name,
        role=ROLES.get(message.kind, ""),
        address=message.address,
        alive=message.alive,
        last_heard_seconds=max(0.0, now_ms - message.last_heartbeat_unix_ms) / 1000,
        memory_bytes=message.memory_bytes,
        machine=Machine.from_proto(vitals.machine) if vitals is not None else None,
        link=probe.RoundTrip(vitals.round_trip_microseconds / 1e6, vitals.clock_ahead_ms / 1000)
        if vitals is not None and vitals.linked
        else None,
    )


async def _storage(stub: Any, run_root: str) -> StorageFacts:
    """Check whether the coordinator and the servers share a directory."""
    request = jobs_pb2.CheckStorageRequest(directory=run_root, caller_directory=os.getcwd())
    try:
        found = await stub.CheckStorage(request, timeout=STORAGE_SECONDS)
    except grpc.aio.AioRpcError as error:
        return StorageFacts(run_root, refusal=_refusal(error))
    return StorageFacts(found.directory, found.problem, found.num_servers)


def _run_root(jobs: Sequence[jobs_pb2.Job]) -> str:
    """The parent of the newest job's run directory; empty without a job."""
    return os.path.dirname(jobs[0].run_directory) if jobs else ""


def _model(jobs: Sequence[jobs_pb2.Job]) -> ModelFacts | None:
    """The newest job whose size is known."""
    for job in jobs:
        if job.num_parameters:
            try:
                codec = str(json.loads(job.recipe_json)["codec"]["push"])
            except (ValueError, KeyError, TypeError):
                codec = ""
            return ModelFacts(job.job_id, job.num_parameters, codec)
    return None
