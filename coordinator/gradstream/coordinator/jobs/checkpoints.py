"""List, choose, pin and remove the checkpoints of a job on disk. These functions block; call them in threads.

A job goes on from the newest manifest on disk. If this manifest cannot be read, the job fails: an older checkpoint
would silently lose steps. If the disk lacks a checkpoint that the state knows, the job is held: the disk may not be
mounted.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager

from gradstream.coordinator.planning.planner import CheckpointAt
from gradstream.core.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    directory_of,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
)
from gradstream.core.errors import CheckpointError, UnreachableError
from gradstream.core.recipe.fine_tuning import with_new_key
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.storage import files
from gradstream.proto.v1 import jobs_pb2

CHOOSING_SECONDS = 60.0

_DIRECTORY = re.compile(r"step-([0-9]{8,})")


class Pins:
    """Checkpoints that retention keeps although there are newer ones: the start of a plan, or the input of an export.

    A caller lists the disk, chooses and pins under `choosing(root)`. Retention reads the pins and removes under the
    same lock. So no checkpoint is removed between the choice and the pin.
    """

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pins: Counter[tuple[str, int]] = Counter()

    @asynccontextmanager
    async def choosing(self, root: str) -> AsyncIterator[None]:
        """The lock for choosing or removing checkpoints under `root`.

        Raises UnreachableError when another caller holds the lock too long, because its storage does not answer.
        """
        lock = self._locks[root]
        try:
            async with asyncio.timeout(CHOOSING_SECONDS):
                await lock.acquire()
        except TimeoutError:
            raise UnreachableError(
                f"old checkpoints are being removed below {root}, whose storage has not answered for "
                f"{CHOOSING_SECONDS:g} s; check that it is mounted and its server reachable"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def pin(self, root: str, version: int) -> Callable[[], None]:
        """Keep a checkpoint until the returned function is called. A second call of that function does nothing."""
        pins = [(root, version)]
        self._pins.update(pins)

        def release() -> None:
            self._pins.subtract(pins)
            self._pins = +self._pins  # drops those with count 0
            pins.clear()

        return release

    def of(self, root: str) -> set[int]:
        """The versions pinned under a root."""
        return {version for where, version in self._pins if where == root}


def base_path(recipe_json: str) -> str:
    """Where the checkpoint or base that a job starts from lies; empty for a job that starts from its seed."""
    recipe = with_new_key(json.loads(recipe_json))
    base = (recipe.get("fine_tuning") or {}).get("base") or {}
    start = recipe.get("start_from") or {}
    return str(base.get("path") or start.get("checkpoint") or "")


def bases_under(root: str, paths: Iterable[str]) -> set[int]:
    """The versions under `root` that are the base of a job; `paths` are the bases of jobs that have not ended."""
    places = [place for path in paths if (place := place_of(path)) is not None]
    return {version for where, version in places if where == os.path.normpath(root.removeprefix("file://"))}


def place_of(path: str) -> tuple[str, int] | None:
    """The root and the version of a checkpoint's directory; None for any other path."""
    directory, name = os.path.split(os.path.normpath(path.removeprefix("file://")))
    match = _DIRECTORY.fullmatch(name)
    return (directory, int(match[1])) if match else None


def missing(root: str, on_disk: Collection[int], acknowledged: Collection[int], job_id: str) -> str:
    """Why a job must not start from the checkpoints on disk; empty when it may.

    It must not when neither the newest acknowledged checkpoint nor a newer one is on disk.
    """
    if not acknowledged or max(on_disk, default=-1) >= max(acknowledged):
        return ""
    line = (
        f"the checkpoint of version {max(acknowledged)} was written and is not there now: "
        f"{directory_of(root, max(acknowledged))}; mount or restore {root}"
    )
    return f"{line}, or `gradstream resume {job_id}` to go back to version {max(on_disk)}" if on_disk else line


def root_of(run_directory: str) -> str:
    """The directory of a job's checkpoints."""
    return files.join(run_directory, "checkpoints")


def versions_on_disk(root: str) -> list[int]:
    """The versions with a manifest, readable or not, oldest first."""
    found = []
    for name in files.list_names(root):
        match = _DIRECTORY.fullmatch(name)
        if match and MANIFEST_NAME in files.list_names(files.join(root, name)):
            found.append(int(match[1]))
    return sorted(found)


def newest(root: str) -> tuple[CheckpointAt | None, list[int]]:
    """The newest checkpoint, and all versions with one. Raises CheckpointError when its manifest is damaged."""
    versions = versions_on_disk(root)
    if not versions:
        return None, []
    directory = directory_of(root, versions[-1])
    manifest = read_manifest(directory)
    if manifest.version != versions[-1]:
        raise CheckpointError(
            f"{directory} holds version {manifest.version}; rename it back, or remove it to go back to an older one"
        )
    return CheckpointAt(manifest.version, directory), versions


def remove_old(root: str, keep: int, pinned: Collection[int]) -> tuple[list[int], list[int]]:
    """Remove all but the newest `keep` and the pinned ones; return (removed, left)."""
    versions = versions_on_disk(root)
    removed = [version for version in versions[: max(0, len(versions) - keep)] if version not in pinned]
    for version in removed:
        remove_checkpoint(root, version)
    return removed, [version for version in versions if version not in removed]


def as_message(root: str, manifest: CheckpointManifest) -> jobs_pb2.Checkpoint:
    """A checkpoint as a message for clients. Raises CheckpointError when its local steps are not valid."""
    local = manifest.local
    return jobs_pb2.Checkpoint(
        version=manifest.version,
        path=directory_of(root, manifest.version),
        num_bytes=manifest.num_bytes,
        state_sha256=manifest.state_sha256,
        unix_ms=manifest.unix_ms,
        step=Rounds(0, local.steps, local.after).steps_at(manifest.version) if local is not None else None,
    )


def listing(root: str, after: int = -1, limit: int | None = None) -> list[jobs_pb2.Checkpoint]:
    """The checkpoints of versions above `after`, oldest first, at most `limit`.

    Raises CheckpointError when a manifest is damaged.
    """
    return [as_message(root, manifest) for manifest in list_checkpoints(root, after, limit)]
