"""A job's metrics: a row for each step, made from the ledger. There is no other record of them.

Step t starts from version t, so the row of step t has the training loss and the validation loss of version t. The last
version has no step. If it was validated, a row without a step comes last. With local steps a round has one row, which
begins with the round's first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gradstream.coordinator.state.state import JobRecord, StateReader
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

PAGE_STEPS = 1000
"""Number of steps, or rounds, that are read at a time. The rows of a page take less than 0.2 MiB."""


def pages(
    state: StateReader, record: JobRecord, rounds: Rounds, first_step: int, every: int
) -> Iterator[list[jobs_pb2.StepMetrics]]:
    """Yield the rows of a job's current trajectory that GetMetricsRequest selects, in pages.

    A page may be empty.
    """
    first_version = rounds.version_at(min(first_step, 2**63 - 1))
    validations = {item.version: item.loss for item in state.validations(record.job_id)}
    before = state.step_totals(record.job_id, record.epoch, record.start_version, below=first_version)
    rows = _Rows(validations, rounds, first_version, every, before.num_tokens)
    # The report of the step before is needed for the time of the first step.
    next_version = max(0, first_version - 1)
    while True:
        reports = state.read_steps(record.job_id, record.epoch, record.start_version, next_version, PAGE_STEPS)
        yield list(rows.take(reports))
        if len(reports) < PAGE_STEPS:
            break
        next_version = reports[-1].step + 1
    yield list(rows.last())


class _Rows:
    """Makes rows from reports, which come by rising version."""

    def __init__(
        self, validations: Mapping[int, float], rounds: Rounds, first_version: int, every: int, num_tokens: int
    ):
        self._validations = validations
        self._rounds = rounds
        self._first_version = first_version
        self._every = max(1, every)
        self._num_tokens = num_tokens
        self._before: coordinator_pb2.ReportStepRequest | None = None
        # The last step's row, which is always shown, also if `every` does not divide its step.
        self._held: jobs_pb2.StepMetrics | None = None

    def take(self, reports: Iterable[coordinator_pb2.ReportStepRequest]) -> Iterator[jobs_pb2.StepMetrics]:
        """Take more reports; yield the rows of the selected steps."""
        for report in reports:
            if report.step >= self._first_version:
                self._num_tokens += report.num_tokens
                steps = self._rounds.steps_from(report.step)
                self._held = row_of(report, steps, self._before, self._num_tokens, self._validations.get(report.step))
                is_chosen = steps[-1] // self._every > (steps[0] - 1) // self._every
                if is_chosen or report.step in self._validations:
                    yield self._held
                    self._held = None
            self._before = report

    def last(self) -> Iterator[jobs_pb2.StepMetrics]:
        """Yield the rows at the end: that of the last step, if not yielded yet, and that of the last version."""
        if self._held is not None:
            yield self._held
        version = self._before.step + 1 if self._before is not None else 0
        if version >= self._first_version and version in self._validations:
            yield jobs_pb2.StepMetrics(
                step=self._rounds.steps_at(version),
                version=version,
                num_steps=0,
                num_tokens=self._num_tokens,
                validation_loss=self._validations[version],
            )


def row_of(
    report: coordinator_pb2.ReportStepRequest,
    steps: range,
    before: coordinator_pb2.ReportStepRequest | None,
    num_tokens: int,
    validation_loss: float | None,
) -> jobs_pb2.StepMetrics:
    """Make the row of a commit.

    `steps` are its steps: one, or a round's. `before` is the report of the commit before. `num_tokens` is the number
    of tokens up to the end of these steps.
    """
    return jobs_pb2.StepMetrics(
        step=steps[0],
        version=report.step,
        num_steps=len(steps),
        epoch=report.epoch,
        unix_ms=report.unix_ms,
        num_tokens=num_tokens,
        loss=report.loss,
        validation_loss=validation_loss,
        learning_rate=report.learning_rate,
        grad_norm=report.grad_norm,
        step_seconds=step_seconds(report, before),
        pushed_bytes=report.pushed_bytes,
        pulled_bytes=report.pulled_bytes if report.HasField("pulled_bytes") else None,
        skipped=report.skipped,
        slots=report.slots,
    )


def step_seconds(
    report: coordinator_pb2.ReportStepRequest, before: coordinator_pb2.ReportStepRequest | None
) -> float | None:
    """Seconds from one commit to the next by the leader's clock; None if this is not the duration of the step.

    It is not when the step before belongs to another epoch, is missing, or ended at a boundary at which the job may
    have rested.
    """
    if before is None or before.epoch != report.epoch or before.step + 1 != report.step or before.halted:
        return None
    # A clock that was set back must not give a negative duration.
    return max(0, report.unix_ms - before.unix_ms) / 1000
