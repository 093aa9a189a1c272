"""The states of a job: their numbers on the wire, their names for people, and the states in which a job has ended."""

from __future__ import annotations

from gradstream.proto.v1 import jobs_pb2

QUEUED = jobs_pb2.JOB_STATE_QUEUED
PLANNING = jobs_pb2.JOB_STATE_PLANNING
RUNNING = jobs_pb2.JOB_STATE_RUNNING
PAUSED = jobs_pb2.JOB_STATE_PAUSED
FINISHED = jobs_pb2.JOB_STATE_FINISHED
FAILED = jobs_pb2.JOB_STATE_FAILED
STOPPED = jobs_pb2.JOB_STATE_STOPPED

LIVE = (QUEUED, PLANNING, RUNNING, PAUSED)
"""A job in one of these states has not ended."""
ENDED = (FINISHED, FAILED, STOPPED)
"""A job in one of these states makes no more steps unless it is resumed."""

STATE_WORDS = {
    QUEUED: "queued",
    PLANNING: "planning",
    RUNNING: "running",
    PAUSED: "paused",
    FINISHED: "finished",
    FAILED: "failed",
    STOPPED: "stopped",
}


def after_state(state: str, reason: str) -> str:
    """Return what follows a state's word: `: REASON`, or only the rest of a reason that begins with the word itself."""
    if reason.startswith(f"{state} "):
        return reason.removeprefix(state)
    return f": {reason}" if reason else ""
