"""A worker's place in a replica according to the newest lease table, and its connections to its neighbours there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gradstream.core.node.faults import Faults
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.transport import Transport
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pipeline.place import Place
from gradstream.worker.pipeline.servicer import WorkerServicer
from gradstream.worker.timeline import Timeline


class Membership:
    """Owns the neighbours of one worker: creates them, has the servicer serve them, and closes them.

    Runs on the event loop. `on_again` is called on the first worker when another worker has abandoned an attempt, after
    `again` was set.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place | None,
        servicer: WorkerServicer,
        faults: Faults,
        timeline: Timeline,
        transport: Transport,
        on_again: Callable[[], None],
        on_wake: Callable[[], None],
    ):
        """`place` is None in a job without a pipeline. `on_wake` is called when an attempt may be wanted no longer."""
        self.place = place
        self.neighbours: Neighbours | None = None
        self.again = False
        """Whether another worker abandoned an attempt, so that this one, the first, must begin its slots again."""
        self._plan = plan
        self._servicer = servicer
        self._faults = faults
        self._timeline = timeline
        self._transport = transport
        self._on_again = on_again
        self._on_wake = on_wake
        self._met = 0  # the number of the replica whose neighbours were met
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def move(self, place: Place | None) -> None:
        """Take the place that a newer lease table gives. Neighbours in another replica are ended."""
        self.place = place
        if self.neighbours is not None and (
            place is None or place.replica.number != self.neighbours.place.replica.number
        ):
            self.neighbours.end()

    @property
    def has_met(self) -> bool:
        """Whether the neighbours of the worker's place were met. False where the worker has no place."""
        return self.place is not None and self.place.replica.number == self._met

    async def meet(self, place: Place, hidden_size: int) -> None:
        """Close the neighbours of another place, and open the streams of this one."""
        await self.leave()
        self._met = place.replica.number
        if self._plan.replica_size > 1:
            self.neighbours = Neighbours(
                self._plan,
                place,
                hidden_size,
                self._faults,
                self._timeline,
                self._fail,
                self._compute_again,
                self._transport,
                self._on_wake,
            )
            self._servicer.set(self.neighbours)

    async def leave(self) -> None:
        """Close the neighbours."""
        if self.neighbours is not None:
            self._servicer.set(None)
            await self.neighbours.close()
            self.neighbours = None
        self._met = 0

    async def watch(self) -> None:
        """Wait without end, until an error makes it impossible to go on with a neighbour; raise that error."""
        await self._failed

    def wake(self) -> None:
        """Wake the compute thread to check whether its attempt is still wanted."""
        if self.neighbours is not None:
            self.neighbours.wake()

    def _compute_again(self) -> None:
        self.again = True
        self._on_again()

    def _fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
