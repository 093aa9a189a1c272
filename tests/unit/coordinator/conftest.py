"""Fixtures of the coordinator's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# The tests have no package (importlib mode), so the helpers are loaded by path, under a name of their own.
_NAME = "coordinator_fakes"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("fakes.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)


@pytest.fixture(scope="session")
def transformers_imported() -> None:
    """The first import takes seconds; tests with short leases must not pay for it."""
    from coordinator_fakes import make_recipe

    from gradstream.core.model.model import inventory

    inventory(make_recipe(Path("unused")).model.config)


@pytest.fixture
async def cluster(request: pytest.FixtureRequest, tmp_path: Path, transformers_imported: None) -> AsyncIterator[Any]:
    """A coordinator; what an indirect parameter names of its timing is changed."""
    fakes = sys.modules[_NAME]
    cluster = fakes.Cluster(tmp_path, replace(fakes.TIMING, **getattr(request, "param", {})))
    await cluster.start()
    yield cluster
    await cluster.stop()
