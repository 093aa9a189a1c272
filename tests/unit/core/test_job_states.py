"""How a job's state and its reason are put together."""

from __future__ import annotations

import pytest

from gradstream.core.job_states import after_state


@pytest.mark.parametrize(
    ("state", "reason", "text"),
    [
        ("paused", "paused at version 23", "paused at version 23"),
        ("stopped", "stopped at version 3, with a checkpoint", "stopped at version 3, with a checkpoint"),
        ("running", "epoch 1 from version 0", "running: epoch 1 from version 0"),
        ("queued", "", "queued"),
        ("failed", "failedness", "failed: failedness"),
    ],
)
def test_a_state_is_not_said_twice(state: str, reason: str, text: str) -> None:
    assert state + after_state(state, reason) == text
