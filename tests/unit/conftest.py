"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from subprocess import CompletedProcess

import pytest
from support.warm_children import WarmChildren

from gradstream.coordinator.planning import inventory

Child = Callable[[str, str], CompletedProcess[bytes]]

_start_child: Child = inventory._run_child


@pytest.fixture(scope="session", autouse=True)
def warm_children() -> Iterator[None]:
    """Children that build and measure models are forks of one process that has imported transformers."""
    children = WarmChildren()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "_run_child", children.run)
        yield
    children.close()


@pytest.fixture
def start_child() -> Child:
    """How a coordinator starts such a child."""
    return _start_child


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Two files are tested at a time, and each has a core."""
