"""The blocking clients equal the output of `make clients` from the asyncio ones, docstrings included."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from gradstream.client import AsyncClient, AsyncFineTuningClient, Client, FineTuningClient

CLIENT = Path(__file__).parents[3] / "client"


def test_the_committed_clients_are_up_to_date(tmp_path: Path) -> None:
    command = [sys.executable, CLIENT / "generate.py", "--check", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(fresh) == {"_client.py", "_fine_tuning_client.py"}
    stale = [name for name, text in fresh.items() if (CLIENT / "gradstream" / "client" / name).read_text() != text]
    assert not stale, f"run `make clients`: {', '.join(stale)}"


@pytest.mark.parametrize(("blocking", "asyncio"), [(Client, AsyncClient), (FineTuningClient, AsyncFineTuningClient)])
def test_every_method_says_all_that_it_does(blocking: type, asyncio: type) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")} - {"address"}

    assert public(blocking) == public(asyncio)
    for name in public(blocking) - {"close"}:
        text = inspect.getdoc(getattr(blocking, name))
        assert text is not None, name
        assert "Async" not in text, name
        assert len(text) == len((inspect.getdoc(getattr(asyncio, name)) or "").replace("Async", "")), name
