"""Place fragments on servers. A pure function that returns (decision, reason)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapreplace

from gradstream.core.plan.fragments import Fragment, Tensor


def pieces_of(fragments: Sequence[Fragment], whole: Collection[int] = ()) -> list[list[Fragment]]:
    """What is placed as one piece: all fragments of a tensor in `whole`, and every other fragment alone."""
    pieces: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        pieces.setdefault(fragment.tensor if fragment.tensor in whole else -1 - fragment.index, []).append(fragment)
    return list(pieces.values())


def place(
    fragments: Sequence[Fragment], tensors: Sequence[Tensor], num_servers: int, whole: Collection[int] = ()
) -> tuple[list[int], str]:
    """Assign every fragment to a server; return (server index of each fragment, reason).

    All fragments of a tensor in `whole` get the same server; together they are a piece, and so is every other fragment.

    The algorithm is greedy, largest first by bytes, within windows of one forward unit. It distributes a window's
    pieces over one pile per server, each piece to the smallest pile. Then it gives the largest pile to the server that
    holds least so far, and so on. Balance inside every window keeps all links busy while one layer's gradients or
    weights are transferred. Balance overall keeps the memory equal. In both, the servers differ by at most the largest
    piece, because the order of the piles is opposite to the order of the servers' loads: the differences of many equal
    layers cancel. Every server gets a fragment if there are enough pieces.
    """
    if num_servers < 1:
        raise ValueError("num_servers must be at least 1")
    placement = [0] * len(fragments)
    total_bytes = [0] * num_servers
    windows: dict[int, list[list[Fragment]]] = {}
    for piece in pieces_of(fragments, whole):
        windows.setdefault(tensors[piece[0].tensor].unit, []).append(piece)
    for unit in sorted(windows):
        piles: list[list[Fragment]] = [[] for _ in range(num_servers)]
        pile_bytes = [0] * num_servers
        smallest = [(0, pile) for pile in range(num_servers)]  # a heap
        for piece in sorted(windows[unit], key=lambda p: (-_num_bytes(p), p[0].index)):
            pile = smallest[0][1]
            piles[pile] += piece
            pile_bytes[pile] += _num_bytes(piece)
            heapreplace(smallest, (pile_bytes[pile], pile))
        largest_first = sorted(range(num_servers), key=lambda p: (-pile_bytes[p], p))
        emptiest_first = sorted(range(num_servers), key=lambda s: (total_bytes[s], s))
        for pile, server in zip(largest_first, emptiest_first, strict=True):
            for fragment in piles[pile]:
                placement[fragment.index] = server
            total_bytes[server] += pile_bytes[pile]
    low, high = min(total_bytes), max(total_bytes)
    together = f"; each of {len(whole)} matrices on one server, because a matrix is updated as a whole" if whole else ""
    reason = (
        f"{len(fragments)} fragments on {num_servers} server{'s' * (num_servers != 1)}, "
        f"largest first by bytes in each of {len(windows)} windows; "
        f"{low / 2**20:.1f} to {high / 2**20:.1f} MiB of weights a server{together}"
    )
    return placement, reason


def _num_bytes(piece: Sequence[Fragment]) -> int:
    return sum(fragment.num_bytes for fragment in piece)
