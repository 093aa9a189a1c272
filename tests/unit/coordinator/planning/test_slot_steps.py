"""How many inner steps each slot takes: by the speeds of the workers, once in a job."""

from __future__ import annotations

import pytest
from support.micro import micro_plan

from gradstream.coordinator.planning.forecast import forecast
from gradstream.coordinator.planning.needs import NodeOffer
from gradstream.coordinator.planning.slot_steps import choose_slot_steps, with_slot_steps
from gradstream.core.model.profile import SegmentProfile


def workers(*speeds: float) -> list[NodeOffer]:
    return [NodeOffer(f"w-{n}.00", f"w-{n}", "", 0, speed) for n, speed in enumerate(speeds)]


@pytest.mark.parametrize(
    ("speeds", "num_slots", "expected"),
    [
        ((2.0, 1.0), 2, (30, 15)),
        ((1.0, 2.0), 4, (30, 15, 30, 15)),
        ((1.0, 0.86), 2, (30, 30)),
        ((1.0, 0.84), 2, (30, 25)),
        ((4.0, 2.0, 1.8), 3, (30, 15, 15)),
        ((1.0, 0.001), 2, (30, 1)),
        ((1.0, 0.5, 0.1), 2, (30, 15)),  # only as many workers as slots count
        ((3.0,), 2, (30, 30)),
        ((1.0, 0.0), 2, (30, 30)),
        ((), 2, (30, 30)),
    ],
)
def test_a_slot_takes_steps_by_the_speed_of_its_worker(
    speeds: tuple[float, ...], num_slots: int, expected: tuple[int, ...]
) -> None:
    assert choose_slot_steps(num_slots, 30, workers(*speeds))[0] == expected


@pytest.mark.parametrize(
    ("speeds", "reason"),
    [
        ((2.0, 1.0), "slot steps: 30, 15 inner steps of at most 30 a round; w-0 has 1.00 of the highest speed, its "),
        ((2.0, 1.9), "because the speeds of 2 workers are alike"),
        ((2.0, 0.0), "because of w-1 no speed is known"),
        ((2.0,), "because one worker computes"),
    ],
)
def test_the_reason_names_the_speeds(speeds: tuple[float, ...], reason: str) -> None:
    assert reason in choose_slot_steps(2, 30, workers(*speeds))[1]


def test_a_decided_job_keeps_its_numbers() -> None:
    recipe = micro_plan(sections={"local": {"steps": 6, "slot_steps": "auto"}}, num_steps=12).recipe
    assert recipe.rounds.slot_lengths == ()
    decided, reasons = with_slot_steps(recipe, workers(1.0, 0.5))
    assert decided.rounds.slot_lengths == (6, 3)
    assert list(reasons) == ["slot steps"]
    assert with_slot_steps(decided, workers(1.0, 1.0)) == (decided, {})
    again = type(decided).model_validate_json(decided.model_dump_json())
    assert again.rounds.slot_lengths == (6, 3)


def test_the_forecast_has_the_utilisation_of_each_worker() -> None:
    profile = SegmentProfile("all", (), 0, 0.5, 1.0, 0.0, 0.0, 0, 0, 0, True)
    speeds = workers(1.0, 0.5)

    def told(slot_steps: list[int]) -> tuple[str, float, float]:
        plan = micro_plan(sections={"local": {"steps": 6, "slot_steps": slot_steps}}, num_steps=12)
        found = forecast(plan, {}, [profile], [], speeds, 1e12)
        assert found.compute_seconds is not None
        assert found.tokens_per_second is not None
        return found.reasons["utilisation"], found.compute_seconds, found.tokens_per_second

    # A slot's inner step is 2 microbatches of 1.5 s; the slow worker takes twice as long, for half of the steps.
    line, compute, tokens = told([6, 3])
    assert line == (
        "utilisation: w-0 computes 100.0 % of the time, with slot 0; w-1 computes 100.0 % of the time, with slot 1"
    )
    assert compute == pytest.approx(18.0)
    assert tokens == pytest.approx((6 + 3) * 4 * 8 / 18.0, rel=1e-3)
    line, compute, _ = told([3, 6])
    assert "w-0 computes 100.0 % of the time, with slot 1" in line
    line, compute, _ = told([6, 5])
    assert compute == pytest.approx(30.0)
    assert "w-0 computes 60.0 % of the time, with slot 0" in line
