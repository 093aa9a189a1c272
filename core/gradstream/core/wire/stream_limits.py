"""How many streams a parameter server takes, and what all peers together can make it hold. Pure arithmetic.

The plan says how many workers can stream at the same time, so the limits follow from it: honest workers always find
room, also when all of them are behind one address, and the planner counts the memory.
"""

from __future__ import annotations

from gradstream.core.rpc.limits import MAX_REQUEST_BYTES
from gradstream.core.wire.frames import PIECE_BYTES

MIN_STREAMS_A_HOST = 64
"""Also where a plan has fewer than 26 workers. The fifth of a container's memory that jobs are not given covers what
they can hold (768 MiB of 819, of a container of 4 GiB)."""
MAX_DATA_STREAMS_A_CONNECTION = 8
MAX_HALF_SENT_BYTES = 128 << 20
MAX_STREAM_MESSAGE_BYTES = PIECE_BYTES + (64 << 10)
"""A piece and its header."""
WINDOW_BYTES = 4 << 20
"""What gRPC takes of a stream before anybody reads it: more only where twice a link's bandwidth times its delay is."""


def max_streams_a_host(num_workers: int) -> int:
    """Streams of one address, where `num_workers` can share a job: each has a push and a pull, and every other one may
    have left one behind on a connection that broke."""
    return max(5 * num_workers // 2, MIN_STREAMS_A_HOST)


def max_streams(num_workers: int) -> int:
    """Streams of all addresses: one that takes all it may leaves as many to the others."""
    return 2 * max_streams_a_host(num_workers)


def held_bytes(num_workers: int) -> int:
    """The most bytes that all peers together can make a server hold beside its shard: of each stream a window,
    contributions half sent, and requests."""
    return max_streams(num_workers) * WINDOW_BYTES + MAX_HALF_SENT_BYTES + MAX_REQUEST_BYTES


def more_than_usual_bytes(num_workers: int) -> int:
    """Bytes that a plan of `num_workers` workers needs in a server's memory beside its shard."""
    return held_bytes(num_workers) - held_bytes(0)
