"""Removal of jobs that have ended: what may go, and the files that go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.replay import replayed_job
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.job_states import ENDED, STATE_WORDS
from gradstream.core.recipe.fine_tuning import KEY, with_new_key

OWN = ("checkpoints", "timeline")
"""What the cluster writes into a job's directory. An export, a log or a picture beside them is a person's."""
GOING = ".removed-"


@dataclass(frozen=True)
class JobFiles:
    """The files of a job that a removal takes away, and what it leaves in the job's directory."""

    num_bytes: int
    versions: tuple[int, ...]
    left: tuple[str, ...]


def judge_removal(record: JobRecord, others: Iterable[JobRecord], pinned: Collection[int]) -> tuple[bool, str]:
    """Decide whether a job may be removed, and say why not. `pinned` are its checkpoints that are being read."""
    name = f"job {record.job_id}"
    if record.state not in ENDED:
        return False, f"{name} is {STATE_WORDS[record.state]}; stop it first: gradstream stop {record.job_id}"
    root = checkpoints.root_of(record.run_directory)
    for other in others:
        if other.state in ENDED or other.job_id == record.job_id:
            continue
        needed = checkpoints.bases_under(root, [checkpoints.base_path(other.recipe_json)])
        if replayed_job(other) == record.job_id:
            return False, (
                f"{name} has the ledger whose rounds job {other.job_id} will compute again; wait until that one has "
                f"begun, or stop it"
            )
        if needed:
            return False, (
                f"{name} has the checkpoint of version {min(needed)} that job {other.job_id} starts from; wait until "
                f"that one has ended, or stop it"
            )
    if pinned:
        return False, f"{name} has a checkpoint, of version {min(pinned)}, that is being read; try again in a while"
    # Not parsed: a job may have failed because its recipe cannot be read any more.
    if with_new_key(json.loads(record.recipe_json)).get(KEY):
        return False, (
            f"{name} is a fine-tuning's, whose results are read from its checkpoints; the fine-tuning service still "
            f"names it, so it stays"
        )
    return True, f"{name} has ended, and nothing needs it"


def survey(run_directory: str) -> JobFiles:
    """Find out what a removal would take away. Blocking. Raises OSError."""
    directory = Path(run_directory)
    parts = [directory / name for part in OWN for name in (part, f"{GOING}{part}")]
    num_bytes = sum(
        (Path(parent) / name).lstat().st_size for part in parts for parent, _, names in os.walk(part) for name in names
    )
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    left = sorted(names - {part.name for part in parts})
    return JobFiles(num_bytes, tuple(checkpoints.versions_on_disk(checkpoints.root_of(run_directory))), tuple(left))


def set_aside(run_directory: str) -> None:
    """Rename the files that go, so that none of them is taken for a checkpoint any more. Blocking. Raises OSError."""
    for part in OWN:
        path = Path(run_directory) / part
        aside = path.with_name(f"{GOING}{part}")
        if path.exists():
            # Left by a removal that did not come to its end.
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def put_back(run_directory: str) -> None:
    """Undo `set_aside`. Blocking. Raises OSError."""
    for part in OWN:
        aside = Path(run_directory) / f"{GOING}{part}"
        if aside.exists():
            aside.rename(Path(run_directory) / part)


def remove_files(run_directory: str) -> None:
    """Remove what was set aside, and the directory if it is empty then. Blocking. Raises OSError."""
    directory = Path(run_directory)
    for part in OWN:
        aside = directory / f"{GOING}{part}"
        if aside.exists():
            shutil.rmtree(aside)
    with suppress(OSError):
        directory.rmdir()
