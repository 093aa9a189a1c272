"""Place fragments on servers. A pure function that returns (decision, reason)."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace

from gradstream.core.plan.fragments import Fragment, Tensor


def place(fragments: Sequence[Fragment], tensors: Sequence[Tensor], num_servers: int) -> tuple[list[int], str]:
    """Assign every fragment to a server; return (server index of each fragment, reason).

    The algorithm is greedy, largest first by bytes, within windows of one forward unit. It distributes a window's
    fragments over one pile per server, each fragment to the smallest pile. Then it gives the largest pile to the server
    that holds least so far, and so on. Balance inside every window keeps all links busy while one layer's gradients or
    weights are transferred. Balance overall keeps the memory equal. In both, the servers differ by at most the largest
    fragment, because the order of the piles is opposite to the order of the servers' loads: the differences of many
    equal layers cancel. Every server gets a fragment if there are enough fragments.
    """
    if num_servers < 1:
        raise ValueError("num_servers must be at least 1")
    placement = [0] * len(fragments)
    total_bytes = [0] * num_servers
    windows: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        windows.setdefault(tensors[fragment.tensor].unit, []).append(fragment)
    for unit in sorted(windows):
        piles: list[list[Fragment]] = [[] for _ in range(num_servers)]
        pile_bytes = [0] * num_servers
        smallest = [(0, pile) for pile in range(num_servers)]  # a heap
        for fragment in sorted(windows[unit], key=lambda f: (-f.num_bytes, f.index)):
            pile = smallest[0][1]
            piles[pile].append(fragment)
            pile_bytes[pile] += fragment.num_bytes
            heapreplace(smallest, (pile_bytes[pile], pile))
        largest_first = sorted(range(num_servers), key=lambda p: (-pile_bytes[p], p))
        emptiest_first = sorted(range(num_servers), key=lambda s: (total_bytes[s], s))
        for pile, server in zip(largest_first, emptiest_first, strict=True):
            for fragment in piles[pile]:
                placement[fragment.index] = server
            total_bytes[server] += pile_bytes[pile]
    low, high = min(total_bytes), max(total_bytes)
    reason = (
        f"{len(fragments)} fragments on {num_servers} server{'s' * (num_servers != 1)}, "
        f"largest first by bytes in each of {len(windows)} windows; "
        f"{low / 2**20:.1f} to {high / 2**20:.1f} MiB of weights a server"
    )
    return placement, reason
