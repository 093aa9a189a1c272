"""The bounds on a server's streams: enough for the plan's workers on any machines, and no peer can take all."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from gradstream.core.errors import UnreachableError
from gradstream.core.wire.stream_limits import (
    MAX_DATA_STREAMS_A_CONNECTION,
    held_bytes,
    max_streams,
    max_streams_a_host,
    more_than_usual_bytes,
    push_window,
)
from gradstream.services.parameter_server.streams import Streams


@pytest.mark.parametrize("num_workers", [1, 32, 96, 97, 200, 1000])
async def test_all_workers_of_a_plan_find_room_behind_one_address(num_workers: int) -> None:
    """Each with a push and a pull; also while another host holds all that one may."""
    streams = Streams(lambda: num_workers)
    with ExitStack() as stack:
        for number in range(max_streams_a_host(num_workers)):
            stack.enter_context(streams.admit(f"ipv4:10.0.0.66:{number // MAX_DATA_STREAMS_A_CONNECTION}"))
        with pytest.raises(UnreachableError, match=r"host ipv4:10\.0\.0\.66 already has"):
            stack.enter_context(streams.admit("ipv4:10.0.0.66:9999"))
        for worker in range(num_workers):
            for _ in range(2):
                stack.enter_context(streams.admit(f"ipv4:192.168.0.1:{worker}"))
    assert streams.num_open == 0


async def test_the_bounds_follow_the_plan_in_force() -> None:
    num_workers = 0
    streams = Streams(lambda: num_workers, max_a_connection=10**6)
    with ExitStack() as stack:
        for _ in range(max_streams_a_host(0)):
            stack.enter_context(streams.admit("ipv4:10.0.0.1:1"))
        with pytest.raises(UnreachableError):
            stack.enter_context(streams.admit("ipv4:10.0.0.1:1"))
        num_workers = 26
        stack.enter_context(streams.admit("ipv4:10.0.0.1:1"))


def test_what_all_peers_can_hold_fits_beside_what_jobs_are_given() -> None:
    """Of a container of 4 GiB, the default, jobs get 80 %; a plan of more workers finds the rest in these."""
    container = 4 << 30
    for num_workers in (0, 1, 25, 200, 1000):
        assert held_bytes(num_workers) - more_than_usual_bytes(num_workers) < 0.2 * container
        assert more_than_usual_bytes(num_workers) >= 0
        assert max_streams(num_workers) >= 4 * num_workers


@pytest.mark.parametrize("num_workers", [1, 96, 1000])
async def test_waiting_pulls_take_no_place_of_a_push(num_workers: int) -> None:
    streams = Streams(lambda: num_workers, max_a_connection=10**6)
    with ExitStack() as stack:
        for host in range(2):
            for _ in range(max_streams_a_host(num_workers)):
                stack.enter_context(streams.admit(f"ipv4:10.0.0.{host}:1", "pull"))
        with pytest.raises(UnreachableError, match="all hosts together already has"):
            stack.enter_context(streams.admit("ipv4:192.168.0.1:1", "pull"))
        for worker in range(num_workers):
            stack.enter_context(streams.admit(f"ipv4:10.0.0.0:{worker}", "push"))


async def test_each_worker_of_a_plan_may_have_a_contribution_half_sent() -> None:
    """None is dropped while others begin theirs."""
    num_workers, contribution_bytes = 200, 4 << 20
    streams = Streams(lambda: num_workers, lambda: contribution_bytes)
    with ExitStack() as stack:
        opened = [stack.enter_context(streams.admit(f"ipv4:10.0.0.1:{port}", "push")) for port in range(num_workers)]
        for stream in opened:
            stream.begin(contribution_bytes)
        assert not any(stream.ended for stream in opened)
        assert held_bytes(num_workers) >= num_workers * contribution_bytes


def test_a_push_window_shrinks_with_the_number_of_pushes() -> None:
    assert [push_window(number) >> 20 for number in (0, 1, 8, 64)] == [64, 64, 8, 1]
    for number in (1, 8, 64, 1000):
        assert number * push_window(number) <= 64 << 20
