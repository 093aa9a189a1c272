"""Check that the coordinator and nodes share a directory: each writes a file, and all others must see it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.core.errors import UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.storage import files, shared_storage
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import coordinator_pb2

ANSWER_SECONDS = 30.0
LOOK_SECONDS = 0.5
MAX_PROBLEM_CHARACTERS = 500

log = get_logger()


class StorageChecks:
    """Runs checks: sends directives to nodes, which answer with reports."""

    def __init__(self, send: Callable[[NodeEntry, coordinator_pb2.SessionResponse], object]):
        self._send = send
        self._threads = StorageThreads()
        # (check id, node id) → the node's answer.
        self._awaited: dict[tuple[str, str], asyncio.Future[str]] = {}

    def take(self, report: coordinator_pb2.ReportStorageRequest) -> None:
        """Take a node's answer; drop it if its check is over."""
        future = self._awaited.get((report.check_id, report.node_id))
        if future is not None and not future.done():
            future.set_result(" ".join(report.problem.split())[:MAX_PROBLEM_CHARACTERS])

    async def problem(self, directory: str, nodes: Sequence[NodeEntry]) -> str:
        """Check whether the coordinator and these nodes share a directory, which is created if missing.

        Return one line that says why not and names the node; empty when they share it.
        """
        check_id = secrets.token_hex(8)
        try:
            return await self._find(directory, check_id, nodes)
        except (OSError, UnreachableError) as error:
            return f"the coordinator cannot use {directory} ({one_line(error)})"
        finally:
            try:
                await self._threads.call(directory, shared_storage.clean_up, directory, check_id)
            except (OSError, UnreachableError) as error:
                log.warning("files of a storage check could not be removed", directory=directory, cause=one_line(error))

    async def _find(self, directory: str, check_id: str, nodes: Sequence[NodeEntry]) -> str:
        def begin() -> None:
            files.make_directory(directory)
            shared_storage.write(directory, check_id, shared_storage.COORDINATOR)

        # 1. Each node must see the coordinator's file, and the coordinator the file that each node writes.
        await self._threads.call(directory, begin)
        names = {f"node-{number}": node for number, node in enumerate(nodes)}
        found = await self._ask(directory, check_id, [shared_storage.COORDINATOR], names)
        if found:
            return found
        unseen = await self._threads.call(directory, shared_storage.unseen, directory, check_id, list(names))
        if unseen:
            who = ", ".join(names[name].title for name in unseen)
            return f"the coordinator does not see in {directory} what {who} wrote there; {shared_storage.CURE}"
        # 2. Each node must see the files of all other nodes.
        return await self._ask(directory, check_id, list(names), names, write=False)

    async def _ask(
        self, directory: str, check_id: str, read: list[str], names: dict[str, NodeEntry], write: bool = True
    ) -> str:
        """Send a check to nodes; return the problem of the first node that has one, with its name."""
        loop = asyncio.get_running_loop()
        answers: dict[str, asyncio.Future[str]] = {}
        try:
            for name, node in names.items():
                answers[name] = self._awaited[check_id, node.node_id] = loop.create_future()
                check = coordinator_pb2.StorageCheck(
                    check_id=check_id, directory=directory, write=name if write else "", read=read
                )
                self._send(node, coordinator_pb2.SessionResponse(storage=check))
            deadline = loop.time() + ANSWER_SECONDS
            while True:
                waiting = [future for future in answers.values() if not future.done()]
                for name, future in answers.items():
                    if future.done() and future.result():
                        return f"{names[name].title} {self._named(future.result(), names)}; {shared_storage.CURE}"
                gone = [node.title for name, node in names.items() if not answers[name].done() and not node.present]
                if gone:
                    return f"{gone[0]} left while {directory} was being checked"
                if not waiting:
                    return ""
                if loop.time() > deadline:
                    late = [names[name].title for name, future in answers.items() if not future.done()]
                    return (
                        f"{', '.join(late)} did not answer within {ANSWER_SECONDS:.0f} s whether it sees {directory}; "
                        f"look at its storage"
                    )
                await asyncio.wait(waiting, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for node in names.values():
                self._awaited.pop((check_id, node.node_id), None)

    @staticmethod
    def _named(problem: str, names: dict[str, NodeEntry]) -> str:
        """Replace the nodes' numbers in a problem by their names."""
        return " ".join(names[word].title if word in names else word for word in problem.split())
