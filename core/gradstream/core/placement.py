"""Placement: which server holds which fragment. A pure function that returns (decision, reason)."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.fragments import Fragment, Tensor


def place(fragments: Sequence[Fragment], tensors: Sequence[Tensor], num_servers: int) -> tuple[list[int], str]:
    """Assign every fragment to a server; return (server index of each fragment, reason).

    Greedy, largest first, by bytes, within windows of one forward unit at a time: each fragment goes to the server with
    the least bytes in its window, then the least overall. Balance inside every window keeps all links busy while one
    layer's gradients or weights travel; balance overall keeps the memory equal. Every server gets a fragment as long as
    there are enough of them.
    """
    if num_servers < 1:
        raise ValueError("num_servers must be at least 1")
    placement = [0] * len(fragments)
    total_bytes = [0] * num_servers
    windows: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        windows.setdefault(tensors[fragment.tensor].unit, []).append(fragment)
    for unit in sorted(windows):
        window_bytes = [0] * num_servers
        for fragment in sorted(windows[unit], key=lambda f: (-f.num_bytes, f.index)):
            server = min(range(num_servers), key=lambda s: (window_bytes[s], total_bytes[s], s))
            placement[fragment.index] = server
            window_bytes[server] += fragment.num_bytes
            total_bytes[server] += fragment.num_bytes
    low, high = min(total_bytes), max(total_bytes)
    reason = (
        f"{len(fragments)} fragments on {num_servers} servers, largest first by bytes in each of "
        f"{len(windows)} windows; "
        f"{low / 2**20:.1f} to {high / 2**20:.1f} MiB of weights a server"
    )
    return placement, reason
