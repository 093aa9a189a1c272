"""How many streams a parameter server takes, and what all peers together can make it hold. Pure arithmetic.

The plan says how many workers can stream at the same time, so the limits follow from it: honest workers always find
room, also when all of them are behind one address, and the planner counts the memory.
"""

from __future__ import annotations

from gradstream.core.limits import MOST_REQUEST_BYTES
from gradstream.core.wire import PIECE_BYTES

STREAMS_A_WORKER = 3
"""A push, a pull, and one that a broken connection has left behind."""
LEAST_WORKERS = 32
"""Limits are those of so many workers where a plan has fewer: the fifth of a container's memory that jobs are not given
covers them (649 MiB of 819, of a container of 4 GiB)."""
MOST_STREAMS_A_CONNECTION = 8
MOST_HALF_SENT_BYTES = 128 << 20
MAX_STREAM_MESSAGE_BYTES = PIECE_BYTES + (64 << 10)
"""A piece and its header."""


def most_streams_a_host(num_workers: int) -> int:
    """Streams of one address, where `num_workers` can share a job."""
    return STREAMS_A_WORKER * max(num_workers, LEAST_WORKERS)


def most_streams(num_workers: int) -> int:
    """Streams of all addresses: one that takes all it may leaves as many to the others."""
    return 2 * most_streams_a_host(num_workers)


def held_bytes(num_workers: int) -> int:
    """The most bytes that all peers together can make a server hold beside its shard: of each stream a message,
    contributions half sent, and requests."""
    return most_streams(num_workers) * MAX_STREAM_MESSAGE_BYTES + MOST_HALF_SENT_BYTES + MOST_REQUEST_BYTES


def more_than_usual_bytes(num_workers: int) -> int:
    """What a plan of so many workers must find in a server's memory beside its shard."""
    return held_bytes(num_workers) - held_bytes(LEAST_WORKERS)
