"""Lists and histories for people, in pages. The state's thread reads them, so that a long list delays no heartbeat."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Protocol

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.coordinator.servicers.lookup import JobLookup
from gradstream.coordinator.servicers.views import StoredJob, Views, read_stored_job
from gradstream.coordinator.state.history import HISTORY_KINDS, LOG_LEVELS, HistoryFilter
from gradstream.coordinator.state.state import JobRecord, StateReader
from gradstream.core.errors import ConfigError, nearest
from gradstream.core.job_states import ENDED
from gradstream.core.rpc.paging import MAX_PAGE_BYTES
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import jobs_pb2

READ_JOBS = 64
"""Number of jobs that are read at a time."""
MAX_NAMES = 256
"""Maximum number of nodes, and of kinds of events, that a watch may select."""


class Lists:
    """Answers ListJobs, ListCheckpoints, ListNodes and WatchJob."""

    def __init__(self, controller: Controller, views: Views, lookup: JobLookup, storage: StorageThreads):
        self._controller = controller
        self._views = views
        self._lookup = lookup
        self._storage = storage

    async def jobs(self, request: jobs_pb2.ListJobsRequest) -> jobs_pb2.ListJobsResponse:
        """A page of jobs. Raises ConfigError for a token that is none."""
        response = jobs_pb2.ListJobsResponse()
        page, token = _Page(request.page_size), request.page_token
        while True:
            read = min(READ_JOBS, page.room)
            wanted = partial(_read_jobs, before=token, limit=read, states=tuple(request.states))
            stored = await self._controller.reads.call(wanted)
            if stored is None:
                raise ConfigError(f"there is no page after '{token[:100]}'; list from the beginning")
            for each in stored:
                job = self._views.from_stored(each)
                if not page.takes(job):
                    response.next_page_token = response.jobs[-1].job_id
                    return response
                response.jobs.append(job)
            if len(stored) < read:
                return response
            token = stored[-1].record.job_id
            if not page.room:
                response.next_page_token = token
                return response

    async def checkpoints(
        self, record: JobRecord, request: jobs_pb2.ListCheckpointsRequest
    ) -> jobs_pb2.ListCheckpointsResponse:
        """A page of a job's checkpoints. Raises ConfigError for a token that is none."""
        token = request.page_token
        if token and not token.isdecimal():
            raise ConfigError(f"there is no page after '{token[:100]}'; list from the beginning")
        root = checkpoints.root_of(record.run_directory)
        response, page = jobs_pb2.ListCheckpointsResponse(), _Page(request.page_size)
        limit = page.room + 1 if request.page_size else None
        for checkpoint in await self._storage.call(root, checkpoints.listing, root, int(token or -1), limit):
            if not page.takes(checkpoint):
                response.next_page_token = str(response.checkpoints[-1].version)
                break
            response.checkpoints.append(checkpoint)
        return response

    def nodes(self, request: jobs_pb2.ListNodesRequest, warnings: Sequence[str]) -> jobs_pb2.ListNodesResponse:
        """A page of nodes; the first page also has the refused nodes and the warnings."""
        response, page = jobs_pb2.ListNodesResponse(), _Page(request.page_size)
        entries = sorted(self._controller.members.all(), key=_place_of)
        first = bisect_right(entries, _place_in(request.page_token), key=_place_of) if request.page_token else 0
        for before, entry in enumerate(entries[first:], first - 1):
            node = self._views.node(entry)
            if not page.takes(node):
                response.next_page_token = "/".join(map(str, _place_of(entries[before])))
                break
            response.nodes.append(node)
        if not request.page_token:
            response.refused.extend(self._views.refused_nodes())
            response.warnings.extend(warnings)
        return response

    async def watch(self, request: jobs_pb2.WatchJobRequest) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """The wanted items of a job's history. Raises ConfigError for a filter that can select nothing."""
        job_id = self._lookup.named(request.job_id).job_id

        def is_over() -> bool:
            return not request.follow or self._lookup.find(job_id).state in ENDED

        pages = self._controller.notifier.follow(
            job_id, request.after_cursor, is_over, checked_filter(request), request.tail
        )
        async for items in pages:
            if not request.paged:
                for item in items:
                    yield item
                continue
            response, page = jobs_pb2.WatchJobResponse(), _Page()
            for item in items:
                if not page.takes(item):
                    yield response
                    response, page = jobs_pb2.WatchJobResponse(), _Page()
                    page.takes(item)
                response.items.append(item)
            yield response


def checked_filter(request: jobs_pb2.WatchJobRequest) -> HistoryFilter:
    """The filter of a watch. Raises ConfigError for an unknown kind or level, or too many names."""
    for kind in request.kinds:
        if kind not in HISTORY_KINDS:
            raise ConfigError(f"a history has no items of kind '{kind[:100]}'{nearest(kind, HISTORY_KINDS)}")
    if request.level and request.level not in LOG_LEVELS:
        raise ConfigError(f"log lines have no level '{request.level[:100]}'{nearest(request.level, LOG_LEVELS)}")
    for what, names in (("kinds of events", request.event_kinds), ("nodes", request.nodes)):
        if len(names) > MAX_NAMES:
            raise ConfigError(f"{len(names)} {what} are named, {MAX_NAMES} at most; watch all of them instead")
    return HistoryFilter(
        tuple(request.kinds),
        tuple(request.event_kinds),
        tuple(request.nodes),
        request.level,
        request.since_unix_ms,
    )


class _Sized(Protocol):
    def ByteSize(self) -> int: ...


class _Page:
    """Counts what still fits into a page: a number of entries if given, and the bytes of a message."""

    def __init__(self, size: int = 0):
        self.room = size or 2**31
        self._room_bytes = MAX_PAGE_BYTES
        self._is_empty = True

    def takes(self, entry: _Sized) -> bool:
        """Whether an entry fits; if so, it is counted. The first entry fits however large it is."""
        num_bytes = entry.ByteSize()
        if not self._is_empty and (not self.room or num_bytes > self._room_bytes):
            return False
        self._is_empty = False
        self.room -= 1
        self._room_bytes -= num_bytes
        return True


def _read_jobs(reader: StateReader, *, before: str, limit: int, states: tuple[int, ...]) -> list[StoredJob] | None:
    records = reader.page_of_jobs(before, limit, states)
    return None if records is None else [read_stored_job(reader, record) for record in records]


def _place_of(node: NodeEntry) -> tuple[int, int, str, str]:
    """The place of a node in the list of nodes: live ones first, then by kind and name."""
    return int(not node.alive), int(node.kind), node.name, node.node_id


def _place_in(page_token: str) -> tuple[int, int, str, str]:
    """The place of a page's last node. Raises ConfigError for a token that is none."""
    parts = page_token.split("/", 3)
    if len(parts) != 4 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        raise ConfigError(f"there is no page after '{page_token[:100]}'; list from the beginning")
    return int(parts[0]), int(parts[1]), parts[2], parts[3]
