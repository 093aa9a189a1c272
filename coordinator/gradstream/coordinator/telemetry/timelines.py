"""Keep workers' timelines on disk with the job, in bounded space. They outlive the job and the coordinator.

A job's `timeline/` holds numbered files of records: length, CRC-32 and a GetTimelineResponse. Files are only appended
to. A record cut short by a crash ends its file, and the next start begins another file. A file is removed when the last
NUM_VERSIONS timelines with spans of all its workers are in later files, or when all files exceed MAX_BYTES.

All file operations of a job run in order, in threads. The event loop passes on records and reads the results.
"""

from __future__ import annotations

import asyncio
import math
import struct
import threading
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from google.protobuf.message import DecodeError

from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.telemetry.pipeline_timeline import Bubble, Run, measure, runs
from gradstream.coordinator.telemetry.step_times import StepWindow
from gradstream.core.errors import ProtocolError, UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.storage.pool import CALL_SECONDS, StorageThreads
from gradstream.core.telemetry.timeline import MAX_SPANS, PASSES, Timeline
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

P = ParamSpec("P")
T = TypeVar("T")

NUM_VERSIONS = 64
MAX_BYTES = 128 << 20
FILE_BYTES = 4 << 20
MAX_PENDING_BYTES = 16 << 20
MAX_WORKERS = 1024
MAX_JOBS = 16
MAX_SERVERS = 4096
# Number of versions whose timelines may be incomplete, and maximum passes kept of them.
NUM_OPEN_VERSIONS = 2
MAX_OPEN_PASSES = 1 << 16
# Largest microseconds that JSON readers represent exactly.
_MAX_US = 1 << 53
_RECORD = struct.Struct("<II")
_KINDS = frozenset(coordinator_pb2.SpanKind.values()) - {coordinator_pb2.SPAN_KIND_UNSPECIFIED}

log = get_logger()


def check_timeline(report: coordinator_pb2.ReportTimelineRequest, rounds: Rounds) -> None:
    """Raise ProtocolError for a timeline that no worker can have recorded."""
    wrong = ""
    if report.version > rounds.last_version:
        wrong = f"it is of version {report.version}, and the job has {rounds.num_steps} steps"
    elif len(report.spans) > MAX_SPANS:
        wrong = f"it has {len(report.spans)} spans where {MAX_SPANS} are allowed"
    elif not report.hidden_us <= report.communication_us < _MAX_US:
        wrong = f"it says that compute hid {report.hidden_us} of {report.communication_us} us of communication"
    elif any(span.kind not in _KINDS for span in report.spans):
        wrong = "it has a span of an unknown kind"
    elif any(span.begin_unix_us >= _MAX_US or span.duration_us >= _MAX_US for span in report.spans):
        wrong = "it has a span with an impossible time"
    elif not _possible(report.times):
        wrong = "its step times are not possible"
    if wrong:
        raise ProtocolError(f"the timeline of {report.node_id[:100]} cannot be right: {wrong}")


def _possible(times: coordinator_pb2.StepTimes) -> bool:
    parts = (times.compute_us, times.weights_us, times.send_us, times.rest_us)
    rates = (times.push_bytes_per_second, times.pull_bytes_per_second)
    whole = max(*parts, times.period_us, *times.server_us) < _MAX_US and len(times.server_us) <= MAX_SERVERS
    return whole and all(math.isfinite(rate) and rate >= 0 for rate in rates)


@dataclass
class _RecordFile:
    """A file of records: its size, and the number of records with spans of each worker."""

    path: Path
    num_bytes: int = 0
    num_records: Counter[str] = field(default_factory=Counter)


