"""Bundles of a round's version that are sent before the version is decided: workers receive while others still send.

Once all contributions to a bundle are in its sum, what it will be is known, unless the leader skips the round. It is
encoded from copies, so a server's state stays that of the version before until the leader has decided. An ordinary
step has no early bundles: the clip scale depends on the norms of all bundles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor, Future

from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.publication import PublishedBundle


class EarlyBundles:
    """The early bundles of one version. All methods run on the event loop; `on_made` is called for each bundle."""

    def __init__(self, executor: Executor, on_made: Callable[[], None]):
        self._executor = executor
        self._on_made = on_made
        self._made: dict[int, PublishedBundle] = {}
        self._encoding: list[Future[PublishedBundle | None]] = []

    async def make(self, state: BundleState, num_tokens: int, version: int, codec: str) -> None:
        """Encode a complete bundle as the round under way will publish it; `codec` is the codec of differences."""
        future = self._executor.submit(state.preview_round, num_tokens, version, codec)
        self._encoding.append(future)
        try:
            made = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            return  # `settle` came first
        if made is not None and future in self._encoding:
            self._made[state.bundle.index] = made
            self._on_made()

    def next(self, bundles: Iterable[int], sent: Collection[int]) -> tuple[int, PublishedBundle] | None:
        """One of `bundles` that was made and is not among those sent; None if there is none."""
        index = next((index for index in bundles if index in self._made and index not in sent), None)
        return None if index is None else (index, self._made[index])

    async def settle(self) -> None:
        """Forget the version, which is decided. When this returns no bundle's state is being read any more."""
        encoding, self._encoding = self._encoding, []
        self._made.clear()
        await asyncio.gather(*(asyncio.wrap_future(future) for future in encoding if not future.cancel()))
