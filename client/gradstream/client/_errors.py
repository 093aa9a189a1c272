"""The errors a caller of the client meets. All but the last two come from `gradstream.core.errors`:

GradstreamError
├── ConfigError            a recipe, an option or a path is wrong
├── DataError              a data set or a data shard is missing, corrupt or does not fit the model
├── CheckpointError        a checkpoint is missing, truncated or altered
├── PlanError              no plan can be made with the nodes at hand
├── ProtocolError          the coordinator's answer breaks the protocol
│   └── StaleEpochError    a peer speaks of a plan that has been replaced
├── AccessError            the credentials do not allow what was asked
│   └── CredentialsError   credentials are missing, damaged, expired, revoked or another cluster's
├── BusyError              more was asked for at once than a caller may; later it may
├── UnreachableError       the coordinator does not answer
├── JobFailedError         the job that was waited for failed
└── FineTuningFailedError  the fine-tuning that was waited for failed
"""

from __future__ import annotations

from gradstream.client._fine_tuning_types import FineTuning
from gradstream.client._job_types import Job
from gradstream.core.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    ConfigError,
    CredentialsError,
    DataError,
    GradstreamError,
    PlanError,
    ProtocolError,
    StaleEpochError,
    UnreachableError,
)

__all__ = [
    "AccessError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "CredentialsError",
    "DataError",
    "FineTuningFailedError",
    "GradstreamError",
    "JobFailedError",
    "PlanError",
    "ProtocolError",
    "StaleEpochError",
    "UnreachableError",
]


class JobFailedError(GradstreamError):
    """The job that was waited for failed. `reason` says why, `job` is its last state."""

    exit_code = 8

    def __init__(self, job: Job):
        self.job = job
        self.reason = job.reason or "no reason given"
        super().__init__(f"job {job.job_id} failed at step {job.step} of {job.num_steps}: {self.reason}")


class FineTuningFailedError(GradstreamError):
    """The fine-tuning that was waited for failed. `reason` says why, `fine_tuning` is its last state."""

    exit_code = 8

    def __init__(self, fine_tuning: FineTuning):
        self.fine_tuning = fine_tuning
        self.reason = fine_tuning.reason or "no reason given"
        super().__init__(f"{fine_tuning.name} failed: {self.reason}")
