"""From what a recipe calls its base to a directory that stays."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradstream.core import base_model, files
from gradstream.core.checkpoint import MANIFEST_NAME
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.finetuning import Base
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.coordinator import Jobs
from gradstream.services.fine_tuning.threads import in_thread

MAX_FOUND = 16
MAX_TRIES = 5
_JOB = re.compile(r"job:([^@]+)(?:@(\d+))?")

_found: OrderedDict[tuple[Any, ...], tuple[Base, dict[str, Any]]] = OrderedDict()
_found_lock = threading.Lock()


def find_base(path: str, title: str) -> tuple[Base, dict[str, Any]]:
    """The base in a directory and its config. Its files are hashed once, and again when one of them has changed.

    Raises ConfigError or CheckpointError when it cannot be used.
    """
    if not files.is_local(path):
        return base_model.find_base(path, title)
    key = (path, *_stamps(path))
    with _found_lock:
        known = _found.get(key)
    if known is None:
        known = base_model.find_base(path, title)
        with _found_lock:
            _found[key] = known
            while len(_found) > MAX_FOUND:
                _found.popitem(last=False)
    base, config = known
    return base.model_copy(update={"title": title}), config


async def resolve_base(jobs: Jobs, base_model: str) -> tuple[str, str]:
    """Directory and title of what a recipe calls its base: a path, `job:ID@VERSION`, or `job:ID`, which is a running
    job's current version, and the last one of any other.

    Raises ConfigError for a job that there is not, CheckpointError for one without that checkpoint.
    """
    if not base_model.startswith("job:"):
        return base_model, base_model
    match = _JOB.fullmatch(base_model)
    if match is None:
        raise ConfigError(f"base_model '{base_model}' is not of the form job:ID or job:ID@VERSION")
    if match[2] is None and (await jobs.get(match[1])).state == jobs_pb2.JOB_STATE_RUNNING:
        # It may rest, or end, by the time that it is asked; then its last checkpoint is the newest there is.
        with suppress(ConfigError, CheckpointError):
            await jobs.checkpoint(match[1])
    checkpoint = _choose(match[1], await jobs.checkpoints(match[1]), match[2])
    return checkpoint.path, f"job:{match[1]}@{checkpoint.version}"


async def keep_base(jobs: Jobs, base_model: str, directory: Path) -> tuple[str, str]:
    """As resolve_base; a job's checkpoint is kept in `directory`, for a job removes its old ones as it goes on.

    Files are linked, so they take no more room; where that cannot be, they are copied.
    """
    for _ in range(MAX_TRIES):
        path, title = await resolve_base(jobs, base_model)
        if not base_model.startswith("job:") or not files.is_local(path):
            return path, title
        try:
            await in_thread(_link, Path(path), directory)
        except FileNotFoundError:
            # Removed since it was listed: there is a newer one.
            continue
        return str(directory), title
    raise CheckpointError(
        f"base_model {base_model}: its checkpoints are removed faster than they can be kept; pause it"
    )


def _choose(job_id: str, checkpoints: list[jobs_pb2.Checkpoint], version: str | None) -> jobs_pb2.Checkpoint:
    if not checkpoints:
        raise CheckpointError(f"job {job_id} has no checkpoint yet; wait for its first one")
    if version is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.version == int(version):
            return checkpoint
    known = ", ".join(str(checkpoint.version) for checkpoint in checkpoints)
    raise CheckpointError(f"job {job_id} has no checkpoint of version {version}; there are versions {known}")


def _link(source: Path, destination: Path) -> None:
    """Link a checkpoint's files, or copy them. Raises FileNotFoundError when it is removed meanwhile."""
    shutil.rmtree(destination, ignore_errors=True)
    files.make_local_directory(destination)
    for path in sorted(source.iterdir()):
        if not path.is_file():
            continue
        with files.open_local(str(path)) as stream:
            try:
                # The file that was opened, whatever its name leads to by now. Only with a descriptor does Python have
                # the link followed.
                number = stream.fileno()
                os.link(f"/proc/self/fd/{number}", destination / path.name, src_dir_fd=number)
            except OSError:
                with open(destination / path.name, "xb") as copy:
                    shutil.copyfileobj(stream, copy)
                    copy.flush()
                    os.fsync(copy.fileno())
    # The manifest is removed first: while it is there all files are.
    os.stat(source / MANIFEST_NAME)
    files.sync_directory(destination)


def _stamps(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file; empty when there is no such directory."""
    directory = Path(path.removeprefix("file://"))
    if not directory.is_dir():
        return []
    found = [(entry.name, entry.stat()) for entry in sorted(directory.iterdir()) if entry.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
