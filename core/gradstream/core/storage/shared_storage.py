"""Proof that several processes see one directory: each writes a small file there, and the others read it.

A path alone proves nothing: every machine may have a disk of its own under it. The coordinator begins a check and makes
the directory; a node that does not find it has another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradstream.core.errors import ProtocolError
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2

COORDINATOR = "coordinator"
"""Whose file the coordinator's is."""
CURE = "let run_root be one directory, on a file system that the coordinator and all servers share"
_CHECK_ID = re.compile(r"[0-9a-f]{16,64}")
_WHO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PREFIX = ".shared-"


def path_of(directory: str, check_id: str, who: str) -> str:
    """The file of one of those who take part."""
    return files.join(directory, f"{_PREFIX}{check_id}-{who}")


def write(directory: str, check_id: str, who: str) -> None:
    """Show that one can write there. Raises OSError, also where the directory is not."""
    files.write_atomic(path_of(directory, check_id, who), lambda stream: stream.write(check_id.encode()), judged=True)


def unseen(directory: str, check_id: str, names: Iterable[str]) -> list[str]:
    """Those whose files are not seen from here. Raises OSError when one cannot be read."""
    found = []
    for who in names:
        path = path_of(directory, check_id, who)
        if files.size_of(path) != len(check_id) or files.read_bytes(path) != check_id.encode():
            found.append(who)
    return found


def answer(check: coordinator_pb2.StorageCheck) -> str:
    """A node's part: read the others' files, write one's own; what is wrong, in words that follow the node's name.

    Raises ProtocolError for a check that no coordinator asks for.
    """
    names = [*check.read, *([check.write] if check.write else [])]
    if not _CHECK_ID.fullmatch(check.check_id) or not all(map(_WHO.fullmatch, names)):
        raise ProtocolError("a check of a directory that has no sound id, or no sound names")
    if not check.directory.startswith("/"):
        raise ProtocolError("a check of a directory without an absolute path")
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
                # The check ended meanwhile, by another node's answer: nobody else would remove this file.
                files.remove(path_of(check.directory, check.check_id, check.write))
    except OSError as error:
        return f"cannot write to {check.directory} ({error.strerror or error})"
    return ""


def clean_up(directory: str, check_id: str) -> None:
    """Remove a check's files; the coordinator's first, so that a node that writes later sees that the check has ended.

    Raises OSError.
    """
    files.remove(path_of(directory, check_id, COORDINATOR))
    for name in files.list_names(directory):
        if name.startswith(f"{_PREFIX}{check_id}-"):
            files.remove(files.join(directory, name))
