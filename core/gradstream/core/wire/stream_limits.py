"""Limits on a parameter server's streams, and the memory that its peers can occupy. Pure arithmetic.

The plan gives the number of workers that can stream at the same time, and what each can have under way with a server.
The limits follow from both. Honest workers are therefore never refused, even if all of them share one address, and the
planner counts the memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from gradstream.core.optimizer.rules import moment_codecs
from gradstream.core.plan.bundles import codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import TensorKind
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import Shape, encoded_bytes
from gradstream.core.rpc.limits import MAX_REQUEST_BYTES
from gradstream.core.wire.frames import PIECE_BYTES

StreamKind = Literal["push", "pull"]
"""Each kind has limits of its own: a pull that waits for a version never takes the place of a push that makes it."""

MIN_STREAMS_A_HOST = 32
"""Smallest limit for one kind and one address, which holds for plans of fewer than 13 workers. A fifth of a container's
memory is not given to jobs and covers these streams (768 MiB of 819 in a container of 4 GiB)."""
MAX_DATA_STREAMS_A_CONNECTION = 8
MAX_HALF_SENT_BYTES = 128 << 20
"""Limit of half-sent contributions, unless the plan's workers can have more of them at the same time."""
MAX_WAITING_BYTES = 16 << 20
"""Bytes of complete contributions that wait to be added, from which on a server reads no more. Each stream may complete
one more, whose bytes were counted as partly sent."""
MAX_STREAM_MESSAGE_BYTES = PIECE_BYTES + (64 << 10)
"""Size limit of a message: a piece and its header."""
WINDOW_BYTES = 4 << 20
"""Bytes of a stream that gRPC takes before the server reads them. More only if twice a link's bandwidth times its delay
is more."""
PUSH_WINDOWS_BYTES = 64 << 20
"""Payload bytes that all workers together may have under way without acknowledgement, unless each may have only one
contribution under way."""
MAX_PUSH_WINDOW_BYTES = 64 << 20
STREAM_BYTES = 96 << 10
"""Memory that gRPC and Python need for an open stream without data, with its share of the connection and its TLS.
Measured with 1,000 workers (docs/benchmarks.md, bench-scale)."""
REQUEST_BYTES = 1 << 10
"""Size of a pull's request without the bundles that it names."""
BUNDLE_INDEX_BYTES = 4
"""Most bytes of a bundle's index in a request. There are at most as many bundles as fragments."""
KEPT_BYTES = 4 * MIN_STREAMS_A_HOST * WINDOW_BYTES
"""The part of the memory that is not given to jobs which covers streams."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the workers of a plan can have under way with one server, in bytes. The defaults are the most of any plan.

    `contribution_bytes` bounds the largest contribution, `step_bytes` the sum of all contributions to a step,
    `message_bytes` the largest message of a pull and `request_bytes` its request.
    """

    contribution_bytes: int = WINDOW_BYTES
    step_bytes: int | None = None
    message_bytes: int = PIECE_BYTES
    request_bytes: int = 64 << 10


def traffic(plan: Plan) -> list[Traffic]:
    """The traffic of a plan with each of its servers."""
    codec, embedding = plan.recipe.codec, plan.recipe.codec.embedding
    push, pull = first_push_codec(codec), downlink(codec.pull).full
    moments = [moment_codecs(plan.recipe, tensor) for tensor in plan.tensors]
    # Of a large model's fragments few differ in what counts here.
    alike: list[Counter[tuple[TensorKind, int, tuple[str, ...], Shape]]] = [Counter() for _ in plan.servers]
    for fragment in plan.fragments:
        tensor = plan.tensors[fragment.tensor]
        key = tensor.kind, plan.num_parts(tensor), moments[fragment.tensor], fragment.shape
        alike[plan.placement[fragment.index]][key] += 1
    # A bundle has at most this many elements, or is a single fragment, which has no more.
    most = (plan.fragment_elements,)
    found = []
    for kinds in alike:
        slot_bytes = version_bytes = num_bundles = contribution = message = 0
        for (kind, num_parts, shared, shape), count in kinds.items():
            pushed, pulled = codec_for(kind, push, embedding), codec_for(kind, pull, embedding)
            moment_bytes = sum(encoded_bytes(name, shape) for name in shared)
            slot_bytes += count * (num_parts * encoded_bytes(pushed, shape) + moment_bytes)
            version_bytes += count * (encoded_bytes(pulled, shape) + moment_bytes)
            num_bundles += count * (1 + len(shared))
            contribution = max(contribution, *(encoded_bytes(name, most) for name in (pushed, *shared)))
            message = max(message, *(encoded_bytes(name, most) for name in (pulled, *shared)))
        found.append(
            Traffic(
                contribution_bytes=min(contribution, slot_bytes),
                step_bytes=plan.num_slots * slot_bytes,
                message_bytes=min(message, version_bytes, PIECE_BYTES),
                request_bytes=REQUEST_BYTES + BUNDLE_INDEX_BYTES * num_bundles,
            )
        )
    return found


def max_streams_a_host(num_workers: int) -> int:
    """Maximum number of streams of one kind and one address, for a job that `num_workers` can share.

    Each worker has one stream of each kind. It may also have left one on a broken connection, and other processes of
    its address need room.
    """
    return max(5 * num_workers // 2, MIN_STREAMS_A_HOST)


def max_streams(num_workers: int) -> int:
    """Maximum number of streams of one kind: an address at its limit leaves as many streams to the others."""
    return 2 * max_streams_a_host(num_workers)


def max_half_sent_bytes(num_workers: int, contribution_bytes: int) -> int:
    """Maximum number of bytes of half-sent contributions.

    A contribution is half sent only if it takes several messages. Then each worker may have one in assembly.
    """
    return max(MAX_HALF_SENT_BYTES, num_workers * contribution_bytes if contribution_bytes > PIECE_BYTES else 0)


def push_window(num_pushes: int) -> int:
    """Payload bytes that one of `num_pushes` push streams may have under way without acknowledgement.

    A contribution that is larger is sent alone.
    """
    return min(MAX_PUSH_WINDOW_BYTES, PUSH_WINDOWS_BYTES // max(1, num_pushes))


def workers_bytes(num_workers: int, traffic: Traffic) -> int:
    """Maximum number of bytes that the workers of a plan occupy in a server: open streams, and what is under way."""
    waiting = num_workers * min(WINDOW_BYTES, max(push_window(num_workers), traffic.contribution_bytes))
    if traffic.step_bytes is not None:
        waiting = min(waiting, traffic.step_bytes)
    half_sent = max_half_sent_bytes(num_workers, traffic.contribution_bytes) - MAX_HALF_SENT_BYTES
    return num_workers * (2 * STREAM_BYTES + traffic.request_bytes + traffic.message_bytes) + waiting + half_sent


def more_than_usual_bytes(num_workers: int, traffic: Traffic | None = None) -> int:
    """Bytes that a plan of `num_workers` workers needs in a server beside its shard and the memory kept from jobs."""
    return max(0, workers_bytes(num_workers, traffic or Traffic()) - KEPT_BYTES)


def held_bytes(num_workers: int, traffic: Traffic | None = None) -> int:
    """Bytes that a server keeps for its peers beside its shard: for streams, half-sent contributions and requests.

    The workers of a plan never need more. Hostile peers cannot hold more either while the smallest limits apply.
    """
    return KEPT_BYTES + more_than_usual_bytes(num_workers, traffic) + MAX_HALF_SENT_BYTES + MAX_REQUEST_BYTES