class _Window:
    """Communication and hidden communication, in microseconds, of each worker's last timelines, and their sums."""

    def __init__(self) -> None:
        self.communication_us = 0
        self.hidden_us = 0
        self._workers: OrderedDict[str, deque[tuple[int, int]]] = OrderedDict()

    def add(self, worker: str, communication_us: int, hidden_us: int) -> None:
        """Add a timeline's numbers. The worker's oldest numbers, or those of the longest silent worker, are dropped."""
        entries = self._workers.setdefault(worker, deque())
        self._workers.move_to_end(worker)
        entries.append((communication_us, hidden_us))
        self.communication_us += communication_us
        self.hidden_us += hidden_us
        if len(entries) > NUM_VERSIONS:
            self._forget(entries.popleft())
        if len(self._workers) > MAX_WORKERS:
            for entry in self._workers.popitem(last=False)[1]:
                self._forget(entry)

    def _forget(self, entry: tuple[int, int]) -> None:
        self.communication_us -= entry[0]
        self.hidden_us -= entry[1]


class _Pipeline:
    """The bubble over the last versions.

    It needs the timelines of all workers of a replica, which arrive one by one. A version is measured once later
    versions have begun. If a timeline arrives after that, or exceeds MAX_OPEN_PASSES, its replica is left out.
    """

    def __init__(self) -> None:
        self.bubble: Bubble | None = None
        self._open: OrderedDict[tuple[int, int], list[Timeline]] = OrderedDict()
        self._measured: deque[list[Run]] = deque(maxlen=NUM_VERSIONS)
        # The epoch, and the number of its stages seen in timelines.
        self._num_stages = (0, 0)

    def add(self, record: jobs_pb2.GetTimelineResponse) -> None:
        """Add the passes of a timeline, if it has any."""
        if not any(span.HasField("stage") for span in record.timeline.spans):
            return
        timeline = Timeline.from_proto(record.worker, record.timeline)
        timeline = replace(timeline, spans=tuple(span for span in timeline.spans if span.kind in PASSES))
        timelines = self._open.setdefault((timeline.epoch, timeline.version), [])
        if sum(len(other.spans) for other in timelines) + len(timeline.spans) <= MAX_OPEN_PASSES:
            timelines.append(timeline)
        num_stages = 1 + max((span.stage or 0 for span in timeline.spans), default=0)
        self._num_stages = max(self._num_stages, (timeline.epoch, num_stages))
        if len(self._open) > NUM_OPEN_VERSIONS:
            (epoch, _), whole = self._open.popitem(last=False)
            self._measured.append(runs(whole, self._num_stages[1] if epoch == self._num_stages[0] else 0))
            self.bubble = measure([run for found in self._measured for run in found])


