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
from gradstream.core.base_tokenizer import TEMPLATES_DIRECTORY, record_tokenizer
from gradstream.core.checkpoint import MANIFEST_NAME
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.finetuning import Base
from gradstream.core.paths import local_of
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.coordinator import Jobs
from gradstream.services.fine_tuning.threads import in_thread

MAX_FOUND = 16
MAX_TRIES = 5
_JOB = re.compile(r"job:([^@]+)(?:@(\d+))?")

_Stamp = tuple[str, int, int, int, int, int]

_found: OrderedDict[str, tuple[list[_Stamp], list[_Stamp], Base, dict[str, Any]]] = OrderedDict()
_found_lock = threading.Lock()


def find_base(path: str, title: str) -> tuple[Base, dict[str, Any]]:
    """The base in a directory and its config. Its files are hashed once, and again when one of them has changed.

    Raises ConfigError or CheckpointError when it cannot be used.
    """
    if not files.is_local(path):
        return base_model.find_base(path, title)
    stamps = _stamps(path)  # before anything is read: what changes meanwhile is seen at the next look
    with _found_lock:
        known = _found.get(path)
    if known is None or (known[0], known[1]) != (stamps, _tokenizer_stamps(known[2])):
        base, config = base_model.find_base(path, title)
        elsewhere = _tokenizer_stamps(base)
        record_tokenizer(base)  # that of another directory may have changed before its stamps were taken
        with _found_lock:
            _found[path] = known = (stamps, elsewhere, base, config)
            while len(_found) > MAX_FOUND:
                _found.popitem(last=False)
    _, _, base, config = known
    return base.model_copy(update={"title": title}), config


def looked_at(path: str) -> None:
    """Look at a directory, so that one whose storage hangs is known to before others wait for it. Blocking."""
    with suppress(Exception):  # who reads it says it better
        files.list_names(path)


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


def _stamps(path: str) -> list[_Stamp]:
    """What changes when a file of a directory, or of one in it, does; empty when there is no such directory."""
    directory = Path(local_of(path))
    if not directory.is_dir():
        return []
    found = []
    for entry in sorted((*directory.iterdir(), *directory.glob(f"{TEMPLATES_DIRECTORY}/*"))):
        with suppress(FileNotFoundError):  # a link that leads nowhere
            stat = entry.stat()
            # The time of change cannot be set back, unlike that of modification.
            found.append((str(entry), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def _tokenizer_stamps(base: Base) -> list[_Stamp]:
    """The same of the directory that a checkpoint's tokenizer comes from, where that is another."""
    elsewhere = base.tokenizer.directory if base.tokenizer is not None else base.path
    return _stamps(elsewhere) if elsewhere != base.path and files.is_local(elsewhere) else []
