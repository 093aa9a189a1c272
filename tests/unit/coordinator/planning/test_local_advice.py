"""The choice between ordinary steps and rounds: a pure function of what each way to exchange takes."""

from __future__ import annotations

import pytest

from gradstream.coordinator.planning.exchange import Pace
from gradstream.coordinator.planning.local_advice import EVERY_STEP, ROUNDS, STEPS, advise
from gradstream.core.plan.forecast import ExchangeOption

INT8, INT4, INT2 = 260 / 256, 132 / 256, 68 / 256
"""Bytes of an element."""


def options(step_seconds: float, link: float, moments: float = INT4) -> list[ExchangeOption]:
    """The options of a worker with one slot, 10 M parameters and a link of `link` Mb/s."""
    num_bytes = {"int8": INT8, "int4": INT4, "int2": INT2}

    def option(steps: int, push: str, pull: str, state: str) -> ExchangeOption:
        each = 1e7 * (num_bytes[push] + (moments if state == "shared" else 0))
        seconds = 8 * each / (1e6 * link)
        share = Pace(step_seconds, seconds, seconds).utilisation(steps or 1)
        assert share is not None
        return ExchangeOption(steps, push, pull, state, share, 2 * each / (steps or 1))

    rounds = [option(steps, *pair, state) for state in ("shared", "reset") for steps in STEPS for pair in ROUNDS]
    return [*(option(0, *pair, "") for pair in EVERY_STEP), *rounds]


@pytest.mark.parametrize(
    ("step_seconds", "link", "steps", "push"),
    [
        (10.0, 1000, 0, "int8"),  # 10 M parameters take 0.08 s each way with int8
        (2.0, 1000, 0, "int4"),  # 92.5 % with int8, 96.0 % with int4
        (1.0, 1000, 5, "int4"),  # 92.4 % with int4 and ordinary steps
        (2.0, 100, 30, "int4"),  # at 10 steps 92.4 % with int4 and 94.1 % with int2
        (2.4, 100, 10, "int2"),  # 93.6 % with int4 and 95.1 % with int2
        (1.6, 20, 100, "int4"),
        (0.1, 20, 100, "int2"),  # out of reach, so the least slow one
    ],
)
def test_the_fewest_steps_and_the_finest_codec_that_reach_the_target(
    step_seconds: float, link: float, steps: int, push: str
) -> None:
    chosen, _ = advise(options(step_seconds, link))
    assert (chosen.steps, chosen.push, chosen.inner_state) == (steps, push, "shared" if steps else "")


def test_the_reason_has_the_rivals() -> None:
    assert advise(options(2.0, 1000))[1] == (
        "ordinary steps with int4 and delta-int4: workers compute 96.0 % of the time; local steps are not needed"
    )
    assert advise(options(2.0, 100))[1].split("; ") == [
        "rounds of 30 steps with int4 and delta-int4: workers compute 97.3 % of the time",
        "of 5, 10, 30 and 100 steps the fewest that reach 95 %",
        "inner_state shared: 50 % of the bytes are moments. Without them (reset) workers compute 98.6 % of the time, "
        "but each round begins with zeros, which costs loss",
        "ordinary steps with int4 and delta-int4: workers compute 70.8 % of the time",
    ]
    too_slow = advise(options(0.1, 20))[1]
    assert "; none of 5, 10, 30 and 100 steps reaches 95 %; " in too_slow
    assert "inner_state" not in advise(options(2.0, 100, moments=0.0))[1], "SGD without momentum has no moments"
