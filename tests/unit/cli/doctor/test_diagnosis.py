"""The doctor's conclusions, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradstream.coordinator.cli.doctor.checks import Check
from gradstream.coordinator.cli.doctor.diagnosis import diagnose
from gradstream.coordinator.cli.doctor.facts import (
    ClusterFacts,
    CredentialFacts,
    ModelFacts,
    NodeFacts,
    Refusal,
    RefusedFacts,
    ServiceFacts,
)
from gradstream.core.credentials.certificate_facts import CertificateFacts
from gradstream.core.credentials.tls_diagnosis import Cause, Diagnosis
from gradstream.core.machine.facts import Machine
from gradstream.core.node.probe import COORDINATOR, FINE_TUNING, SERVER, WORKER, Bandwidth, RoundTrip

NOW = 1_800_000_000.0
DAY = 86_400.0
OK = Diagnosis(Cause.NONE, "answers")
ROOMY = Machine(8 << 30, 6 << 30, 100 << 30, "/state")
QUICK = RoundTrip(0.0004, 0.001)
FAST = Bandwidth(1e8, 1e8)


def certificate(days_left: float = 300.0, role: str = "viewer", name: str = "ann") -> CertificateFacts:
    return CertificateFacts(name, "c0ffee00", role, "CA", "c0ffee00", NOW - DAY, NOW + days_left * DAY)


def service(role: str = COORDINATOR, address: str = "10.0.0.1:7000", **changes: object) -> ServiceFacts:
    made = ServiceFacts(role, address, OK, None, role, "0.1.0", 60.0, ROOMY, QUICK, FAST)
    return replace(made, **changes)  # type: ignore[arg-type]


def node(name: str, role: str = WORKER, **changes: object) -> NodeFacts:
    address = f"10.0.0.2:{7000 + len(name)}"
    made = NodeFacts(name, role, address, True, 0.5, 4 << 30, ROOMY, QUICK, service(role, address))
    return replace(made, **changes)  # type: ignore[arg-type]


def healthy(**changes: object) -> ClusterFacts:
    nodes = (node("s-0", SERVER), node("w-0"))
    return replace(ClusterFacts(NOW, "0.1.0", None, service(), None, nodes), **changes)  # type: ignore[arg-type]


def problems(facts: ClusterFacts) -> list[Check]:
    """All that is not ok; each has a cure and is one line."""
    found = diagnose(facts)
    assert all("\n" not in check.message + check.cure for check in found)
    wrong = [check for check in found if check.result != "ok"]
    assert all(check.cure for check in wrong), wrong
    return wrong


def only(facts: ClusterFacts) -> Check:
    found = problems(facts)
    assert len(found) == 1, found
    return found[0]


def test_nothing_is_wrong() -> None:
    found = diagnose(healthy(fine_tuning=service(FINE_TUNING, "10.0.0.1:7001")))
    assert {check.result for check in found} == {"ok"}
    assert [check.name for check in found] == [
        "coordinator",
        "fine-tuning",
        "nodes",
        "server s-0",
        "worker w-0",
        "run_root",
        "links",
    ]
    assert found[0].message == (
        "10.0.0.1:7000 answers: gradstream 0.1.0, up 1 min 00 s, 0.4 ms there and back, 800 Mb/s up and 800 Mb/s down, "
        "6.0 GiB of memory and 100.0 GiB of disk free"
    )


def test_nothing_was_asked() -> None:
    assert diagnose(ClusterFacts(NOW, "0.1.0")) == []


def test_a_coordinator_that_is_not_reached_is_all_that_is_said() -> None:
    closed = Diagnosis(Cause.REFUSED, "nothing listens on port 7000 of 10.0.0.1", "start it")
    facts = healthy(coordinator=ServiceFacts(COORDINATOR, "10.0.0.1:7000", closed), nodes=())
    assert diagnose(facts) == [Check("coordinator", "fail", closed.text, "start it")]


@pytest.mark.parametrize(
    ("refusal", "message", "cure"),
    [
        (
            Refusal("UNAUTHENTICATED", "CredentialsError", "token 01 of viewer 'ann' expired on Monday; issue another"),
            "10.0.0.1:7000 refuses: token 01 of viewer 'ann' expired on Monday",
            "issue another",
        ),
        (
            Refusal("PERMISSION_DENIED", "", "GetInfo is for admins"),
            "10.0.0.1:7000 refuses: GetInfo is for admins",
            "other",
        ),
        (
            Refusal("UNIMPLEMENTED", "", "Method not found!"),
            "an older gradstream, or another gRPC",
            "install gradstream 0.1.0",
        ),
        (Refusal("DEADLINE_EXCEEDED", "", "Deadline"), "is connected and does not answer", "log"),
        (Refusal("UNAVAILABLE", "", "Socket closed"), "does not answer (Socket closed)", "log"),
    ],
)
def test_a_refusal(refusal: Refusal, message: str, cure: str) -> None:
    facts = healthy(coordinator=ServiceFacts(COORDINATOR, "10.0.0.1:7000", OK, refusal))
    found = only(facts)
    assert (found.name, found.result) == ("coordinator", "fail")
    assert message in found.message
    assert cure in found.cure


def test_another_services_address() -> None:
    found = only(healthy(coordinator=service(told_role=SERVER)))
    assert found.result == "fail"
    assert found.message == "10.0.0.1:7000 is a parameter server, not a coordinator"


def test_versions() -> None:
    """The client against the coordinator, all others against the coordinator too."""
    both = service(version="0.2.0"), service(FINE_TUNING, version="0.2.0")
    nodes = (node("s-0", SERVER, service=service(SERVER, version="0.2.0")), node("w-0", service=service(WORKER)))
    found = problems(healthy(coordinator=both[0], fine_tuning=both[1], nodes=nodes))
    assert [(check.name, check.result) for check in found] == [("coordinator", "fail"), ("worker w-0", "fail")]
    assert found[0].message == "it runs gradstream 0.2.0, this client 0.1.0"
    assert found[1].message == "it runs gradstream 0.1.0, the coordinator 0.2.0"


@pytest.mark.parametrize(
    ("ahead", "round_trip", "result", "says"),
    [
        (0.9, 0.01, None, ""),
        (-1.2, 0.01, "warn", "1.2 s behind this machine's"),
        (29.9, 0.01, "warn", "29.9 s ahead of"),
        (31.0, 0.01, "fail", "31.0 s ahead of"),
        (-7300.0, 0.01, "fail", "2 h 01 min behind"),
        # It may all be the call's own time.
        (1.2, 1.0, None, ""),
    ],
)
def test_clocks(ahead: float, round_trip: float, result: str | None, says: str) -> None:
    found = problems(healthy(coordinator=service(round_trip=RoundTrip(round_trip, ahead))))
    assert [check.result for check in found] == ([result] if result else [])
    assert all(says in check.message for check in found)


def test_memory_and_disk() -> None:
    tight = Machine(2 << 30, 512 << 20, 1 << 30, "/state")
    found = problems(healthy(coordinator=service(machine=tight)))
    assert [check.result for check in found] == ["warn", "warn"]
    assert found[0].message == "512.0 MiB of memory left"
    assert found[1].message.startswith("1.0 GiB of disk left in /state")
    full = only(healthy(coordinator=service(machine=replace(ROOMY, free_disk_bytes=1 << 20))))
    assert full.result == "fail"


def test_a_node_that_offers_more_than_its_container_has() -> None:
    found = only(healthy(nodes=(node("s-0", SERVER), node("w-0", memory_bytes=20 << 30))))
    assert found.name == "worker w-0"
    assert "offers jobs 20.0 GiB of memory and may use 8.0 GiB" in found.message
    assert "--memory 6.4GiB" in found.cure


# ---- Credentials -----------------------------------------------------------------------------------------------------


def test_credentials() -> None:
    good = CredentialFacts("/c", None, certificate(), True, "c0ffee00")
    assert problems(healthy(credentials=good)) == []
    soon = only(healthy(credentials=replace(good, certificate=certificate(29))))
    assert (soon.name, soon.result) == ("credentials", "warn")
    assert "viewer 'ann' of cluster c0ffee00, valid until 2027-" in soon.message
    other = only(healthy(credentials=replace(good, token_cluster="bad0bad0")))
    assert other.message == "the token is of cluster bad0bad0 and the certificate of cluster c0ffee00"
    assert other.result == "fail"
    assert "has no token" in only(healthy(credentials=replace(good, has_token=False))).message
    assert "malformed" in only(healthy(credentials=replace(good, token_cluster=""))).message
    expired = Diagnosis(Cause.OWN_EXPIRED, "our certificate expired", "renew it")
    unusable = ClusterFacts(NOW, "0.1.0", replace(good, problem=expired, certificate=certificate(-1)))
    assert only(unusable) == Check("credentials", "fail", "/c: our certificate expired", "renew it")


def test_the_services_certificate_expires_soon() -> None:
    shown = certificate(12, "coordinator", "c")
    found = only(healthy(coordinator=service(connection=replace(OK, certificate=shown))))
    assert found.result == "warn"
    assert found.message.startswith("the certificate of coordinator 'c' of cluster c0ffee00 is valid until 2027-")


# ---- Nodes -----------------------------------------------------------------------------------------------------------


def test_what_is_missing() -> None:
    assert "`gradstream serve parameter-server` and `gradstream serve worker`" in only(healthy(nodes=())).cure
    assert "`gradstream serve worker`" in only(healthy(nodes=(node("s-0", SERVER),))).cure


def test_refused_and_gone() -> None:
    refused = [
        RefusedFacts("worker w-9", "node w-9 runs gradstream 0.0.9, the coordinator 0.1.0; install the same", 12.0),
        RefusedFacts("worker w-8", "as well; cure", 4000.0),
    ]
    gone = node("w-1", alive=False, last_heard_seconds=60.0, service=None)
    long_gone = node("w-2", alive=False, last_heard_seconds=3600.0, service=None)
    facts = healthy(refused=refused, nodes=(node("s-0", SERVER), node("w-0"), gone, long_gone))
    found = problems(facts)
    assert [(check.name, check.result) for check in found] == [
        ("worker w-9", "fail"),
        ("worker w-8", "warn"),
        ("nodes", "warn"),
    ]
    assert found[0].message == "was refused 12 s ago: node w-9 runs gradstream 0.0.9, the coordinator 0.1.0"
    assert found[0].cure == "install the same"
    assert found[2].message == "gone lately: worker w-1 (1 min 00 s ago)"


def away(name: str, role: str = WORKER, **changes: object) -> NodeFacts:
    unknown = Diagnosis(Cause.HOST_UNKNOWN, "the host name 'w' is unknown here", "check it")
    return node(name, role, service=ServiceFacts(role, "w:1", unknown), **changes)


def test_nodes_that_are_reached_only_inside_the_cluster() -> None:
    """As with containers: what they told the coordinator counts, and that is no fault."""
    found = diagnose(healthy(nodes=(away("s-0", SERVER), away("w-0"))))
    assert {check.result for check in found} == {"ok"}
    (told,) = (check for check in found if "none is reached from this machine, as is usual" in check.message)
    assert told.name == "nodes"
    assert found[2].message == (
        "10.0.0.2:7003 reports: 0.4 ms to the coordinator and back, 6.0 GiB of memory and 100.0 GiB of disk free"
    )
    ill = away("w-0", link=RoundTrip(0.001, 40.0), machine=replace(ROOMY, free_disk_bytes=1 << 30))
    clock, disk = problems(healthy(nodes=(away("s-0", SERVER), ill)))
    assert (clock.result, disk.result) == ("fail", "warn")
    assert "40.0 s ahead of the coordinator's" in clock.message


def test_one_node_that_is_not_reached_where_others_are() -> None:
    found = only(healthy(nodes=(node("s-0", SERVER), away("w-0"))))
    assert found == Check("worker w-0", "warn", "not reached from here: the host name 'w' is unknown here", "check it")


@pytest.mark.parametrize("cause", [Cause.WRONG_CA, Cause.PEER_EXPIRED, Cause.PEER_IN_CLEAR, Cause.FOREIGN])
def test_a_node_that_is_reached_and_wrong_fails(cause: Cause) -> None:
    wrong = ServiceFacts(WORKER, "10.0.0.2:1", Diagnosis(cause, "wrong", "mend"))
    found = only(healthy(nodes=(node("s-0", SERVER), node("w-0", service=wrong))))
    assert (found.name, found.result, found.message) == ("worker w-0", "fail", "wrong")


def test_a_node_that_says_it_is_on_loopback() -> None:
    found = only(healthy(nodes=(node("s-0", SERVER, address="127.0.0.1:7000"), node("w-0"))))
    assert found.name == "server s-0"
    assert "--listen" in found.cure
    here = service(address="localhost:7000")
    assert problems(healthy(coordinator=here, nodes=(node("s-0", SERVER, address="127.0.0.1:7"), node("w-0")))) == []


def test_nodes_may_not_be_listed() -> None:
    refusal = Refusal("PERMISSION_DENIED", "AccessError", "ListNodes is for viewers; ask an admin")
    found = only(healthy(nodes=(), nodes_refusal=refusal))
    assert (found.message, found.cure) == ("cannot be listed: ListNodes is for viewers", "ask an admin")


# ---- Links -----------------------------------------------------------------------------------------------------------


def test_what_a_link_means_for_a_step() -> None:
    slow = service(SERVER, bandwidth=Bandwidth(5e6, 1e8))
    nodes = (node("s-0", SERVER), node("s-1", SERVER, service=slow), node("w-0"))
    found = only(healthy(nodes=nodes, model=ModelFacts("tiny-1", 10_000_000, "fp32")))
    assert found == Check(
        "links",
        "warn",
        "the slowest link from here goes to server s-1, 40 Mb/s: a step's gradients of tiny-1 (10.0 M parameters) take "
        "8.0 s with fp32, 4.0 s with bf16, 2.0 s with int8, 1.0 s with int4",
        "below 100 Mb/s use codec.push=int4 codec.pull=delta-int4, or auto",
    )


def test_a_long_way() -> None:
    far = service(SERVER, round_trip=RoundTrip(0.12, 0.0))
    found = only(healthy(nodes=(node("s-0", SERVER, service=far), node("w-0"))))
    assert found.message.startswith("120 ms to server s-0 and back")


def test_a_slow_link_to_the_coordinator_alone_is_about_exports() -> None:
    facts = healthy(coordinator=service(bandwidth=Bandwidth(1e6, 1e6)), nodes=(away("s-0", SERVER), away("w-0")))
    found = only(facts)
    assert found.message == "8 Mb/s: an export of a model (100.0 M parameters) would take 6 min 40 s"


def test_a_link_that_carries_nothing() -> None:
    dead = service(SERVER, bandwidth=Bandwidth(0.0, 0.0))
    assert "for ever with int4" in only(healthy(nodes=(node("s-0", SERVER, service=dead), node("w-0")))).message


def test_a_link_that_somebody_else_measures() -> None:
    busy = service(SERVER, bandwidth=None, not_measured="it is being measured by somebody else")
    found = only(healthy(nodes=(node("s-0", SERVER, service=busy), node("w-0"))))
    assert found.result == "warn"
