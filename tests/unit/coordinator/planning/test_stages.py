"""The cut of a model into stages."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.planning.stages import SegmentCost, StageOffer, cut_stages
from gradstream.core.errors import ConfigError


def segments_of(seconds: list[float], held: int = 10, activation: int = 1) -> list[SegmentCost]:
    return [SegmentCost(f"segment{number}", value, held, activation) for number, value in enumerate(seconds)]


def offers_of(count: int, memory: int = 0, speed: float = 1.0, live: int = 1) -> list[StageOffer]:
    return [StageOffer(f"worker-{number}", speed, memory, live) for number in range(count)]


def test_a_heavy_head_gets_fewer_layers_beside_it() -> None:
    found, reason = cut_stages(segments_of([0.1, *[1.0] * 8, 3.0]), offers_of(2))
    assert found.ends == (6, 10)
    assert found.segments == (range(6), range(6, 10))
    assert found.seconds == pytest.approx((5.1, 6.0))
    assert reason == "stage 1 on worker-1 is the slowest with 6 s a microbatch, 1.08 times the mean"


def test_a_slow_worker_gets_less() -> None:
    offers = [StageOffer("fast", 3.0, 0, 1), StageOffer("slow", 1.0, 0, 1)]
    assert cut_stages(segments_of([1.0] * 8), offers)[0].ends == (6, 8)


def test_memory_comes_before_speed_and_early_stages_hold_more_activations() -> None:
    segments = segments_of([1.0] * 8, held=10, activation=5)
    # A segment takes 10 + 3 * 5 bytes on the first worker, which has room for two of them, and 15 on the second.
    offers = [StageOffer("small", 1.0, 60, 3), StageOffer("large", 1.0, 0, 1)]
    found, _ = cut_stages(segments, offers)
    assert found.ends == (2, 8)
    assert found.num_bytes == (50, 90)


def test_what_cannot_fit_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(ConfigError) as caught:
        cut_stages(segments_of([1.0] * 4, held=100, activation=0), offers_of(2, memory=150))
    assert str(caught.value) == (
        "worker worker-0 needs 200 bytes for stage 0 (segment0 to segment1, activations of 1 at once) but offers 150 "
        "(50 missing)"
    )


def test_more_stages_than_segments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 2 segments \(segment0, segment1\), too few for 3 stages"):
        cut_stages(segments_of([1.0, 1.0]), offers_of(3))


@given(data=st.data())
def test_no_other_cut_is_better(data: st.DataObject) -> None:
    num_segments = data.draw(st.integers(1, 7))
    num_stages = data.draw(st.integers(1, num_segments))
    number = st.integers(0, 9)
    segments = [
        SegmentCost(str(i), data.draw(number) / 4, data.draw(number), data.draw(number)) for i in range(num_segments)
    ]
    offers = [
        StageOffer(
            str(i), data.draw(st.sampled_from([0.5, 1.0, 2.0])), data.draw(st.integers(0, 60)), data.draw(number)
        )
        for i in range(num_stages)
    ]

    def lacking(ends: tuple[int, ...]) -> list[int]:
        found = []
        for offer, begin, end in zip(offers, (0, *ends), ends, strict=False):
            need = sum(
                segment.held_bytes + offer.live_activations * segment.activation_bytes
                for segment in segments[begin:end]
            )
            found.append(max(0, need - offer.memory_bytes) if offer.memory_bytes else 0)
        return found

    def slowest(ends: tuple[int, ...]) -> float:
        return max(
            sum(segment.seconds for segment in segments[begin:end]) / offer.speed
            for offer, begin, end in zip(offers, (0, *ends), ends, strict=False)
        )

    every = [(*inner, num_segments) for inner in combinations(range(1, num_segments), num_stages - 1)]
    fitting = [ends for ends in every if not any(lacking(ends))]
    if not fitting:
        with pytest.raises(ConfigError, match=f"{min(max(lacking(ends)) for ends in every):,} missing"):
            cut_stages(segments, offers)
        return
    found, _ = cut_stages(segments, offers)
    assert found.ends in fitting
    assert slowest(found.ends) == pytest.approx(min(map(slowest, fitting)))
    assert max(found.seconds) == pytest.approx(slowest(found.ends))
