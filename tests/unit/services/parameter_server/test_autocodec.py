"""`codec: auto`: the search is a pure function of measured times, and never settles on a codec slower than bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.services.parameter_server.autocodec import (
    LADDER,
    TRIAL_STEPS,
    AutoState,
    Speeds,
    after_step,
    choose,
    predict,
)

SIZES = {"bf16": 4.0e7, "int8": 2.0e7, "int4": 1.05e7}


def walk(seconds_of: dict[str, float], compute: float, num_steps: int = 60, link: float = 1e7) -> list[AutoState]:
    """The states of a search in which each codec's steps take `seconds_of` it."""
    states = [AutoState()]
    for _ in range(num_steps):
        speeds = Speeds(compute, link, link)
        states.append(after_step(states[-1], seconds_of[states[-1].codec], speeds, SIZES))
    return states


def test_it_measures_bf16_first() -> None:
    states = walk({"bf16": 4.0, "int8": 2.0, "int4": 1.0}, compute=0.2)
    assert [state.codec for state in states[: TRIAL_STEPS + 1]] == ["bf16"] * (TRIAL_STEPS + 1)
    assert states[TRIAL_STEPS + 1].codec != "bf16"


def test_a_slow_link_leads_to_the_coarsest_codec_and_says_why() -> None:
    last = walk({"bf16": 4.0, "int8": 2.1, "int4": 1.2}, compute=0.2)[-1]
    assert (last.codec, last.settled) == ("int4", True)
    assert "bf16 4.00 s" in last.reason and "int4 1.20 s" in last.reason and "10 MB/s" in last.reason  # noqa: PT018


def test_it_stays_with_bf16_where_compute_hides_everything() -> None:
    states = walk({"bf16": 1.0, "int8": 1.0, "int4": 1.0}, compute=0.99)
    assert {state.codec for state in states} == {"bf16"}
    assert states[-1].settled


def test_it_falls_back_when_a_codec_does_not_keep_its_promise() -> None:
    # Encoding costs more than the link: slower in spite of fewer bytes.
    last = walk({"bf16": 1.0, "int8": 1.1, "int4": 1.3}, compute=0.3)[-1]
    assert (last.codec, last.settled) == ("bf16", True)


def test_it_takes_the_middle_when_the_coarsest_disappoints() -> None:
    last = walk({"bf16": 4.0, "int8": 2.0, "int4": 5.0}, compute=0.2)[-1]
    assert (last.codec, last.settled) == ("int8", True)


def test_a_link_that_changes_leads_to_another_search() -> None:
    settled = walk({"bf16": 4.0, "int8": 2.1, "int4": 1.2}, compute=0.2)[-1]
    calm = after_step(settled, 1.2, Speeds(0.2, 1.5e7, 1.5e7), SIZES)
    assert calm.settled
    again = after_step(settled, 1.2, Speeds(0.2, 1e8, 1e8), SIZES)
    assert (again.codec, again.settled, again.took) == ("bf16", False, ())
    assert "10.0 times faster" in again.reason


def test_the_first_step_of_a_trial_does_not_count() -> None:
    state = AutoState()
    for seconds in [1000.0] + [1.0] * TRIAL_STEPS:
        state = after_step(state, seconds, Speeds(0.9, 1e9, 1e9), SIZES)
    assert dict(state.took)["bf16"] == 1.0


@given(
    st.fixed_dictionaries({codec: st.floats(0.01, 100) for codec in LADDER}),
    st.floats(0.0, 100),
    st.floats(1e3, 1e10),
)
def test_it_always_settles_and_never_on_what_was_slower_than_bf16(
    seconds_of: dict[str, float], compute: float, link: float
) -> None:
    last = walk(seconds_of, compute, link=link)[-1]
    assert last.settled
    assert seconds_of[last.codec] <= seconds_of["bf16"]


@pytest.mark.parametrize("compute", [0.0, 0.5, 2.0])
def test_a_prediction_changes_only_what_compute_did_not_hide(compute: float) -> None:
    assert predict(1.0, compute, 4.0, 1.0) == pytest.approx(min(1.0, compute) + max(0.0, 1.0 - compute) / 4)


def test_what_was_measured_counts_more_than_what_was_promised() -> None:
    codec, reason = choose({"bf16": 1.0, "int8": 0.99, "int4": 0.5}, 0.0, SIZES)
    assert codec == "int4"
    assert "promises" not in reason
    assert choose({"bf16": 1.0}, 0.0, SIZES)[0] == "int4"


def test_a_state_is_a_value() -> None:
    state = AutoState()
    after_step(state, 1.0, Speeds(0.1, 1e6, 1e6), SIZES)
    assert state == replace(AutoState())
