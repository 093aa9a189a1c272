"""The leader's part of a commit: collects all servers' reports, decides once, keeps the decision."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.commit import Decision


class Leader:
    """Collects the servers' reports of a step and gives every server the same decision. A report may be repeated."""

    def __init__(
        self,
        num_servers: int,
        start_version: int,
        decide: Callable[[int, Mapping[int, pb.CompleteStepRequest]], Decision],
    ):
        self._num_servers = num_servers
        self._decide = decide
        self._step = start_version
        self._reports: dict[int, pb.CompleteStepRequest] = {}
        self._pending: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._last: Decision | None = None

    @property
    def missing(self) -> list[int]:
        """Indices of the servers that have not completed the step under way. Empty until the first one has."""
        return [server for server in range(self._num_servers) if server not in self._reports] if self._reports else []

    async def complete(self, report: pb.CompleteStepRequest) -> Decision:
        """Take a server's report and return the decision when all have reported. Raises ProtocolError."""
        if self._last is not None and report.step == self._last.step:
            return self._last
        if report.step != self._step or report.server >= self._num_servers:
            raise ProtocolError(
                f"server {report.server} completed step {report.step} while step {self._step} is under way; "
                f"it must load the plan again"
            )
        if not report.num_tokens or any(other.num_tokens != report.num_tokens for other in self._reports.values()):
            raise ProtocolError(
                f"server {report.server} counted {report.num_tokens} tokens in step {report.step}, "
                f"which is 0 or differs from the other servers' count"
            )
        if any(norm < 0 for norm in report.squared_norms):
            raise ProtocolError(f"server {report.server} reports a squared norm below 0 for step {report.step}")
        self._reports[report.server] = report
        pending = self._pending
        if len(self._reports) == self._num_servers:
            decision = self._decide(report.step, self._reports)
            self._last = decision
            self._step += 1
            self._reports = {}
            self._pending = asyncio.get_running_loop().create_future()
            pending.set_result(decision)
        return await asyncio.shield(pending)

    def close(self, error: Exception) -> None:
        """Raise `error` in all calls of `complete` that wait."""
        if not self._pending.done():
            self._pending.set_exception(error)
            self._pending.exception()  # mark the error as seen, in case no call waits
