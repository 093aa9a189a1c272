"""Fixtures: a JobsService with canned answers behind a real gRPC server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))

from canned_jobs import CannedJobs, serving


@pytest.fixture
def jobs() -> CannedJobs:
    """What the coordinator answers; tests change it."""
    return CannedJobs()


@pytest.fixture
def address(jobs: CannedJobs) -> Iterator[str]:
    """The address of a coordinator that answers with `jobs`."""
    with serving(jobs) as found:
        yield found
