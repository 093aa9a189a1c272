"""The fine-tuning service's durable state: one directory a fine-tuning under its state directory.

STATE/lock
STATE/fine-tunings/NAME/record.json    replaced as a whole, so a kill at any moment leaves the old or the new one
STATE/fine-tunings/NAME/prompts.json   held-out prompts to complete
STATE/fine-tunings/NAME/data-N/        the N-th attempt at preparing the data
    STATE/fine-tunings/NAME/base/          the base, where it is a job's checkpoint
STATE/uploads/                         files of examples that were sent
STATE/temporary/                       exports and uploads under way; emptied when the service starts
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gradstream.core.errors import ConfigError, GradstreamError, one_line
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.storage import files, paths
from gradstream.core.storage.state_lock import lock_directory

RECORD_NAME = "record.json"
DATA_PREFIX = "data-"
MAX_REASON_CHARACTERS = 2000

State = Literal["preparing", "training", "evaluating", "finished", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("finished", "failed", "cancelled")


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Completed(_Stored):
    """A prompt and a model's completion."""

    prompt: str
    expected: str
    generated: str


class Completions(_Stored):
    """A model's completions of the held-out prompts."""

    num_prompts: int = 0
    num_exact: int = 0
    samples: tuple[Completed, ...] = ()


class Record(_Stored):
    """A fine-tuning. `job_recipe_json` is stored before the job is submitted, `job_id` afterwards."""

    name: str
    created_unix_ms: int
    recipe_json: str
    request_id: str = ""
    """The id of the request that created it; empty if it had none."""
    state: State = "preparing"
    reason: str = ""
    base: Base | None = None
    num_trained_parameters: int = 0
    examples: dict[str, Any] | None = None
    job_recipe_json: str = ""
    job_id: str = ""
    losses: dict[int, float] = {}
    """Validation loss by version, in nats a target token; only finite losses."""
    checkpoints: dict[int, str] = {}
    """Directory of the checkpoint, by version."""
    patience: int = 0
    best_version: int | None = None
    pushed_bytes_per_step: int = 0
    before: Completions | None = None
    after: Completions | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the fine-tuning has ended; only resuming changes it then."""
        return self.state in ENDED

    def changed(self, **changes: Any) -> Record:
        """Return this record with other values."""
        if "reason" in changes:
            changes["reason"] = changes["reason"][:MAX_REASON_CHARACTERS]
        return self.model_copy(update=changes)


class UnwrittenError(GradstreamError):
    """A record cannot be written now. The old record stays unchanged."""


class Store:
    """The records, in memory and on disk. Methods block for as long as it takes to write a small file.

    Methods that write raise UnwrittenError when the disk is full or fails.
    """

    def __init__(self, directory: Path):
        """Loads the records. Raises ConfigError when another service holds the directory or a record is damaged."""
        self.root = directory
        paths.own(str(directory))
        self._lock = lock_directory(directory, "fine-tuning service")
        try:
            self.uploads.mkdir(exist_ok=True)
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(exist_ok=True)
            self._records_root.mkdir(exist_ok=True)
            self._records = {
                record.name: record for record in map(_read, sorted(self._records_root.iterdir())) if record is not None
            }
        except OSError as error:
            self.close()
            raise ConfigError(f"the state directory {directory} cannot be used ({error}); choose another") from None
        except BaseException:
            self.close()
            raise

    @property
    def uploads(self) -> Path:
        """The directory of uploaded files of examples."""
        return self.root / "uploads"

    @property
    def temporary(self) -> Path:
        """The directory of exports and uploads under way."""
        return self.root / "temporary"

    @property
    def _records_root(self) -> Path:
        return self.root / "fine-tunings"

    def close(self) -> None:
        """Release the directory."""
        self._lock.close()

    def directory(self, name: str) -> Path:
        """A fine-tuning's directory."""
        return self._records_root / name

    def repeated(self, request_id: str, recipe_json: str) -> Record | None:
        """Find the record that a request created, None if there is none. Raises ConfigError if its recipe differs."""
        made = next((record for record in self.all() if record.request_id == request_id), None) if request_id else None
        if made is not None and made.recipe_json != recipe_json:
            raise ConfigError(
                f"request id {request_id} is that of '{made.name}', which has another recipe; take a new id for each "
                f"fine-tuning"
            )
        return made

    def all(self) -> list[Record]:
        """List all records, newest first."""
        return sorted(self._records.values(), key=lambda record: (record.created_unix_ms, record.name), reverse=True)

    def get(self, name: str) -> Record | None:
        """Get a record by its name, or None."""
        return self._records.get(name)

    def create(self, record: Record) -> None:
        """Add a record durably; the directory of an older one of its name is removed."""
        made = self.temporary / f"{record.name}-{secrets.token_hex(4)}"
        with self._explained(record):
            try:
                made.mkdir()
                _write(made, record)
            except OSError:
                shutil.rmtree(made, ignore_errors=True)
                raise
            self._records.pop(record.name, None)
            if self.directory(record.name).exists():
                # The old directory is moved away first: a kill in between leaves no record rather than a part of one.
                old = self.temporary / f"{record.name}-{secrets.token_hex(4)}"
                self.directory(record.name).rename(old)
                shutil.rmtree(old, ignore_errors=True)
            made.rename(self.directory(record.name))
            files.sync_directory(self._records_root)
        self._records[record.name] = record

    def save(self, record: Record) -> None:
        """Replace a record durably."""
        with self._explained(record):
            _write(self.directory(record.name), record)
        self._records[record.name] = record

    @contextmanager
    def _explained(self, record: Record) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnwrittenError(
                f"the record of '{record.name}' cannot be written to {self.root} ({one_line(error)}); free space or "
                f"repair the disk"
            ) from None

    def next_data_directory(self, name: str) -> Path:
        """Choose the directory for the next preparation of the data. Remains of interrupted attempts are removed."""
        found = [path for path in self.directory(name).iterdir() if path.name.startswith(DATA_PREFIX)]
        numbers = [int(match[1]) for path in found if (match := re.fullmatch(rf"{DATA_PREFIX}(\d+)", path.name))]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return self.directory(name) / f"{DATA_PREFIX}{max(numbers, default=0) + 1}"


def _write(directory: Path, record: Record) -> None:
    text = record.model_dump_json(indent=1)
    files.write_atomic(str(directory / RECORD_NAME), lambda stream: stream.write(text.encode()))


def _read(directory: Path) -> Record | None:
    path = directory / RECORD_NAME
    try:
        record = Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        cause = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
        raise ConfigError(f"{path} is damaged ({cause}); restore it, or move {directory} away") from None
    if record.name != directory.name:
        raise ConfigError(f"{path} is the record of '{record.name}'; give {directory} its old name")
    return record


def submission_id(record: Record) -> str:
    """The request id for submitting a fine-tuning's job, the same for every service that submits it."""
    told = f"{record.name}/{record.created_unix_ms}/{record.job_recipe_json}"
    return hashlib.sha256(told.encode()).hexdigest()
