"""Checkpoints of a job on disk: which exist, which to remove. Blocking; run in threads.

The disk is the truth. The newest manifest that is there is where a job goes on; if that one cannot be read the job
fails rather than silently losing the steps up to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from gradstream.coordinator.planner import CheckpointAt
from gradstream.core import checkpoint, files
from gradstream.core.errors import CheckpointError
from gradstream.proto.v1 import jobs_pb2

_DIRECTORY = re.compile(r"step-([0-9]{8,})")


def root_of(run_directory: str) -> str:
    """Where a job's checkpoints are."""
    return files.join(run_directory, "checkpoints")


def versions_on_disk(root: str) -> list[int]:
    """Versions with a manifest, readable or not, oldest first."""
    found = []
    for name in files.list_names(root):
        match = _DIRECTORY.fullmatch(name)
        if match and checkpoint.MANIFEST_NAME in files.list_names(files.join(root, name)):
            found.append(int(match[1]))
    return sorted(found)


def newest(root: str) -> tuple[CheckpointAt | None, list[int]]:
    """The checkpoint to go on from, and all versions there are. Raises CheckpointError when its manifest is damaged."""
    versions = versions_on_disk(root)
    if not versions:
        return None, []
    directory = checkpoint.directory_of(root, versions[-1])
    manifest = checkpoint.read_manifest(directory)
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
        checkpoint.remove_checkpoint(root, version)
    return removed, [version for version in versions if version not in removed]


def as_message(root: str, manifest: checkpoint.CheckpointManifest) -> jobs_pb2.Checkpoint:
    """A checkpoint as people's programs see it."""
    return jobs_pb2.Checkpoint(
        version=manifest.version,
        path=checkpoint.directory_of(root, manifest.version),
        num_bytes=manifest.num_bytes,
        state_sha256=manifest.state_sha256,
        unix_ms=manifest.unix_ms,
    )


def listing(root: str) -> list[jobs_pb2.Checkpoint]:
    """All checkpoints, oldest first. Raises CheckpointError when a manifest is damaged."""
    return [as_message(root, manifest) for manifest in checkpoint.list_checkpoints(root)]
