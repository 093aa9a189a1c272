"""What the coordinator remembers across a restart: an interface, so that another database can take SQLite's place.

A method either did all of its work durably or raised. Everything that a node or a person was told is in here; what the
controller keeps in memory can be built again from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradstream.core.job_states import QUEUED
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

MAX_LOG_LINES = 50_000


@dataclass
class JobRecord:
    """The durable part of a job. `desired` is what a person asked for last: run, pause, stop, replan."""

    job_id: str
    name: str
    recipe_json: str
    manifest_json: str
    run_directory: str
    submitted_unix_ms: int
    state: jobs_pb2.JobState.ValueType = QUEUED
    reason: str = ""
    desired: str = "run"
    # Queued jobs run in rising order of rank; a resumed one gets a rank below all others.
    rank: int = 0
    epoch: int = 0
    start_version: int = 0
    # The last plan may still be on its servers: a coordinator that restarts tries to adopt it.
    plan_held: bool = False
    ended_unix_ms: int = 0
    # The lease table as bytes: its number must rise across restarts of the coordinator too.
    leases: bytes = b""
    decisions: dict[str, str] = field(default_factory=dict)
    # What the submitter called the request; empty for none. No two jobs have the same.
    request_id: str = ""
    # Names of parameter servers that the job's plans leave out.
    without_servers: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTotals:
    """Sums over the steps of the current trajectory, each counted once."""

    num_steps: int = 0
    version: int = 0
    num_tokens: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    last: coordinator_pb2.ReportStepRequest | None = None

    @property
    def consecutive_skips(self) -> int:
        """Skipped steps in a row at this version."""
        return self.last.consecutive_skips if self.last is not None else 0


@dataclass(frozen=True)
class Trouble:
    """Why something that is tried again and again does not work, and since when (Unix ms)."""

    cause: str
    since_unix_ms: int


class State(ABC):
    """Jobs, their history and their ledgers. Used from one thread; every call is short.

    Methods raise UnreachableError when the storage cannot be used, so that whoever called tries again later.
    """

    @property
    @abstractmethod
    def trouble(self) -> Trouble | None:
        """Why the storage cannot be used, from the first call that failed to the next of its kind that succeeds."""

    @abstractmethod
    def create_job(self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        """Add a job and the first items of its history, in one transaction."""

    @abstractmethod
    def store_job(
        self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = (), plan: bytes | None = None
    ) -> None:
        """Store a transition in one transaction: a job's record, the items that it adds to the history, and the plan of
        `record.epoch` when one is given."""

    @abstractmethod
    def get_job(self, job_id: str) -> JobRecord | None:
        """The job, or None."""

    @abstractmethod
    def job_of_request(self, request_id: str) -> JobRecord | None:
        """The job that the request of this id, which is not empty, has made, or None."""

    @abstractmethod
    def list_jobs(self) -> list[JobRecord]:
        """All jobs, oldest first."""

    @abstractmethod
    def load_plan(self, job_id: str, epoch: int) -> bytes | None:
        """The plan stored for an epoch, or None."""

    @abstractmethod
    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Add items to a job's history; their `cursor` is ignored. The oldest log lines beyond a bound fall out."""

    @abstractmethod
    def read_history(
        self, job_id: str, after_cursor: int, limit: int, kinds: Sequence[str] = ()
    ) -> list[jobs_pb2.WatchJobResponse]:
        """At most `limit` items after a cursor, oldest first; of all kinds, or of these."""

    @abstractmethod
    def record_step(
        self, report: coordinator_pb2.ReportStepRequest, items: Sequence[jobs_pb2.WatchJobResponse] = ()
    ) -> bool:
        """Enter a step in ledger and history, followed by `items`. False, and nothing changed, when (job, epoch, step)
        is known."""

    @abstractmethod
    def step_totals(self, job_id: str, epoch: int, start_version: int, below: int | None = None) -> StepTotals:
        """Sums over the trajectory that `epoch` continues from `start_version`, over steps below `below` if given.

        For a step before `start_version` the row of the highest epoch counts; from there on only rows of `epoch` do.
        """

    @abstractmethod
    def read_steps(
        self, job_id: str, epoch: int, start_version: int, first: int, limit: int
    ) -> list[coordinator_pb2.ReportStepRequest]:
        """At most `limit` steps from `first` on, by rising step, of the trajectory of `step_totals`."""

    @abstractmethod
    def record_validation_part(self, report: coordinator_pb2.ReportValidationRequest) -> bool:
        """Enter a slot's part of a validation pass. False when it was known."""

    @abstractmethod
    def validation_parts(self, job_id: str, version: int) -> dict[int, tuple[float, int]]:
        """For each slot that reported on a version under any epoch, (sum of loss, tokens)."""

    @abstractmethod
    def record_validation(self, job_id: str, validation: jobs_pb2.Validation) -> bool:
        """Enter a complete validation pass, in history too. False when the version had one."""

    @abstractmethod
    def validations(self, job_id: str) -> list[jobs_pb2.Validation]:
        """The complete passes by rising version."""

    @abstractmethod
    def record_checkpoint_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> bool:
        """Enter a server's file. False when it was known or the version's manifest of this epoch was written."""

    @abstractmethod
    def checkpoint_files(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportCheckpointRequest]:
        """The files of an epoch whose manifest is still to be written."""

    @abstractmethod
    def record_residual(self, report: coordinator_pb2.ReportResidualRequest) -> bool:
        """Enter a slot's residual, or that there is none. False when it was known or the version's manifest of this
        epoch was written."""

    @abstractmethod
    def residuals(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportResidualRequest]:
        """The residuals of an epoch whose manifest is still to be written, and all reports that there is none."""

    @abstractmethod
    def record_checkpoint(
        self,
        job_id: str,
        epoch: int,
        checkpoint: jobs_pb2.Checkpoint,
        items: Sequence[jobs_pb2.WatchJobResponse] = (),
    ) -> None:
        """Enter a checkpoint whose manifest was written, in history too, followed by `items`; forget the files it was
        made of."""

    @abstractmethod
    def checkpoint_versions(self, job_id: str) -> list[int]:
        """The versions of a job whose checkpoints were entered and not forgotten, oldest first. Retention may have
        removed all but the newest ones."""

    @abstractmethod
    def forget_checkpoints(self, job_id: str, after: int, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        """Forget the checkpoints later than version `after`, and add `items` to the history: a person goes back to an
        older one."""

    @abstractmethod
    def check_writable(self) -> None:
        """Write something. Raises UnreachableError when that is not possible."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the storage."""
