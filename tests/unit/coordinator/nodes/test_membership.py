"""The table of nodes, with a clock set by the tests."""

from __future__ import annotations

import pytest

from gradstream.coordinator.nodes.membership import MAX_DEAD_NODES, MAX_REFUSED, SERVER, WORKER, Membership, NodeEntry
from gradstream.core.errors import BusyError, ConfigError
from gradstream.proto.v1 import coordinator_pb2, probe_pb2

IDLE = coordinator_pb2.Activity()


def request(
    name: str = "w", incarnation: str = "1", kind: coordinator_pb2.NodeKind.ValueType = WORKER
) -> coordinator_pb2.RegisterRequest:
    return coordinator_pb2.RegisterRequest(kind=kind, name=name, incarnation=incarnation)


def join(members: Membership, now: float, name: str = "w", incarnation: str = "1") -> NodeEntry:
    node = members.register(request(name, incarnation), now, 0)
    assert members.open_session(node.node_id) is node
    return node


def test_the_identity_follows_from_kind_name_and_start() -> None:
    ids = [
        Membership().register(request(*given), 0, 0).node_id
        for given in (("w", "1"), ("w", "1"), ("w", "2"), ("w", "1", SERVER))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert ids[0].startswith("w.")


def test_a_lease_runs_out_without_heartbeats() -> None:
    members = Membership(lease_seconds=3)
    node = join(members, 0)
    assert members.heartbeat(node.node_id, node.session, IDLE, 2.0, 0)
    assert members.expire(5.0) == []
    session = node.session
    assert members.expire(5.1) == [node]
    assert members.expire(5.2) == []
    assert not members.heartbeat(node.node_id, session, IDLE, 5.3, 0)
    assert members.open_session(node.node_id) is None


def test_leases_are_extended_by_the_time_that_we_stood_still() -> None:
    members = Membership(lease_seconds=3)
    node = join(members, 0)
    members.forgive(10, now=12)
    assert members.expire(12) == []
    assert members.expire(13.1) == [node]


def test_a_node_is_dead_when_its_stream_ends() -> None:
    members = Membership()
    node = join(members, 0)
    session = node.session
    assert members.close_session(node.node_id, session) is node
    assert not node.alive
    assert members.close_session(node.node_id, session) is None


def test_the_end_of_an_old_stream_does_not_kill_a_node_that_came_back() -> None:
    members = Membership()
    node = join(members, 0)
    old = node.session
    again = join(members, 1)
    assert again is node
    assert members.close_session(node.node_id, old) is None
    assert node.present
    # Also between registering again and opening the new stream.
    members.register(request(), 2, 0)
    assert members.close_session(node.node_id, node.session) is None
    assert node.alive
    assert not node.present


def test_the_process_that_has_a_name_keeps_it_while_it_heartbeats() -> None:
    members = Membership(heartbeat_seconds=1, lease_seconds=10)
    old = join(members, 0, incarnation="1")
    # Whether the one that has the name still lives is not known yet.
    with pytest.raises(BusyError, match="has registered as 'w'"):
        members.register(request(incarnation="2"), 5, 0)
    assert members.heartbeat(old.node_id, old.session, IDLE, 5.5, 0)
    with pytest.raises(BusyError):  # it may have been under way when that one died
        members.register(request(incarnation="2"), 5.6, 0)
    assert members.heartbeat(old.node_id, old.session, IDLE, 6.5, 0)
    with pytest.raises(ConfigError, match=r"another worker is live as 'w' .*last heartbeat 0\.5 s ago.*--name"):
        members.register(request(incarnation="2"), 7, 0)
    assert old.present
    assert members.named(WORKER, "w") is old
    # The same process registers again whenever it likes.
    assert join(members, 8, incarnation="1") is old


def test_a_name_is_free_once_its_process_is_silent() -> None:
    members = Membership(heartbeat_seconds=1, lease_seconds=3)
    join(members, 0, incarnation="1")
    with pytest.raises(BusyError):
        members.register(request(incarnation="2"), 2, 0)
    members.expire(3.5)
    new = join(members, 4, incarnation="2")
    assert members.named(WORKER, "w") is new
    assert [node.alive for node in members.all()] == [True]
    # The first one is the newcomer now.
    with pytest.raises(BusyError):
        members.register(request(incarnation="1"), 4.5, 0)


def test_present_nodes_come_oldest_first_and_all_live_ones_first() -> None:
    members = Membership()
    nodes = {name: join(members, 0, name) for name in ("b", "a", "c")}
    members.close_session(nodes["b"].node_id, nodes["b"].session)
    assert [node.name for node in members.present(WORKER)] == ["a", "c"]
    assert [node.name for node in members.all()] == ["a", "c", "b"]


def test_the_dead_are_forgotten_beyond_a_bound() -> None:
    members = Membership()
    for number in range(MAX_DEAD_NODES + 20):
        node = join(members, number, f"w{number}")
        members.close_session(node.node_id, node.session)
    assert len(members.all()) == MAX_DEAD_NODES


def test_names_of_forgotten_nodes_can_still_be_told() -> None:
    assert Membership().name_of("my.worker.0123abcd") == "my.worker"


def test_the_rate_of_sent_bytes() -> None:
    members = Membership()
    node = join(members, 0)
    for second in range(5):
        activity = coordinator_pb2.Activity(job_id="a", sent_bytes=100 * second)
        members.heartbeat(node.node_id, node.session, activity, float(second), 0)
    assert node.sent_bytes_per_second("a") == 100
    assert node.sent_bytes_per_second("b") == 0


def test_refused_nodes_are_remembered_until_they_come_in() -> None:
    members = Membership()
    for number in range(MAX_REFUSED + 1):
        members.refuse(request(name=f"w-{number}"), "too old", number)
    members.refuse(request(name="w-1"), "still too old", 1000)
    refused = members.refused()
    assert len(refused) == MAX_REFUSED
    assert (refused[0].name, refused[0].reason, refused[0].unix_ms) == ("w-1", "still too old", 1000)
    assert (refused[1].name, refused[-1].name) == (f"w-{MAX_REFUSED}", "w-2")
    members.register(request(name="w-1"), 0, 0)
    assert "w-1" not in [node.name for node in members.refused()]


def test_what_a_node_tells_of_itself_is_kept_if_it_is_of_a_sensible_size() -> None:
    members = Membership()
    node = join(members, 0)
    sensible = coordinator_pb2.Vitals(machine=probe_pb2.Machine(disk_directory="/state"), clock_ahead_ms=-3)
    members.note_vitals(node.node_id, sensible)
    members.note_vitals(node.node_id, coordinator_pb2.Vitals(machine=probe_pb2.Machine(disk_directory="x" * 5000)))
    members.note_vitals("nobody", sensible)
    assert node.vitals == sensible


def test_workers_on_one_device_are_as_fast_as_its_best_measurement() -> None:
    members = Membership()

    def measured(name: str, flops: float, machine_id: str, device: str = "cpu") -> NodeEntry:
        registration = request(name)
        registration.MergeFrom(
            coordinator_pb2.RegisterRequest(flops_per_second=flops, machine_id=machine_id, device=device)
        )
        return members.register(registration, 0, 0)

    slowed = measured("slowed", 60e9, "here")
    quiet = measured("quiet", 90e9, "here")
    late = measured("late", 70e9, "here")
    elsewhere = measured("elsewhere", 50e9, "there")
    accelerated = measured("accelerated", 20e12, "here", "cuda:0 (a GPU)")
    unknown = [measured("unknown", 40e9, ""), measured("unknown too", 80e9, "")]
    server = members.register(
        coordinator_pb2.RegisterRequest(kind=SERVER, name="s", incarnation="1", device="cpu", machine_id="here"), 0, 0
    )
    assert [node.flops_per_second for node in (slowed, quiet, late)] == [90e9] * 3
    assert [node.flops_per_second for node in (elsewhere, accelerated, *unknown)] == [50e9, 20e12, 40e9, 80e9]
    assert server.flops_per_second == 0
