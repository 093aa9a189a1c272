"""The job of an earlier `gradstream dev`: where its coordinator's state lies, and what it says."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstream.coordinator.state.state import JobRecord
    from gradstream.core.recipe.recipe import Recipe

STATE = "state"
DATABASE = "coordinator.sqlite"
KEPT = (STATE, "fine-tuning")
"""What of a local cluster's directory is kept with the job's files."""


@dataclass(frozen=True)
class EarlierRun:
    """A job and the directory, of the job or of a `gradstream dev` that was killed, that holds its state."""

    record: JobRecord
    recipe: Recipe
    directory: Path

    @property
    def run_directory(self) -> Path:
        """The directory of the job's files."""
        return Path(self.record.run_directory)

    def move_state(self, directory: Path) -> None:
        """Move the state to the directory of a new local cluster; nothing of a cluster that was killed stays."""
        for name in KEPT:
            if (self.directory / name).is_dir():
                os.replace(self.directory / name, directory / name)
        if self.directory != self.run_directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def cluster_directory(run_root: Path, process_id: int) -> Path:
    """Where the local cluster of a process keeps its files, until they are moved to the job's."""
    return run_root / f".dev-{process_id}"


def find_earlier_run(job: str, run_root: Path) -> EarlierRun:
    """The run of a job, given by its id or its directory. Raises ConfigError that says what is missing."""
    from gradstream.coordinator.state.sqlite import SqliteState
    from gradstream.core.errors import ConfigError
    from gradstream.core.recipe.loading import parse_recipe
    from gradstream.core.storage.state_lock import lock_directory

    named = Path(job).expanduser().absolute()
    run_directory = named if named.is_dir() else run_root / job
    # A `dev` that was killed had no time to move its state to the job's directory.
    for directory in (run_directory, *sorted(run_directory.parent.glob(".dev-*"))):
        if not (directory / STATE / DATABASE).is_file():
            continue
        if directory != run_directory and _is_of_another(directory, run_directory.name):
            continue
        with lock_directory(directory / STATE, "coordinator"):
            state = SqliteState(directory / STATE)
            try:
                record = state.get_job(run_directory.name)
            finally:
                state.close()
        if record is not None:
            return EarlierRun(record, parse_recipe(record.recipe_json), directory)
    if not run_directory.is_dir():
        raise ConfigError(
            f"there is no job directory {run_directory}; name the job, with --run-root where its directory is not "
            f"below ./runs, or name its directory"
        )
    raise ConfigError(
        f"{run_directory} holds no state of job {run_directory.name}; only a job that `gradstream dev` has run goes on "
        f"with --resume. On a cluster: gradstream resume {run_directory.name}"
    )


def _is_of_another(directory: Path, job_id: str) -> bool:
    """Whether the state of a killed `dev` does not know a job. A state that is in use is looked at too: reading one
    changes nothing."""
    import sqlite3
    from contextlib import closing

    try:
        with closing(sqlite3.connect(f"file:{directory / STATE / DATABASE}?mode=ro", uri=True)) as db:
            return db.execute("SELECT 1 FROM jobs WHERE job_id = ?", (job_id,)).fetchone() is None
    except sqlite3.Error:
        return True
