"""Readers of the samples of a worker's slots: one a slot and split, made when it is first needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio

from gradstream.core.node.session import NodeSession
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.errors import error_from_rpc, is_passing
from gradstream.core.rpc.retry import Backoff
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.samples.data import SlotReader, Split


class Readers:
    """The readers of one job."""

    def __init__(self, plan: Plan, session: NodeSession, cache_directory: Path):
        self._plan = plan
        self._session = session
        self._cache_directory = cache_directory
        self._made: dict[tuple[Split, int], SlotReader] = {}

    async def get(self, split: Split, slot: int) -> SlotReader:
        """Return the reader of a slot, with its data shards available. Raises DataError."""
        key: tuple[Split, int] = (split, slot)
        if key not in self._made:
            recipe = self._plan.recipe
            reader = SlotReader(
                manifest=self._plan.data_manifest,
                path=recipe.data.path,
                cache_directory=str(self._cache_directory),
                slot=slot,
                num_slots=recipe.training.num_slots,
                sequence_length=recipe.training.sequence_length,
                seed=recipe.seed,
                split=split,
                fetch=self.fetch,
            )
            await reader.prepare()
            self._made[key] = reader
        return self._made[key]

    def close(self) -> None:
        """Close the files."""
        for reader in self._made.values():
            reader.close()

    async def fetch(self, file: str) -> AsyncIterator[bytes]:
        """Stream the bytes of a file of the data set from the coordinator.

        Retries without end while the coordinator is away or refuses for a reason that passes.
        """
        request = coordinator_pb2.FetchDataShardRequest(job_id=self._plan.job_id, file=file)
        num_taken = 0
        backoff = Backoff()
        while True:
            # After a break the file comes from its beginning again. Its hash shows whether it has changed.
            num_again = num_taken
            try:
                async for piece in self._session.stub.FetchDataShard(request):
                    backoff.reset()
                    fresh = piece.payload[num_again:]
                    num_again -= len(piece.payload) - len(fresh)
                    num_taken += len(fresh)
                    yield fresh
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self._session.peer)
                if not is_passing(error):
                    raise error from None
            await asyncio.sleep(backoff.next())
