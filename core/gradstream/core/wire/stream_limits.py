"""Limits on a parameter server's streams, and the memory that its peers can occupy. Pure arithmetic.

The plan gives the number of workers that can stream at the same time, and the limits follow from it. Honest workers are
therefore never refused, even if all of them share one address, and the planner counts the memory.
"""

from __future__ import annotations

from gradstream.core.rpc.limits import MAX_REQUEST_BYTES
from gradstream.core.wire.frames import PIECE_BYTES

MIN_STREAMS_A_HOST = 64
"""Smallest limit for one address, which holds for plans of fewer than 26 workers. A fifth of a container's memory is
not given to jobs and covers these streams (768 MiB of 819 in a container of 4 GiB)."""
MAX_DATA_STREAMS_A_CONNECTION = 8
MAX_HALF_SENT_BYTES = 128 << 20
MAX_STREAM_MESSAGE_BYTES = PIECE_BYTES + (64 << 10)
"""Size limit of a message: a piece and its header."""
WINDOW_BYTES = 4 << 20
"""Bytes of a stream that gRPC takes before the server reads them. More only if twice a link's bandwidth times its delay
is more."""


def max_streams_a_host(num_workers: int) -> int:
    """Maximum number of streams of one address, for a job that `num_workers` can share.

    Each worker has a push and a pull, and every second one may also have left a stream on a broken connection.
    """
    return max(5 * num_workers // 2, MIN_STREAMS_A_HOST)


def max_streams(num_workers: int) -> int:
    """Maximum number of streams of all addresses: an address at its limit leaves as many streams to the others."""
    return 2 * max_streams_a_host(num_workers)


def held_bytes(num_workers: int) -> int:
    """Maximum number of bytes that all peers together can occupy in a server beside its shard.

    They are a window of each stream, partly sent contributions, and requests.
    """
    return max_streams(num_workers) * WINDOW_BYTES + MAX_HALF_SENT_BYTES + MAX_REQUEST_BYTES


def more_than_usual_bytes(num_workers: int) -> int:
    """Bytes that a plan of `num_workers` workers needs in a server beside its shard and the memory kept from jobs."""
    return held_bytes(num_workers) - held_bytes(0)
