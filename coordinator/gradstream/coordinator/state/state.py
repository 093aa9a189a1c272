"""The interface of the coordinator's durable state. Another database can implement it in place of SQLite.

A method either does all of its work durably or raises. The state has everything that nodes and people were told. The
controller can rebuild its memory from the state. Sums over steps are kept, not recomputed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from gradstream.coordinator.state.history import ALL, HistoryFilter
from gradstream.core.job_states import QUEUED
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

MAX_LOG_LINES = 50_000
MAX_WAITING_ITEMS = 20_000
WAIT_SECONDS = 1.0
"""Maximum time that a write waits for the writes before it."""


@dataclass
class JobRecord:
    """The durable part of a job. `desired` is the last order of a person: run, pause, stop, replan."""

    job_id: str
    name: str
    recipe_json: str
    manifest_json: str
    run_directory: str
    submitted_unix_ms: int
    state: jobs_pb2.JobState.ValueType = QUEUED
    reason: str = ""
    desired: str = "run"
    # Queued jobs run in rising order of rank. A resumed job gets a rank below all others.
    rank: int = 0
    epoch: int = 0
    start_version: int = 0
    # Whether nodes may still hold the last plan. A coordinator that restarts then tries to adopt it.
    plan_held: bool = False
    ended_unix_ms: int = 0
    # The lease table as bytes, stored because its number must rise across restarts of the coordinator too.
    leases: bytes = b""
    decisions: dict[str, str] = field(default_factory=dict)
    # The id that the submitter gave the request; empty for none. It is unique among jobs.
    request_id: str = ""
    # Names of parameter servers that the job's plans leave out.
    without_servers: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTotals:
    """Sums over the steps of the current trajectory; each step counts once, and so does each round of local steps."""

    num_steps: int = 0
    version: int = 0
    num_tokens: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    last: coordinator_pb2.ReportStepRequest | None = None

    @property
    def consecutive_skips(self) -> int:
        """Number of consecutive skipped steps up to this version."""
        return self.last.consecutive_skips if self.last is not None else 0


@dataclass(frozen=True)
class Trouble:
    """Why an operation that is retried fails, and since when (Unix ms)."""

    cause: str
    since_unix_ms: int


class StateReader(ABC):
    """Reads jobs, their history and their ledgers. One thread at a time uses it.

    Sees everything that was stored before the call. Methods raise UnreachableError when the storage cannot be used.
    """

    @abstractmethod
    def get_job(self, job_id: str) -> JobRecord | None:
        """The job with this id, or None."""

    @abstractmethod
    def job_of_request(self, request_id: str) -> JobRecord | None:
        """The job that the request with this id created, or None. `request_id` must not be empty."""

    @abstractmethod
    def newest_job(self, name: str = "") -> JobRecord | None:
        """The newest job, or the newest one of this name; None without any."""

    @abstractmethod
    def list_jobs(self, states: Collection[int] = ()) -> list[JobRecord]:
        """The jobs in some states, or all jobs, oldest first."""

    @abstractmethod
    def page_of_jobs(self, before: str, limit: int, states: Collection[int] = ()) -> list[JobRecord] | None:
        """At most `limit` jobs that are older than the job `before`, newest first, in all states or in `states`.

        An empty `before` begins with the newest job. Returns None when there is no job `before`.
        """

    @abstractmethod
    def job_ids(self) -> list[str]:
        """The ids of all jobs, oldest first."""

    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """The lowest and the highest rank of all jobs; (0, 0) without any job."""

    @abstractmethod
    def load_plan(self, job_id: str, epoch: int) -> bytes | None:
        """The plan stored for an epoch, or None."""

    @abstractmethod
    def read_history(
        self, job_id: str, after_cursor: int, limit: int, wanted: HistoryFilter = ALL
    ) -> list[jobs_pb2.WatchJobResponse]:
        """At most `limit` of the wanted items after a cursor, oldest first; fewer only if there are no more."""

    @abstractmethod
    def cursor_before_last(self, job_id: str, count: int, wanted: HistoryFilter = ALL) -> int:
        """A cursor after which there are the last `count` wanted items, or all of them if there are fewer."""

    @abstractmethod
    def step_totals(self, job_id: str, epoch: int, start_version: int, below: int | None = None) -> StepTotals:
        """The sums over the trajectory that `epoch` continues from `start_version`, up to `below` if given.

        For a step before `start_version` the row of the highest epoch counts. From `start_version` on only rows of
        `epoch` count. The step `below` itself does not count. The time does not
        grow with the number of steps.
        """

    @abstractmethod
    def read_steps(
        self, job_id: str, epoch: int, start_version: int, first: int, limit: int
    ) -> list[coordinator_pb2.ReportStepRequest]:
        """At most `limit` steps of the trajectory of `step_totals`, from `first` on, by rising step."""

    @abstractmethod
    def validation_parts(self, job_id: str, version: int) -> dict[int, tuple[float, int]]:
        """For each slot with a report on a version in any epoch, (sum of loss, tokens)."""

    @abstractmethod
    def validations(self, job_id: str) -> list[jobs_pb2.Validation]:
        """The complete validation passes, by rising version."""

    @abstractmethod
    def first_and_last_validation(self, job_id: str) -> tuple[jobs_pb2.Validation, jobs_pb2.Validation] | None:
        """The complete validation passes of the lowest and the highest version; None without any."""

    @abstractmethod
    def checkpoint_files(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportCheckpointRequest]:
        """The files of an epoch whose manifest is not written yet."""

    @abstractmethod
    def residuals(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportResidualRequest]:
        """The residuals of an epoch whose manifest is not written yet, and all reports that there is none."""

    @abstractmethod
    def checkpoint_versions(self, job_id: str) -> list[int]:
        """The versions of a job's recorded checkpoints, oldest first, without the forgotten ones.

        Retention may have removed all but the newest ones from the disk.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the storage."""


class State(StateReader):
    """Reads and writes. One thread at a time reads; writes of several threads are made one by one.

    Methods raise UnreachableError when the storage cannot be used, or when an earlier write has not ended for
    WAIT_SECONDS. The caller then tries again later.
    """

    @property
    @abstractmethod
    def trouble(self) -> Trouble | None:
        """Why the storage cannot be used; None if it can.

        The trouble stands from a failed call until a call of the same kind succeeds.
        """

    @abstractmethod
    def open_reader(self) -> StateReader:
        """Open another connection, for use by another thread. The caller closes it."""

    @abstractmethod
    def create_job(self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        """Add a job and the first items of its history, in one transaction."""

    @abstractmethod
    def store_job(
        self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = (), plan: bytes | None = None
    ) -> None:
        """Store a transition in one transaction: the record, new history items, and a plan if given."""

    @abstractmethod
    def append_later(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Add items to a job's history with the next write of any kind, before what that write adds. Never blocks.

        Of more than MAX_WAITING_ITEMS such items the oldest are dropped. Call `flush` soon.
        """

    @abstractmethod
    def flush(self) -> None:
        """Store the items of `append_later`. Raises UnreachableError and then drops them: only people read them."""

    @abstractmethod
    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Add items to a job's history; their `cursor` is ignored. Beyond a bound the oldest log lines are deleted."""

    @abstractmethod
    def record_step(
        self, report: coordinator_pb2.ReportStepRequest, items: Sequence[jobs_pb2.WatchJobResponse] = ()
    ) -> bool:
        """Add a step, followed by `items`, to ledger and history.

        Returns False and changes nothing if (job, epoch, step) is known.
        """

    @abstractmethod
    def record_validation_part(self, report: coordinator_pb2.ReportValidationRequest) -> bool:
        """Add a slot's part of a validation pass. Returns False if it was known."""

    @abstractmethod
    def record_validation(self, job_id: str, validation: jobs_pb2.Validation) -> bool:
        """Add a complete validation pass, in the history too. Returns False if the version had one."""

    @abstractmethod
    def record_checkpoint_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> bool:
        """Add a server's file. Returns False if it was known or the version's manifest of this epoch was written."""

    @abstractmethod
    def record_residual(self, report: coordinator_pb2.ReportResidualRequest) -> bool:
        """Add the report of a slot's residual, or that there is none.

        Returns False if it was known or the version's manifest of this epoch was written.
        """

    @abstractmethod
    def record_checkpoint(
        self,
        job_id: str,
        epoch: int,
        checkpoint: jobs_pb2.Checkpoint,
        items: Sequence[jobs_pb2.WatchJobResponse] = (),
    ) -> None:
        """Add a checkpoint whose manifest was written, also to the history, followed by `items`.

        The reports of its files are forgotten.
        """

    @abstractmethod
    def forget_checkpoints(self, job_id: str, after: int, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        """Forget the checkpoints later than version `after`, and add `items` to the history.

        This happens when a person lets the job go back to an older checkpoint.
        """

    @abstractmethod
    def delete_job(self, job_id: str) -> None:
        """Forget a job: its record, plans, history, ledger and all that was reported of it, in one transaction."""

    @abstractmethod
    def check_writable(self) -> None:
        """Test whether the state can be written. Raises UnreachableError when it cannot."""