class TimelineFiles:
    """The timelines of one job. All methods block, except for `is_loaded`; the attributes do not."""

    def __init__(self, directory: Path):
        self.share: float | None = None
        """The hidden share of the communication in the kept timelines; None while there is none."""
        self.bubble: Bubble | None = None
        """The share of the time in which a pipeline's workers waited; None while there is none."""
        self.steps = StepWindow()
        """The times of the last steps by cause."""
        self._directory = directory
        self._files: list[_RecordFile] | None = None
        self._window = _Window()
        self._pipeline = _Pipeline()
        self._appending = False
        self._complained = False
        # A thread that was abandoned because its storage hung may continue later.
        self._lock = threading.RLock()

    @property
    def is_loaded(self) -> bool:
        """Whether the files on disk were read."""
        return self._files is not None

    def load(self) -> None:
        """Read the files on disk, once."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        if self._files is not None:
            return
        files: list[_RecordFile] = []
        try:
            for path in self._paths():
                file = _RecordFile(path)
                for _, record in _records(path):
                    file.num_records[record.worker] += bool(record.timeline.spans)
                    self._add(record)
                file.num_bytes = path.stat().st_size
                files.append(file)
        finally:
            self._files = files

    def append(self, record: jobs_pb2.GetTimelineResponse) -> None:
        """Add a timeline. A timeline that cannot be written is lost; the first such failure is logged."""
        with self._lock:
            self._append(record)

    def _append(self, record: jobs_pb2.GetTimelineResponse) -> None:
        self._load()
        assert self._files is not None
        self._add(record)
        payload = record.SerializeToString()
        try:
            if not self._appending or self._files[-1].num_bytes >= FILE_BYTES:
                number = int(self._files[-1].path.stem) + 1 if self._files else 1
                self._directory.mkdir(exist_ok=True)
                self._files.append(_RecordFile(self._directory / f"{number:08d}.records"))
            file = self._files[-1]
            # Records after an incomplete one cannot be read: if this write fails, the next one begins another file.
            self._appending = False
            with file.path.open("ab") as stream:
                stream.write(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
            self._appending = True
            file.num_bytes += _RECORD.size + len(payload)
            file.num_records[record.worker] += bool(record.timeline.spans)
            self._drop_old(self._files)
        except OSError as error:
            if not self._complained:
                log.warning("timelines cannot be kept", directory=str(self._directory), cause=one_line(error))
            self._complained = True

    def index(self) -> list[tuple[Path, int]]:
        """File and offset of the last timelines with spans of each worker, in the order of their arrival."""
        kept: dict[str, deque[tuple[Path, int]]] = {}
        for path in self._paths():
            for offset, record in _records(path):
                if record.timeline.spans:
                    kept.setdefault(record.worker, deque(maxlen=NUM_VERSIONS)).append((path, offset))
        return sorted(place for places in kept.values() for place in places)

    def _paths(self) -> list[Path]:
        """The timeline files on disk, in order; other files are ignored."""
        return sorted(path for path in self._directory.glob("*.records") if path.stem.isdecimal())

    def _add(self, record: jobs_pb2.GetTimelineResponse) -> None:
        window, timeline = self._window, record.timeline
        window.add(record.worker, timeline.communication_us, timeline.hidden_us)
        self.share = window.hidden_us / window.communication_us if window.communication_us else None
        self._pipeline.add(record)
        self.bubble = self._pipeline.bubble
        if timeline.HasField("times"):
            self.steps.add(record.worker, timeline.epoch, timeline.version, timeline.times)

    @staticmethod
    def _drop_old(files: list[_RecordFile]) -> None:
        total_bytes = sum(file.num_bytes for file in files)
        while len(files) > 1:
            oldest, later = files[0], files[1:]
            # Mostly the first worker decides: this runs for each record.
            if total_bytes <= MAX_BYTES and any(
                sum(file.num_records[name] for file in later) < NUM_VERSIONS for name in oldest.num_records
            ):
                return
            oldest.path.unlink(missing_ok=True)
            files.pop(0)
            total_bytes -= oldest.num_bytes


class Timelines:
    """The timelines of all jobs, for the event loop. A job whose storage hangs does not delay others."""

    def __init__(self, call_seconds: float = CALL_SECONDS) -> None:
        self._storage = StorageThreads(call_seconds)
        self._call_seconds = call_seconds
        self._jobs: OrderedDict[str, TimelineFiles] = OrderedDict()
        self._turns: dict[str, asyncio.Lock] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self._pending_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes of the reports that are queued for the disk."""
        return self._pending_bytes

    def take(self, record: JobRecord, worker: str, report: coordinator_pb2.ReportTimelineRequest) -> None:
        """Queue a checked report for the disk; drop it when the disk does not keep up, since the queue is bounded."""
        # Unknown fields, in which a peer could send any data, must not reach the disk.
        report.DiscardUnknownFields()
        num_bytes = report.ByteSize()
        if self._pending_bytes + num_bytes > MAX_PENDING_BYTES:
            return
        self._pending_bytes += num_bytes
        entry = jobs_pb2.GetTimelineResponse(worker=worker, timeline=report)
        task = asyncio.create_task(self._append(record, entry, num_bytes))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _append(self, record: JobRecord, entry: jobs_pb2.GetTimelineResponse, num_bytes: int) -> None:
        try:
            await self._in_turn(record, self._files(record).append, entry)
        except UnreachableError as error:
            log.warning("a timeline was not kept", job=record.job_id, cause=one_line(error))
        finally:
            self._pending_bytes -= num_bytes

    def share(self, job_id: str) -> float | None:
        """The hidden share of the job's communication; None if it is not loaded or there is none."""
        files = self._jobs.get(job_id)
        return files.share if files is not None else None

    def bubble(self, job_id: str) -> Bubble | None:
        """The bubble of the job's pipeline; None if it is not loaded or there is none."""
        files = self._jobs.get(job_id)
        return files.bubble if files is not None else None

    def steps(self, job_id: str) -> StepWindow | None:
        """The times of the job's last steps by cause; None if they are not loaded."""
        files = self._jobs.get(job_id)
        return files.steps if files is not None else None

    async def load(self, record: JobRecord) -> None:
        """Read a job's timelines from disk, unless that was done. If the storage does not answer, log it and go on."""
        files = self._files(record)
        if not files.is_loaded:
            try:
                await self._in_turn(record, files.load)
            except UnreachableError as error:
                log.warning("timelines cannot be read", job=record.job_id, cause=one_line(error))

    async def stream(self, record: JobRecord) -> AsyncIterator[jobs_pb2.GetTimelineResponse]:
        """Yield the kept timelines of a job, including all reports taken before; one at a time is in memory.

        Raises UnreachableError when their storage does not answer.
        """
        for path, offset in await self._in_turn(record, self._files(record).index):
            entry = await self._storage.call(record.run_directory, _record_at, path, offset)
            if entry is not None:
                yield entry

    def forget(self, job_id: str) -> None:
        """Forget a job whose files were removed."""
        self._jobs.pop(job_id, None)

    async def close(self) -> None:
        """Write the queued timelines."""
        if self._writing:
            await asyncio.wait(self._writing, timeout=self._call_seconds)

    async def _in_turn(self, record: JobRecord, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of a job after all earlier calls of this job.

        Raises UnreachableError when the storage does not answer this call or an earlier one.
        """
        turn = self._turns.setdefault(record.job_id, asyncio.Lock())
        try:
            async with asyncio.timeout(self._call_seconds):
                await turn.acquire()
        except TimeoutError:
            raise UnreachableError(
                f"{record.run_directory} has not answered for {self._call_seconds:g} s; check that it is mounted"
            ) from None
        try:
            return await self._storage.call(record.run_directory, function, *args, **kwargs)
        finally:
            turn.release()

    def _files(self, record: JobRecord) -> TimelineFiles:
        files = self._jobs.get(record.job_id)
        if files is None:
            files = self._jobs[record.job_id] = TimelineFiles(Path(record.run_directory) / "timeline")
        self._jobs.move_to_end(record.job_id)
        if len(self._jobs) > MAX_JOBS:
            gone, _ = self._jobs.popitem(last=False)
            if (turn := self._turns.get(gone)) is not None and not turn.locked():
                del self._turns[gone]
        return files


def _records(path: Path) -> Iterator[tuple[int, jobs_pb2.GetTimelineResponse]]:
    """Yield the offset and content of a file's records, up to the first incomplete one."""
    try:
        with path.open("rb") as stream:
            offset = 0
            while (record := _read(stream)) is not None:
                yield offset, record
                offset = stream.tell()
    except OSError:
        return


def _record_at(path: Path, offset: int) -> jobs_pb2.GetTimelineResponse | None:
    """The record at an offset; None if it no longer exists."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return _read(stream)
    except OSError:
        return None


def _read(stream: IO[bytes]) -> jobs_pb2.GetTimelineResponse | None:
    """Read the next record; None if there is no complete one."""
    head = stream.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    num_bytes, crc32 = _RECORD.unpack(head)
    payload = stream.read(num_bytes) if num_bytes <= FILE_BYTES else b""
    if len(payload) < num_bytes or zlib.crc32(payload) != crc32:
        return None
    try:
        return jobs_pb2.GetTimelineResponse.FromString(payload)
    except DecodeError:
        return None
