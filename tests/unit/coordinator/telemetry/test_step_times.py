"""The breakdown of a step's time: parts that add up, the right bottleneck, and no figures of incomplete steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.telemetry.step_times import (
    NUM_OPEN_STEPS,
    NUM_STEPS,
    Measured,
    StepWindow,
    breakdown,
    measure,
)
from gradstream.core.recipe.local import LocalConfig
from gradstream.core.recipe.recipe import CodecConfig
from gradstream.proto.v1.coordinator_pb2 import StepTimes

CODEC = CodecConfig()


def times(
    compute: int = 600, weights: int = 0, send: int = 0, rest: int = 10, other: int = 0, slots: int = 1
) -> StepTimes:
    """In milliseconds."""
    return StepTimes(
        period_us=1000 * (compute + weights + send + rest + other),
        compute_us=1000 * compute,
        weights_us=1000 * weights,
        send_us=1000 * send,
        rest_us=1000 * rest,
        push_bytes_per_second=1e6,
        pull_bytes_per_second=2e6,
        num_slots=slots,
    )


def window(*workers: StepTimes, num_steps: int = 4) -> StepWindow:
    made = StepWindow()
    for version in range(num_steps + NUM_OPEN_STEPS):
        for number, each in enumerate(workers):
            made.add(f"worker-{number}", 1, version, each)
    return made


MS = st.integers(0, 5000)


@given(st.lists(st.builds(times, MS, MS, MS, MS, MS), min_size=1, max_size=5), st.integers(1, 40))
def test_the_parts_add_up_to_each_workers_period(workers: list[StepTimes], num_steps: int) -> None:
    found = breakdown(window(*workers, num_steps=num_steps), CODEC, 8)
    assert found is not None
    assert found.num_steps == min(num_steps, NUM_STEPS)
    parts = ("compute", "weights", "send", "slots", "servers", "other")
    for each, asked in zip(found.workers, workers, strict=True):
        assert sum(getattr(each.parts, f"{part}_seconds") for part in parts) == pytest.approx(asked.period_us / 1e6)
        assert each.parts.slots_seconds >= 0
    total = sum(each.period_us for each in workers) / 1e6 / len(workers)
    assert sum(getattr(found.mean, f"{part}_seconds") for part in parts) == pytest.approx(total)
    assert found.advice


def test_the_worker_that_waits_least_is_the_one_that_others_wait_for() -> None:
    found = breakdown(window(times(rest=410), times(compute=1000, rest=10)), CODEC, 8)
    assert found is not None
    assert found.slowest_worker == "worker-1"
    assert [round(worker.parts.slots_seconds, 3) for worker in found.workers] == [0.4, 0]
    assert found.mean.servers_seconds == pytest.approx(0.01)
    assert found.advice.startswith(
        "the others wait for worker-1, which computes 1.00 s a step where they compute 0.60 s"
    )


@pytest.mark.parametrize(
    ("workers", "codec", "advice"),
    [
        ([times()], CODEC, "compute sets the pace: more workers (up to 8 share a step) would help"),
        ([times()] * 8, CODEC, "compute sets the pace: faster workers would help"),
        ([times(send=300, weights=200)] * 2, CODEC, "the network sets the pace: codec.push=int4 sends half"),
        ([times(send=900)] * 2, CodecConfig(push="int4"), "the network sets the pace: a larger training.global_batch"),
        ([times(rest=300)] * 2, CODEC, "the servers set the pace: another parameter server would help"),
    ],
)
def test_the_advice_follows_from_the_largest_part(workers: list[StepTimes], codec: CodecConfig, advice: str) -> None:
    found = breakdown(window(*workers), codec, 8)
    assert found is not None
    assert found.advice.startswith(advice)


def test_the_slowest_link_is_named_with_its_rates() -> None:
    found = breakdown(window(times(), times(send=200)), CODEC, 8)
    assert found is not None
    assert found.slowest_link == "worker-1: 8 Mb/s up, 16 Mb/s down"
    fast = times(send=200)
    fast.push_bytes_per_second, fast.pull_bytes_per_second = 205e6, 124.9e6
    found = breakdown(window(fast), CODEC, 8)
    assert found is not None
    assert found.slowest_link == "worker-0: 1.6 Gb/s up, 999 Mb/s down"
    none = breakdown(window(times(), times()), CODEC, 8)
    assert none is not None
    assert not none.slowest_link


def test_steps_that_not_all_have_reported_do_not_count() -> None:
    made = window(times(), times(compute=900), num_steps=0)
    assert breakdown(made, CODEC, 8) is None
    for version in range(10, 20):
        made.add("worker-0", 1, version, times(compute=10))
    found = breakdown(made, CODEC, 8)
    assert found is not None
    assert found.num_steps == NUM_OPEN_STEPS
    assert found.mean.compute_seconds == pytest.approx(0.75)


def test_an_epoch_that_was_replaced_is_forgotten() -> None:
    made = window(times())
    made.add("worker-9", 2, 3, times())
    made.add("worker-0", 1, 9, times())
    assert breakdown(made, CODEC, 8) is None
    assert measure([]) == Measured()


def test_a_slow_server_is_named() -> None:
    slow = times(rest=400)
    slow.server_us.extend([100_000, 350_000, 120_000])
    found = breakdown(window(slow, slow), CODEC, 8, ["a", "b", "c"])
    assert found is not None
    assert found.slowest_server == "b: contributions are under way for 0.35 s, to the others for 0.11 s"
    even = times(rest=400)
    even.server_us.extend([100_000, 120_000, 120_000])
    none = breakdown(window(even), CODEC, 8, ["a", "b", "c"])
    assert none is not None
    assert not none.slowest_server


def test_the_times_of_rounds_are_apart_from_those_of_steps() -> None:
    made = StepWindow()
    for version in range(4):
        made.add("worker-0", 1, version, times())
    local = LocalConfig(steps=30)
    for version in range(4, 9):
        round_times = times(compute=18_000, send=9000)
        round_times.round_steps = 30
        made.add("worker-0", 1, version, round_times)
    found = breakdown(made, CODEC, 8, (), local)
    assert found is not None
    assert (found.num_steps, found.round_steps, found.mean.compute_seconds) == (3, 30, 18.0)
    assert found.advice == "the network sets the pace: more local.steps than 30 make exchanges rarer"
    plain = breakdown(window(times(send=300)), CODEC, 8, (), local)
    assert plain is not None
    assert (plain.round_steps, plain.advice) == (0, "the network sets the pace: codec.push=int4 sends half the bytes")
