"""The conclusions of `gradstream doctor`: a pure function from facts to lines with a cause and a cure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from gradstream.coordinator.cli.doctor.checks import Check
from gradstream.coordinator.cli.doctor.facts import (
    ClusterFacts,
    CredentialFacts,
    ModelFacts,
    NodeFacts,
    Refusal,
    ServiceFacts,
    StorageFacts,
)
from gradstream.coordinator.cli.views import terminal
from gradstream.core.credentials.certificate_facts import CertificateFacts
from gradstream.core.credentials.tls_diagnosis import Cause
from gradstream.core.credentials.tokens import utc
from gradstream.core.machine.facts import Machine
from gradstream.core.node.probe import TITLES, RoundTrip
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.core.rpc.access import SERVER, WORKER

EXPIRES_SOON_SECONDS = 30 * 86_400
SKEW_WARN_SECONDS, SKEW_FAIL_SECONDS = 1.0, 30.0
MIN_MEMORY_BYTES = 1 << 30
MIN_DISK_BYTES, FULL_DISK_BYTES = 5 << 30, 256 << 20
SLOW_BITS_PER_SECOND = 100e6
"""Below this speed a step with int4 takes half the time (docs/benchmarks.md)."""
SLOW_ROUND_TRIP_SECONDS = 0.05
RECENT_SECONDS = 300.0
EXAMPLE_PARAMETERS = 100_000_000

# Causes for which this machine cannot reach a node although the other nodes may.
_ELSEWHERE = (Cause.HOST_UNKNOWN, Cause.REFUSED, Cause.TIMED_OUT, Cause.NO_ROUTE, Cause.BAD_ADDRESS)


def diagnose(facts: ClusterFacts) -> list[Check]:
    """Judge all facts; return a check for each finding, with a cure for each problem."""
    checks: list[Check] = []
    if facts.credentials is not None:
        checks += _credentials(facts.credentials, facts.now)
    if facts.coordinator is not None:
        checks += _service("coordinator", facts.coordinator, facts.version, "this client", facts.now)
    if facts.fine_tuning is not None:
        checks += _service("fine-tuning", facts.fine_tuning, _standard(facts)[0], _standard(facts)[1], facts.now)
    if facts.coordinator is not None and facts.coordinator.answers:
        checks += _nodes(facts)
        checks += _storage(facts.storage)
    checks += _links(facts)
    return checks


def _standard(facts: ClusterFacts) -> tuple[str, str]:
    """The version that all processes should have, and the name of its owner."""
    if facts.coordinator is not None and facts.coordinator.version:
        return facts.coordinator.version, "the coordinator"
    return facts.version, "this client"


# ---- Credentials -----------------------------------------------------------------------------------------------------


def _credentials(facts: CredentialFacts, now: float) -> Iterator[Check]:
    if facts.problem is not None:
        yield Check("credentials", "fail", f"{facts.directory}: {facts.problem.text}", facts.problem.cure)
        return
    if facts.certificate is not None:
        until = f"valid until {utc(facts.certificate.not_after)}"
        if facts.certificate.not_after - now < EXPIRES_SOON_SECONDS:
            yield Check("credentials", "warn", f"{facts.certificate.title}, {until} only", _RENEW)
        else:
            yield Check("credentials", "ok", f"{facts.certificate.title}, {until}")
    cluster = facts.certificate.cluster if facts.certificate is not None else ""
    if not facts.has_token:
        yield Check("token", "fail", f"{facts.directory} has no token", "copy all files of the credential directory")
    elif not facts.token_cluster:
        yield Check("token", "fail", f"the token in {facts.directory} is malformed", "copy the file again")
    elif cluster and facts.token_cluster != cluster:
        yield Check(
            "token",
            "fail",
            f"the token is of cluster {facts.token_cluster} and the certificate of cluster {cluster}",
            "copy all files of one credential directory",
        )


_RENEW = "renew it: `gradstream certs rotate`, or `gradstream certs issue`"

# ---- One service -----------------------------------------------------------------------------------------------------


def _service(name: str, facts: ServiceFacts, version: str, whose: str, now: float) -> Iterator[Check]:
    """Check a service that this machine should reach."""
    fault = _fault(name, facts, version, whose)
    if fault is not None:
        yield fault
        return
    yield Check(name, "ok", f"{facts.address} answers: {_described(facts)}")
    yield from _ailments(name, facts, version, whose, now)


def _fault(name: str, facts: ServiceFacts, version: str, whose: str) -> Check | None:
    """The problem for which a service cannot be used at all; None without one."""
    if not facts.connection.ok:
        return Check(name, "fail", facts.connection.text, facts.connection.cure)
    if facts.refusal is not None:
        return _refused(name, facts, facts.refusal, version, whose)
    if facts.told_role != facts.role:
        found, wanted = TITLES.get(facts.told_role, facts.told_role), TITLES.get(facts.role, facts.role)
        cure = f"give the address of the {wanted}"
        return Check(name, "fail", f"{facts.address} is a {found}, not a {wanted}", cure)
    return None


def _ailments(
    name: str, facts: ServiceFacts, version: str, whose: str, now: float, offered_bytes: int = 0
) -> Iterator[Check]:
    """The problems of a service that answers."""
    yield from _version(name, facts, version, whose)
    yield from _clock(name, facts.round_trip, "this machine's")
    yield from _certificate(name, facts.connection.certificate, now)
    if facts.machine is not None:
        yield from _machine(name, facts.machine, offered_bytes)
    if facts.not_measured:
        yield Check(name, "warn", f"its link could not be measured: {facts.not_measured}", "try again")


def _refused(name: str, facts: ServiceFacts, refusal: Refusal, version: str, whose: str) -> Check:
    status = refusal.status
    cause, _, cure = refusal.text.partition("; ")
    if refusal.error_class in ("CredentialsError", "AccessError") or status in (
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
    ):
        return Check(name, "fail", f"{facts.address} refuses: {cause}", cure or "use other credentials")
    if status == "UNIMPLEMENTED":
        return Check(
            name,
            "fail",
            f"{facts.address} does not know ProbeService: an older gradstream, or another gRPC service",
            f"check the address; install gradstream {version}, as {whose} has, where it runs",
        )
    if status == "DEADLINE_EXCEEDED":
        return Check(name, "fail", f"{facts.address} is connected and does not answer", "look at its log and its load")
    return Check(name, "fail", f"{facts.address} does not answer ({cause})", cure or "look at its log")


def _described(facts: ServiceFacts) -> str:
    parts = [f"gradstream {facts.version}", f"up {terminal.format_duration(facts.uptime_seconds)}", *_link_words(facts)]
    if facts.machine is not None:
        parts.append(_machine_words(facts.machine))
    return ", ".join(parts)


def _link_words(facts: ServiceFacts) -> list[str]:
    words = []
    if facts.round_trip is not None:
        words.append(f"{1000 * facts.round_trip.seconds:.1f} ms there and back")
    if facts.bandwidth is not None:
        up, down = facts.bandwidth.up_bytes_per_second, facts.bandwidth.down_bytes_per_second
        words.append(f"{terminal.format_bit_rate(up)} up and {terminal.format_bit_rate(down)} down")
    return words


def _machine_words(machine: Machine) -> str:
    free = f"{terminal.format_bytes(machine.available_memory_bytes)} of memory"
    if machine.free_disk_bytes is not None:
        free += f" and {terminal.format_bytes(machine.free_disk_bytes)} of disk"
    return f"{free} free"


def _version(name: str, facts: ServiceFacts, version: str, whose: str) -> Iterator[Check]:
    if facts.version != version:
        message = f"it runs gradstream {facts.version or 'of no version'}, {whose} {version}"
        yield Check(name, "fail", message, "install the same version on both")


def _clock(name: str, round_trip: RoundTrip | None, whose: str) -> Iterator[Check]:
    if round_trip is None:
        return
    apart = abs(round_trip.clock_ahead_seconds)
    # The lower bound of the difference, however the call's time splits between request and response.
    if apart - round_trip.seconds / 2 <= SKEW_WARN_SECONDS:
        return
    way = "ahead of" if round_trip.clock_ahead_seconds > 0 else "behind"
    shown = f"{apart:.1f} s" if apart < 60 else terminal.format_duration(apart)
    yield Check(
        name,
        "fail" if apart - round_trip.seconds / 2 > SKEW_FAIL_SECONDS else "warn",
        f"its clock is {shown} {way} {whose}: certificates and tokens are judged by it",
        "have both clocks set over the network (chrony, systemd-timesyncd)",
    )


def _certificate(name: str, certificate: CertificateFacts | None, now: float) -> Iterator[Check]:
    if certificate is not None and certificate.not_after - now < EXPIRES_SOON_SECONDS:
        yield Check(
            name,
            "warn",
            f"the certificate of {certificate.title} is valid until {utc(certificate.not_after)} only",
            "renew it where the service runs: `gradstream certs rotate`",
        )


def _machine(name: str, machine: Machine, offered_bytes: int = 0) -> Iterator[Check]:
    if offered_bytes > machine.total_memory_bytes:
        yield Check(
            name,
            "warn",
            f"it offers jobs {terminal.format_bytes(offered_bytes)} of memory and may use "
            f"{terminal.format_bytes(machine.total_memory_bytes)}: it would be killed",
            f"start it with --memory {0.8 * machine.total_memory_bytes / 2**30:.1f}GiB, or give it more",
        )
    if machine.available_memory_bytes < MIN_MEMORY_BYTES:
        message = f"{terminal.format_bytes(machine.available_memory_bytes)} of memory left"
        yield Check(name, "warn", message, "end other programs there, or give its container more")
    free = machine.free_disk_bytes
    if free is not None and free < MIN_DISK_BYTES:
        yield Check(
            name,
            "fail" if free < FULL_DISK_BYTES else "warn",
            f"{terminal.format_bytes(free)} of disk left in {machine.disk_directory}; a checkpoint takes about 12 "
            "bytes a parameter",
            "free some space there, or choose a larger disk",
        )


# ---- The nodes -------------------------------------------------------------------------------------------------------


def _nodes(facts: ClusterFacts) -> Iterator[Check]:
    if facts.nodes_refusal is not None:
        cause, _, cure = facts.nodes_refusal.text.partition("; ")
        yield Check("nodes", "warn", f"cannot be listed: {cause}", cure or "use other credentials")
        return
    for warning in facts.warnings:
        message, _, cure = warning.partition("; ")
        yield Check("cluster", "warn", message, cure)
    for refused in facts.refused:
        cause, _, cure = refused.reason.partition("; ")
        message = f"was refused {terminal.format_duration(refused.age_seconds)} ago: {cause}"
        yield Check(refused.title, "fail" if refused.age_seconds < RECENT_SECONDS else "warn", message, cure)
    alive = [node for node in facts.nodes if node.alive]
    missing = [
        words
        for role, words in ((SERVER, "`gradstream serve parameter-server`"), (WORKER, "`gradstream serve worker`"))
        if not any(node.role == role for node in alive)
    ]
    message = f"{len(alive)} of {len(facts.nodes)} are alive"
    if missing:
        yield Check("nodes", "warn", message, f"no job can run before there is {' and '.join(missing)}")
    else:
        yield Check("nodes", "ok", message)
    gone = [node for node in facts.nodes if not node.alive and node.last_heard_seconds < RECENT_SECONDS]
    if gone:
        names = ", ".join(
            f"{node.title} ({terminal.format_duration(node.last_heard_seconds)} ago)" for node in gone[:8]
        )
        more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        yield Check("nodes", "warn", f"gone lately: {names}{more}", "look at their logs, unless you stopped them")
    if facts.num_not_called:
        yield Check("nodes", "ok", f"{facts.num_not_called} of them were not called, to limit the time of the check")
    away = [node for node in alive if _is_elsewhere(node)]
    for node in alive:
        yield from _node(node, facts, expected_here=len(away) < len(alive))
    if away and len(away) == len(alive):
        yield Check(
            "nodes",
            "ok",
            "none is reached from this machine, as is usual outside of the cluster's network; "
            "`gradstream doctor` on one of their machines measures the links between them",
        )


def _storage(facts: StorageFacts | None) -> Iterator[Check]:
    """Check whether the coordinator and all servers share one run_root."""
    if facts is None:
        yield Check("run_root", "ok", "not asked; --run-root DIR checks that the coordinator and all servers share DIR")
    elif facts.refusal is not None:
        cause, _, cure = facts.refusal.text.partition("; ")
        yield Check("run_root", "warn", f"{facts.directory} could not be checked: {cause}", cure or "try again")
    elif facts.problem:
        cause, _, cure = facts.problem.partition("; ")
        yield Check("run_root", "fail", cause, cure or "try again")
    elif facts.num_servers:
        servers = "1 parameter server" if facts.num_servers == 1 else f"{facts.num_servers} parameter servers"
        message = f"{facts.directory}: the coordinator and {servers} see what each writes there"
        yield Check("run_root", "ok", message)
    else:
        yield Check("run_root", "ok", f"{facts.directory}: the coordinator can write there; there is no server to ask")


def _is_elsewhere(node: NodeFacts) -> bool:
    return node.service is not None and node.service.connection.cause in _ELSEWHERE


def _node(node: NodeFacts, facts: ClusterFacts, expected_here: bool) -> Iterator[Check]:
    service, (version, whose) = node.service, _standard(facts)
    if _is_loopback(node.address) and facts.coordinator is not None and not _is_loopback(facts.coordinator.address):
        yield Check(
            node.title,
            "warn",
            f"its address is {node.address}, which only its own machine can reach",
            "start it with --listen on an address that the others can reach",
        )
    elif service is not None and not _is_elsewhere(node):
        fault = _fault(node.title, service, version, whose)
        if fault is None:
            yield Check(node.title, "ok", f"{node.address} answers: {_described(service)}")
            yield from _ailments(node.title, service, version, whose, facts.now, node.memory_bytes)
            return
        yield fault
    elif service is not None and expected_here:
        yield Check(node.title, "warn", f"not reached from here: {service.connection.text}", service.connection.cure)
    # The node's own reports to the coordinator.
    told = [f"{1000 * node.link.seconds:.1f} ms to the coordinator and back"] if node.link is not None else []
    if node.machine is not None:
        told.append(_machine_words(node.machine))
    if told:
        yield Check(node.title, "ok", f"{node.address} reports: {', '.join(told)}")
    yield from _clock(node.title, node.link, "the coordinator's")
    if node.machine is not None:
        yield from _machine(node.title, node.machine, node.memory_bytes)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- What the links mean ---------------------------------------------------------------------------------------------


def _links(facts: ClusterFacts) -> Iterator[Check]:
    """Judge the slowest link from here to a parameter server by its effect on a step; else that to the coordinator."""
    measured = [
        (node.title, node.service)
        for node in facts.nodes
        if node.role == SERVER and node.service is not None and node.service.bandwidth is not None
    ]
    if measured:
        title, service = min(measured, key=lambda item: _slower(item[1]))
        yield from _step_link(title, service, facts.model)
        return
    for title, found in (("coordinator", facts.coordinator), ("fine-tuning", facts.fine_tuning)):
        if found is not None and found.bandwidth is not None:
            down = found.bandwidth.down_bytes_per_second
            model = facts.model or ModelFacts("a model", EXAMPLE_PARAMETERS, "")
            seconds = 4 * model.num_parameters / down if down else float("inf")
            if _slower(found) * 8 < SLOW_BITS_PER_SECOND:
                yield Check(
                    title,
                    "warn",
                    f"{terminal.format_bit_rate(_slower(found))}: an export of {_model_words(model)} would take "
                    f"{_seconds(seconds)}",
                    "export where the link is faster, or leave files on the cluster's disk",
                )


def _step_link(title: str, service: ServiceFacts, model: ModelFacts | None) -> Iterator[Check]:
    assert service.bandwidth is not None
    rate = _slower(service)
    model = model or ModelFacts("a model", EXAMPLE_PARAMETERS, "")
    times = []
    for codec in dict.fromkeys((model.codec, "bf16", "int8", "int4")):
        try:
            num_bytes = encoded_bytes(codec, (model.num_parameters,))
        except KeyError:
            continue
        times.append(f"{_seconds(num_bytes / rate if rate else float('inf'))} with {codec}")
    message = (
        f"the slowest link from here goes to {title}, {terminal.format_bit_rate(rate)}: a step's gradients of "
        f"{_model_words(model)} take {', '.join(times)}"
    )
    if 8 * rate < SLOW_BITS_PER_SECOND:
        cure = "below 100 Mb/s use codec.push=int4 codec.pull=delta-int4, or auto"
        yield Check("links", "warn", message, cure)
    else:
        yield Check("links", "ok", message)
    trip = service.round_trip
    if trip is not None and trip.seconds > SLOW_ROUND_TRIP_SECONDS:
        yield Check(
            "links",
            "warn",
            f"{1000 * trip.seconds:.0f} ms to {title} and back, which each step waits for at least twice",
            "keep the machines of a job near each other, or make steps longer (training.global_batch)",
        )


def _slower(service: ServiceFacts) -> float:
    assert service.bandwidth is not None
    return min(service.bandwidth.up_bytes_per_second, service.bandwidth.down_bytes_per_second)


def _model_words(model: ModelFacts) -> str:
    return f"{model.title} ({terminal.format_count(model.num_parameters).strip()} parameters)"


def _seconds(seconds: float) -> str:
    if seconds == float("inf"):
        return "for ever"
    if seconds < 0.995:
        return f"{seconds:.2g} s"
    return f"{seconds:.1f} s" if seconds < 60 else terminal.format_duration(seconds)
