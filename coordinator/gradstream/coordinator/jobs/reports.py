"""Reports of nodes: steps, validation, checkpoint files, timelines, failures, log lines. Reports are idempotent.

A report of a superseded epoch is accepted without effect: its node did nothing wrong and must not retry for ever.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.commits import check_step, counted_line
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.journal import Event
from gradstream.coordinator.jobs.residuals import Standing, check_residual, standing
from gradstream.coordinator.nodes.membership import WORKER, NodeEntry
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.telemetry.timelines import check_timeline
from gradstream.core.checkpoint.manifest import directory_of, write_manifest
from gradstream.core.errors import GradstreamError, ProtocolError, UnreachableError, one_line
from gradstream.core.job_states import LIVE
from gradstream.core.log import MAX_LINES_PER_HEARTBEAT, get_logger
from gradstream.core.plan.leases import slots_text
from gradstream.core.recipe.recipe import Recipe
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

MAX_LINE_CHARACTERS = 2000
MANIFEST_RETRY_SECONDS = 2.0
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = get_logger()


class Reports:
    """Stores reports in the state and passes their consequences to the controller."""

    def __init__(self, controller: Controller):
        self._controller = controller
        self._state = controller.state
        self._writes = controller.writes
        # Reports that are being stored.
        self._under_way: set[asyncio.Task[None]] = set()
        controller.after_reconcile.append(self._write_manifests)

    async def _to_the_end(self, report: Coroutine[Any, Any, None]) -> None:
        """Take a report, also when its call is cancelled meanwhile: what is stored must be seen."""
        task = asyncio.create_task(report)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        await asyncio.shield(task)

    def _active(self, job_id: str) -> ActiveJob | None:
        """The view of a job if it is the active one."""
        active = self._controller.active
        return active if active is not None and active.job_id == job_id else None

    # --- steps ------------------------------------------------------------------------------------------------------

    async def step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        """Take the report of a step that was committed or skipped. Raises ProtocolError when it cannot be right."""
        await self._to_the_end(self._step(report))

    async def _step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        record, active = self._job(report.job_id, report.epoch)
        recipe = self._recipe(record, active)
        rounds, num_steps = recipe.rounds, check_step(report, record, recipe)
        if rounds.length:
            # For clients, which need not know the recipe.
            report.first_step, report.num_steps = rounds.steps_at(report.step), num_steps
        events = []
        if report.skipped:
            row = f"{report.consecutive_skips} in a row"
            line = f"{rounds.commit_text(report.step)} was skipped, loss or gradient was not finite ({row})"
            events.append(Event("skip", line).as_item())
        before = active.totals.last if active is not None else None
        if line := counted_line(report, before, recipe.training.num_slots, rounds):
            events.append(Event("quorum", line).as_item())
        if not await self._writes.call(lambda state: state.record_step(report, events)):
            return
        self._controller.notifier.changed(record.job_id, [jobs_pb2.WatchJobResponse(step=report), *events])
        self._see_step(report)

    def _see_step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        """Change the view of the active job by a step that was stored."""
        active = self._active(report.job_id)
        if active is None:
            return
        record = active.record
        if report.epoch != record.epoch or report.step != active.version:
            # The report is out of order, or a late one of an earlier epoch that still counts, or the totals were read
            # after it was stored.
            active.totals = self._state.step_totals(record.job_id, record.epoch, record.start_version)
        else:
            totals = active.totals
            active.totals = replace(
                totals,
                num_steps=totals.num_steps + 1,
                version=report.step + 1,
                num_tokens=totals.num_tokens + report.num_tokens,
                num_samples=totals.num_samples + report.num_samples,
                num_skipped=totals.num_skipped + report.skipped,
                last=report,
            )
        if report.epoch != record.epoch:
            return
        now = self._controller.clock()
        active.pace.add(report, now)
        active.progress_at = now
        if report.halted and active.record.desired != "run":
            active.halted_version = report.step + 1
        elif report.halted:
            # The request to halt was withdrawn after the leader had it. Workers rest until they get a newer table.
            active.leases_due = True
        self._controller.reconcile()

    # --- validation -------------------------------------------------------------------------------------------------

    async def validation(self, report: coordinator_pb2.ReportValidationRequest) -> None:
        """Take the report of a slot's part of a validation pass. Raises ProtocolError for an unknown pass or part."""
        await self._to_the_end(self._validation(report))

    async def _validation(self, report: coordinator_pb2.ReportValidationRequest) -> None:
        record, active = self._job(report.job_id, report.epoch)
        recipe = self._recipe(record, active)
        expected = recipe.validates(report.version) and report.slot < recipe.training.num_slots
        if not expected or not report.num_tokens:
            raise ProtocolError(
                f"job {report.job_id} has no validation of version {report.version} with a slot {report.slot} "
                f"of {report.num_tokens} tokens"
            )
        # The pass is completed even if the part was known: a coordinator may have died between the two calls.
        await self._writes.call(lambda state: state.record_validation_part(report))
        done = await self._complete_validation(record.job_id, report.version, recipe)
        active = self._active(report.job_id)
        if active is not None:
            if done is not None:
                active.validations[done.version] = done.loss
            active.progress_at = self._controller.clock()
            self._controller.reconcile()

    async def _complete_validation(self, job_id: str, version: int, recipe: Recipe) -> jobs_pb2.Validation | None:
        """Store a validation pass once all of its parts are there, and return it; None before."""
        num_slots, rounds = recipe.training.num_slots, recipe.rounds
        parts = self._state.validation_parts(job_id, version)
        if len(parts) < num_slots:
            return None
        # In slot order and correctly rounded: the mean has the same bits in whatever order the reports came.
        loss_sum = _total([parts[slot][0] for slot in range(num_slots)])
        num_tokens = sum(tokens for _, tokens in parts.values())
        validation = jobs_pb2.Validation(version=version, loss=loss_sum / num_tokens, num_tokens=num_tokens)
        if rounds.length:
            validation.step = rounds.steps_at(version)
        if await self._writes.call(lambda state: state.record_validation(job_id, validation)):
            self._controller.notifier.changed(job_id, [jobs_pb2.WatchJobResponse(validation=validation)])
        return validation

    # --- checkpoints ------------------------------------------------------------------------------------------------

    async def checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        """Take the report of a server's checkpoint file. Raises ProtocolError when it does not fit the plan."""
        await self._to_the_end(self._checkpoint(report))

    async def _checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        record, active = self._job(report.job_id, report.epoch)
        if active is None or active.plan is None or report.epoch != record.epoch:
            log.info("dropped a file of a replaced plan", job=report.job_id, epoch=report.epoch, version=report.version)
            return
        if (
            report.server >= len(active.plan.servers)
            or not record.start_version <= report.version <= active.rounds.last_version
            or not _FILE_NAME.fullmatch(report.file)
            or not _SHA256.fullmatch(report.sha256)
            or report.num_bytes >= 2**63
            or any(len(digest.sha256) != 32 for digest in report.fragments)
        ):
            raise ProtocolError(
                f"checkpoint report of server {report.server}, version {report.version} of job {report.job_id} "
                f"does not fit the plan"
            )
        if not await self._writes.call(lambda state: state.record_checkpoint_file(report)):
            return
        active = self._active(report.job_id)
        if active is not None and active.plan is not None and active.record.epoch == report.epoch:
            active.files.setdefault(report.version, {})[report.server] = report
            active.progress_at = self._controller.clock()
            self._controller.reconcile()

    async def residual(self, report: coordinator_pb2.ReportResidualRequest) -> None:
        """Take the report of a slot's residual file, or that there is none. Raises ProtocolError if it does not fit."""
        await self._to_the_end(self._residual(report))

    async def _residual(self, report: coordinator_pb2.ReportResidualRequest) -> None:
        record, active = self._job(report.job_id, report.epoch)
        if active is None or active.plan is None or report.epoch != record.epoch:
            log.info("dropped a residual of a replaced plan", job=report.job_id, version=report.version)
            return
        check_residual(report, active)
        if not await self._writes.call(lambda state: state.record_residual(report)):
            return
        active = self._active(report.job_id)
        if active is not None and active.plan is not None and active.record.epoch == report.epoch:
            active.take_residual(report)
            if not report.file:
                at, kept = active.rounds.version_text(report.version), active.recipe.slot_state_title
                self._controller.journal.note(
                    report.job_id, "slot", f"{at}: slot {report.slot} goes on without its {kept}, on another worker"
                )
            active.progress_at = self._controller.clock()
            self._controller.reconcile()

    def _write_manifests(self, active: ActiveJob) -> None:
        """Write the manifest of the oldest version of which all servers' files and all residuals were reported."""
        if active.writing is not None or active.plan is None:
            return
        now = self._controller.clock()
        for version in sorted(active.files):
            if len(active.files[version]) < len(active.plan.servers) or not self.ledger_reaches(active, version):
                continue
            if now < active.unwritten.get(version, (0.0, ""))[0]:
                continue
            residuals = standing(active, version, self._controller.members, now)
            if not residuals.owed:
                active.writing = asyncio.create_task(self._write_manifest(active, version, residuals))
                return

    def ledger_reaches(self, active: ActiveJob, version: int) -> bool:
        """Whether every step below a version was reported: the totals in the manifest must be exact."""
        record = active.record
        totals = self._state.step_totals(record.job_id, record.epoch, record.start_version, below=version)
        return totals.num_steps == version

    async def _write_manifest(self, active: ActiveJob, version: int, residuals: Standing) -> None:
        record, plan = active.record, active.plan
        assert plan is not None
        root = checkpoints.root_of(record.run_directory)
        reports = [report for _, report in sorted(active.files[version].items())]
        totals = self._state.step_totals(record.job_id, record.epoch, record.start_version, below=version)
        progress = {
            "num_tokens": totals.num_tokens,
            "num_samples": totals.num_samples,
            "num_skipped": totals.num_skipped,
            "consecutive_skips": reports[0].consecutive_skips,
        }
        try:
            directory = directory_of(root, version)
            manifest = await self._controller.disk.call(
                directory, write_manifest, directory, plan, version, reports, progress, residuals.entries
            )
            events = []
            if residuals.lost:
                lost = f"the {plan.recipe.slot_state_title} of {slots_text(residuals.lost)}"
                line = (
                    f"{plan.rounds.version_text(version)}: {lost} were lost with their worker; if the job goes back to "
                    f"this version, these slots start without them"
                )
                events.append(Event("checkpoint", line).as_item())
            checkpoint = checkpoints.as_message(root, manifest)
            job_id, epoch = record.job_id, plan.epoch
            await self._writes.call(lambda state: state.record_checkpoint(job_id, epoch, checkpoint, events))
            written = jobs_pb2.WatchJobResponse(checkpoint=checkpoint)
            self._controller.notifier.changed(record.job_id, [written, *events])
            if active.record.epoch == plan.epoch:
                active.written(version)
                active.progress_at = self._controller.clock()
            active.checkpoints.add(version)
            await self._remove_old(active, root)
        except (GradstreamError, OSError) as error:
            if active.record.epoch == plan.epoch:
                self._hold_manifest(active, version, one_line(error))
            return
        finally:
            active.writing = None
        self._controller.reconcile()

    def _hold_manifest(self, active: ActiveJob, version: int, why: str) -> None:
        """Schedule a retry for a manifest that could not be written. The job goes on: the servers hold its state."""
        known = active.unwritten.get(version, (0.0, ""))[1]
        active.unwritten[version] = (self._controller.clock() + MANIFEST_RETRY_SECONDS, why)
        if known != why:
            place = active.rounds.version_text(version)
            line = f"the checkpoint of {place} could not be written, trying again: {why}"
            self._controller.journal.note(active.job_id, "checkpoint", line)

    async def _remove_old(self, active: ActiveJob, root: str) -> None:
        """Remove the checkpoints that retention does not keep. A checkpoint that cannot be removed only takes space."""
        keep = active.recipe.checkpoint.keep
        try:
            async with self._controller.pins.choosing(root):
                pinned = self._pinned(active, root)
                # Under the lock until the removal ends: it would not spare a checkpoint that is pinned meanwhile.
                removed, left = await self._controller.disk.finish(root, checkpoints.remove_old, root, keep, pinned)
        except (OSError, UnreachableError) as error:
            line = f"old checkpoints could not be removed: {one_line(error)}"
            self._controller.journal.note(active.job_id, "checkpoint", line)
            return
        active.checkpoints.intersection_update(left)
        if removed:
            versions = ", ".join(map(str, removed))
            line = f"removed version {versions}: the newest {keep} are kept"
            self._controller.journal.note(active.job_id, "checkpoint", line)

    def _pinned(self, active: ActiveJob, root: str) -> set[int]:
        """The versions under `root` whose checkpoints are kept, however old.

        These are the start of a plan, the input of an export, candidates for a fine-tuning's result, and the bases of
        jobs that have not ended.
        """
        bases = [base for record in self._state.list_jobs(LIVE) if (base := checkpoints.base_path(record.recipe_json))]
        return self._controller.pins.of(root) | active.candidates | checkpoints.bases_under(root, bases)

    # --- timelines --------------------------------------------------------------------------------------------------

    def timeline(self, report: coordinator_pb2.ReportTimelineRequest) -> None:
        """Take a worker's timeline of a version. Raises ProtocolError for an unknown worker or a wrong timeline."""
        record, active = self._job(report.job_id, report.epoch)
        node = self._controller.members.get(report.node_id)
        if node is None or node.kind != WORKER:
            raise ProtocolError(f"a timeline came from '{report.node_id[:100]}', which is no worker known here")
        rounds = self._recipe(record, active).rounds
        check_timeline(report, rounds)
        if report.HasField("times"):
            report.times.round_steps = rounds.length if rounds.is_round(report.version) else 0
        self._controller.timelines.take(record, node.name, report)

    # --- failures and logs ------------------------------------------------------------------------------------------

    async def failure(self, report: coordinator_pb2.ReportFailureRequest) -> None:
        """Take the report that a node cannot go on: it is benched, and the job fails when no other node can go on."""
        record, active = self._job(report.job_id, report.epoch)
        if active is None or report.epoch != record.epoch:
            log.info("dropped a failure of a replaced plan", job=report.job_id, message=report.message[:500])
            return
        node = self._controller.members.get(report.node_id)
        message = " ".join(report.message.split())[:MAX_LINE_CHARACTERS] or "it gave no reason"
        if node is None:
            log.warning("dropped a failure of a node that is not known here", job=report.job_id, message=message)
            return
        self._controller.node_failed(active, node, message)

    def log_lines(self, node: NodeEntry, lines: Sequence[coordinator_pb2.LogLine]) -> None:
        """Add a node's log lines to the history of the job that they name, else of the active job."""
        active = self._controller.active
        by_job: dict[str, list[jobs_pb2.WatchJobResponse]] = {}
        for line in lines[:MAX_LINES_PER_HEARTBEAT]:
            job_id = line.job_id or (active.job_id if active is not None else "")
            line.text = line.text[:MAX_LINE_CHARACTERS]
            item = jobs_pb2.WatchJobResponse(log=jobs_pb2.NodeLogLine(node=node.name, line=line))
            by_job.setdefault(job_id, []).append(item)
        for job_id, items in by_job.items():
            known = active is not None and job_id == active.job_id
            if known or (job_id and self._state.get_job(job_id) is not None):
                self._controller.notifier.append(job_id, items)

    def _job(self, job_id: str, epoch: int) -> tuple[JobRecord, ActiveJob | None]:
        """The job of a report, and its view if it is active. Raises ProtocolError for an unknown job or epoch."""
        active = self._controller.active
        if active is not None and active.job_id == job_id:
            record = active.record
        else:
            active = None
            found = self._state.get_job(job_id)
            if found is None:
                raise ProtocolError(
                    f"there is no job '{job_id[:100]}' here; was the coordinator's state directory lost?"
                )
            record = found
        if not 1 <= epoch <= record.epoch:
            raise ProtocolError(f"job {job_id} has had {record.epoch} epochs; the report speaks of epoch {epoch}")
        return record, active

    @staticmethod
    def _recipe(record: JobRecord, active: ActiveJob | None) -> Recipe:
        return active.recipe if active is not None else Recipe.model_validate_json(record.recipe_json)


def _total(values: Sequence[float]) -> float:
    """The correctly rounded sum; NaN for infinities of both signs."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan
