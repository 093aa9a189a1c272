"""Placement: which server holds which fragment. A pure function that returns (decision, reason)."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.plan.fragments import Fragment, Tensor


def place(fragments: Sequence[Fragment], tensors: Sequence[Tensor], num_servers: int) -> tuple[list[int], str]:
    """Assign every fragment to a server; return (server index of each fragment, reason).

    Greedy, largest first, by bytes, within windows of one forward unit at a time: a window's fragments are dealt into
    one pile a server, each to the smallest pile; then the largest pile goes to the server that holds least so far.
    Balance inside every window keeps all links busy while one layer's gradients or weights travel; balance overall
    keeps the memory equal. Neither differs by more than the largest fragment: with piles handed out in the opposite
    order of what the servers hold, the differences of many equal layers cancel instead of adding up. Every server gets
    a fragment as long as there are enough of them.
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
        for fragment in sorted(windows[unit], key=lambda f: (-f.num_bytes, f.index)):
            pile = min(range(num_servers), key=lambda p: (pile_bytes[p], p))
            piles[pile].append(fragment)
            pile_bytes[pile] += fragment.num_bytes
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
