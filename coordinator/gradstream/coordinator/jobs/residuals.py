"""What slots keep, as part of a checkpoint: reported, still owed by a worker, or lost.

It is the codec's residual, the moments of `local.inner_state: keep`, or both; all are called the slot's residual here.
The worker that holds a slot, or held it last, owes the slot's residual. A residual is lost when this worker is gone, or
when another worker has since taken the slot over without a residual. A checkpoint does not wait for a lost residual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.nodes.membership import Membership
from gradstream.core.checkpoint.manifest import ResidualEntry
from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import coordinator_pb2

_FILE_NAME = re.compile(r"epoch-\d{4,20}-residual-slot-\d{3,10}-[A-Za-z0-9._-]{1,100}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Standing:
    """The residuals of a version: the files by slot, the slots whose residual is lost, and the workers that owe one."""

    entries: tuple[ResidualEntry, ...] = ()
    lost: tuple[int, ...] = ()
    owed: dict[int, str] = field(default_factory=dict)


def standing(active: ActiveJob, version: int, members: Membership, now: float) -> Standing:
    """The current standing of a version's residuals. `now` is the coordinator's clock; `owed` has node ids."""
    if not active.recipe.keeps_slot_state(version):
        return Standing()
    entries, lost, owed = [], [], {}
    reports = active.residuals.get(version, {})
    for slot, holder in enumerate(active.last_holders):
        report = reports.get(slot)
        if report is not None:
            entries.append(ResidualEntry(file=report.file, num_bytes=report.num_bytes, sha256=report.sha256, slot=slot))
        elif active.fresh_from.get(slot, -1) >= version or not _may_come(active, version, holder, members, now):
            lost.append(slot)
        else:
            owed[slot] = holder
    return Standing(tuple(entries), tuple(lost), owed)


def _may_come(active: ActiveJob, version: int, holder: str, members: Membership, now: float) -> bool:
    """Whether a worker can still report: it is live, or the coordinator was restarted and the worker may register.

    A worker does not report residuals of a version that the servers write without a commit.
    """
    if version == active.snapshot or active.benches.failed(holder):
        return False
    node = members.get(holder)
    return node.alive if node is not None else now < active.expect_holders_until


def check_residual(report: coordinator_pb2.ReportResidualRequest, active: ActiveJob) -> None:
    """Raise ProtocolError for a report that no worker of the active job's plan can make."""
    what = f"residual report of slot {report.slot}, version {report.version} of job {report.job_id}"
    if not active.recipe.keeps_slot_state(report.version):
        raise ProtocolError(f"{what}: slots keep nothing there")
    if (
        report.slot >= active.recipe.training.num_slots
        or not active.record.start_version < report.version <= active.rounds.last_version
    ):
        raise ProtocolError(f"{what} does not fit the plan")
    sound = _FILE_NAME.fullmatch(report.file) and _SHA256.fullmatch(report.sha256) and report.num_bytes < 2**63
    if report.file and not sound:
        raise ProtocolError(f"{what}: file name, size or sha256 cannot be right")
