"""Whether the coordinator and each node may have as many files open as they have peers. A pure decision."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.coordinator.nodes.membership import SERVER, WORKER, NodeEntry
from gradstream.core.machine.open_files import shortage


def shortages(coordinator_limit: int, nodes: Sequence[NodeEntry]) -> list[str]:
    """One line with a cure for the coordinator, and for each kind of node, whose limit is too low for the live nodes.

    A kind's line names the node with the lowest limit. A worker connects to every server and listens only for its
    neighbours in a pipeline.
    """
    alive = [node for node in nodes if node.alive]
    num_workers = sum(node.kind == WORKER for node in alive)
    num_servers = sum(node.kind == SERVER for node in alive)
    lines = []
    if own := shortage(coordinator_limit, len(alive), f"{len(alive)} nodes"):
        lines.append(f"the coordinator {own}")
    for kind, count, peers in (
        (SERVER, num_workers + num_servers, f"{num_workers} workers and {num_servers} servers"),
        (WORKER, num_servers, f"{num_servers} servers"),
    ):
        limits = [(_limit(node), node) for node in alive if node.kind == kind]
        short = [(limit, node) for limit, node in limits if shortage(limit, count, peers)]
        if short:
            limit, node = min(short, key=lambda pair: (pair[0], pair[1].name))
            others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
            lines.append(f"{node.title}{others} {shortage(limit, count, peers)}")
    return lines


def _limit(node: NodeEntry) -> int:
    """The limit that a node has reported, 0 if none."""
    return node.vitals.machine.max_open_files if node.vitals is not None else 0
