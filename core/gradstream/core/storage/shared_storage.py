"""A check that several processes see the same directory: each writes a small file there, and the others read it.

The same path proves nothing, because every machine may have its own disk there. The coordinator begins a check and
makes the directory; a node that does not find the coordinator's file sees another directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradstream.core.errors import ProtocolError
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2

COORDINATOR = "coordinator"
"""The name under which the coordinator takes part in a check."""
CURE = "let run_root be one directory, on a file system that the coordinator and all servers share"
_CHECK_ID = re.compile(r"[0-9a-f]{16,64}")
_WHO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PREFIX = ".shared-"


def path_of(directory: str, check_id: str, who: str) -> str:
    """The path of the file that participant `who` writes."""
    return files.join(directory, f"{_PREFIX}{check_id}-{who}")


def write(directory: str, check_id: str, who: str) -> None:
    """Write the file of participant `who`. Raises OSError, also when the directory is missing."""
    files.write_atomic(path_of(directory, check_id, who), lambda stream: stream.write(check_id.encode()), judged=True)


def unseen(directory: str, check_id: str, names: Iterable[str]) -> list[str]:
    """The participants among `names` whose files this process does not see. Raises OSError for an unreadable file."""
    found = []
    for who in names:
        path = path_of(directory, check_id, who)
        if files.size_of(path) != len(check_id) or files.read_bytes(path) != check_id.encode():
            found.append(who)
    return found


def answer(check: coordinator_pb2.StorageCheck) -> str:
    """Do a node's part of a check: read the others' files and write its own.

    Returns the problem, as text that follows the node's name; empty if there is none. Raises ProtocolError for a
    malformed check.
    """
    names = [*check.read, *([check.write] if check.write else [])]
    if not _CHECK_ID.fullmatch(check.check_id) or not all(map(_WHO.fullmatch, names)):
        raise ProtocolError("the check of a directory has a malformed id or malformed names")
    if not check.directory.startswith("/"):
        raise ProtocolError("the check of a directory has no absolute path")
    try:
        missed = unseen(check.directory, check.check_id, check.read)
        if missed:
            who = " and ".join("the coordinator" if name == COORDINATOR else name for name in missed)
            return f"does not see in {check.directory} what {who} wrote there"
    except OSError as error:
        return f"cannot read {check.directory} ({error.strerror or error})"
    try:
        if check.write:
            write(check.directory, check.check_id, check.write)
            if unseen(check.directory, check.check_id, check.read):
                # The check has ended meanwhile, because of another node's answer: no other process removes this file.
                files.remove(path_of(check.directory, check.check_id, check.write))
    except OSError as error:
        return f"cannot write to {check.directory} ({error.strerror or error})"
    return ""


def clean_up(directory: str, check_id: str) -> None:
    """Remove a check's files. Raises OSError.

    The coordinator's file goes first: a node that writes later sees by its absence that the check has ended.
    """
    files.remove(path_of(directory, check_id, COORDINATOR))
    for name in files.list_names(directory):
        if name.startswith(f"{_PREFIX}{check_id}-"):
            files.remove(files.join(directory, name))
