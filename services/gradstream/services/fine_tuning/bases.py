"""Finds the base that a recipe names, and keeps its directory for as long as the base is used."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gradstream.core.checkpoint.manifest import MANIFEST_NAME
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.job_states import RUNNING
from gradstream.core.pretrained import base as base_model
from gradstream.core.pretrained.tokenizer import TEMPLATES_DIRECTORY, record_tokenizer
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.storage import files
from gradstream.core.storage.paths import local_of
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.threads import in_thread

MAX_FOUND = 16
_JOB = re.compile(r"job:([^@]+)(?:@(\d+))?")

_Stamp = tuple[str, int, int, int, int, int]

_found: OrderedDict[str, tuple[list[_Stamp], list[_Stamp], Base, dict[str, Any]]] = OrderedDict()
_found_lock = threading.Lock()


def find_base(path: str, title: str) -> tuple[Base, dict[str, Any]]:
    """Find the base in a directory; return it and its config.

    The base's files are hashed once, and again when one of them has changed. Raises ConfigError or CheckpointError when
    the base cannot be used.
    """
    if not files.is_local(path):
        return base_model.find_base(path, title)
    stamps = _stamps(path)  # taken before reading: a change during the read is noticed at the next call
    with _found_lock:
        known = _found.get(path)
    if known is None or (known[0], known[1]) != (stamps, _tokenizer_stamps(known[2])):
        base, config = base_model.find_base(path, title)
        elsewhere = _tokenizer_stamps(base)
        record_tokenizer(base)  # a tokenizer in another directory may have changed before its stamps were taken
        with _found_lock:
            _found[path] = known = (stamps, elsewhere, base, config)
            while len(_found) > MAX_FOUND:
                _found.popitem(last=False)
    _, _, base, config = known
    return base.model_copy(update={"title": title}), config


def looked_at(path: str) -> None:
    """Access a directory to find out whether its storage answers, before others wait for it. Blocking."""
    with suppress(Exception):  # the code that reads the directory reports errors in more detail
        files.list_names(path)


@asynccontextmanager
async def held_base(jobs: CoordinatorJobs, base_model: str) -> AsyncIterator[tuple[str, str]]:
    """Yield directory and title of the base that a recipe names.

    `base_model` is a path, `job:ID@VERSION`, or `job:ID`, which means the current version of a running job and the last
    version of any other. A job's checkpoint is not removed inside the `with` block. Raises ConfigError for an unknown
    job, CheckpointError for a job without that checkpoint.
    """
    if not base_model.startswith("job:"):
        yield base_model, base_model
        return
    match = _JOB.fullmatch(base_model)
    if match is None:
        raise ConfigError(f"base_model '{base_model}' is not of the form job:ID or job:ID@VERSION")
    if match[2] is None and (await jobs.get(match[1])).state == RUNNING:
        # The job may rest or end before the request arrives. Then its last checkpoint is the newest.
        with suppress(ConfigError, CheckpointError):
            await jobs.checkpoint(match[1])
    async with jobs.held(match[1], int(match[2]) if match[2] is not None else None) as checkpoint:
        yield checkpoint.path, f"job:{match[1]}@{checkpoint.version}"


async def keep_base(jobs: CoordinatorJobs, base_model: str, directory: Path) -> tuple[str, str]:
    """Find a base as `held_base` does, and keep a job's checkpoint in `directory`.

    The checkpoint is kept because a job removes its old checkpoints as it goes on. Files are linked, which takes no
    more room; where linking is impossible they are copied.
    """
    async with held_base(jobs, base_model) as (path, title):
        if not base_model.startswith("job:") or not files.is_local(path):
            return path, title
        try:
            await in_thread(_link, Path(path), directory)
        except FileNotFoundError:
            raise CheckpointError(f"base_model {base_model}: {path} was removed while it was being kept") from None
        return str(directory), title


def _link(source: Path, destination: Path) -> None:
    """Link a checkpoint's files, or copy them. Raises FileNotFoundError when the checkpoint is being removed."""
    shutil.rmtree(destination, ignore_errors=True)
    files.make_local_directory(destination)
    for path in sorted(source.iterdir()):
        if not path.is_file():
            continue
        with files.open_local(str(path)) as stream:
            try:
                # Links the opened file even if its name now leads to another. Only with src_dir_fd does Python follow
                # the link in /proc.
                number = stream.fileno()
                os.link(f"/proc/self/fd/{number}", destination / path.name, src_dir_fd=number)
            except OSError:
                with open(destination / path.name, "xb") as copy:
                    shutil.copyfileobj(stream, copy)
                    copy.flush()
                    os.fsync(copy.fileno())
    # A checkpoint's manifest is removed first, so while it exists all files exist.
    os.stat(source / MANIFEST_NAME)
    files.sync_directory(destination)


def _stamps(path: str) -> list[_Stamp]:
    """Stamps that change when a file of a directory, or of its templates directory, changes; empty if it is missing."""
    directory, entries = Path(local_of(path)), []
    with suppress(OSError, ValueError):  # the code that reads the directory reports errors in more detail
        entries = sorted((*directory.iterdir(), *directory.glob(f"{TEMPLATES_DIRECTORY}/*")))
    found = []
    for entry in entries:
        with suppress(OSError):  # a link that leads nowhere, or in a circle
            stat = entry.stat()
            # The change time (ctime) cannot be set back, unlike the modification time.
            found.append((str(entry), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def _tokenizer_stamps(base: Base) -> list[_Stamp]:
    """The stamps of the directory of a checkpoint's tokenizer, if that is another directory."""
    elsewhere = base.tokenizer.directory if base.tokenizer is not None else base.path
    return _stamps(elsewhere) if elsewhere != base.path and files.is_local(elsewhere) else []
