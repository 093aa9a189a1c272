"""The limit on a process's open files (RLIMIT_NOFILE), which is also the limit on its connections."""

from __future__ import annotations

RESERVED_FILES = 128
"""Open files of a process beside its peers' connections: libraries, logs, the state, checkpoints, people's calls."""
FEW_FILES = 1024 + RESERVED_FILES
"""With fewer a coordinator or server cannot have 1,024 peers."""
MAX_RAISED_FILES = 1 << 20
"""The limit is raised no further: some programs walk over all numbers up to it when they start a child."""
CURE = (
    "raise the hard limit of open files where it runs (`ulimit -Hn`, LimitNOFILE= of systemd, --ulimit nofile= of "
    "docker) and start it again"
)


def max_open_files() -> int:
    """How many files this process may have open at the same time; 0 if that is not limited or not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else int(soft)


def raise_limit() -> int:
    """Raise the soft limit of this process to the hard limit; return `max_open_files` after that."""
    try:
        import resource
    except ImportError:
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_RAISED_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_RAISED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            pass  # a kernel may have a lower limit of its own, as that of macOS
    return max_open_files()


def shortage(limit: int, num_peers: int, peers: str) -> str:
    """Judge whether a process with `limit` (of `max_open_files`) open files can have a connection of each peer.

    Return the cause and the cure in one line, empty if it can. `peers` names the peers, such as "200 workers".
    """
    if not limit or num_peers + RESERVED_FILES <= limit:
        return ""
    return f"may have only {limit} files open at the same time, and {peers} connect to it; {CURE}"
