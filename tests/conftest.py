"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.cluster import Cluster, running
from support.tiny import prepare_tiny_data

# A shell that exports it would break the lines which tests read.
os.environ.pop("COLUMNS", None)
# A first call compiles kernels and a busy machine pauses: how long an example takes says nothing about it. The same
# examples each time, so that a run that fails fails again; `make fuzz` looks for new ones.
settings.register_profile(
    "gradstream", deadline=None, print_blob=True, derandomize="GRADSTREAM_FUZZ_EXAMPLES" not in os.environ
)
settings.load_profile("gradstream")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes with one thread, as recipes have it by default: for small models more threads cost more than they
    bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small prepared data set; not to be changed."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without processes yet; what a test starts is ended after it."""
    with running(tmp_path / "cluster") as cluster:
        yield cluster
