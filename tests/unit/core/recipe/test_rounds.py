"""The versions of a job with local steps, and the steps for which they stand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.recipe.rounds import Rounds

ROUNDS = st.builds(
    lambda length, after, count: Rounds(after + length * count, length, after),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(1, 12),
)


@given(ROUNDS)
def test_versions_cover_every_step_once(rounds: Rounds) -> None:
    steps = [step for version in range(rounds.last_version) for step in rounds.steps_from(version)]
    assert steps == list(range(rounds.num_steps))
    assert rounds.steps_at(rounds.last_version) == rounds.num_steps


@given(ROUNDS, st.integers(0, 150))
def test_a_step_is_done_at_its_version_and_not_before(rounds: Rounds, step: int) -> None:
    version = rounds.version_at(step)
    assert rounds.steps_at(version) >= step
    assert version == 0 or rounds.steps_at(version - 1) < step


@given(ROUNDS, st.integers(1, 40))
def test_each_multiple_of_an_interval_is_passed_by_one_commit(rounds: Rounds, interval: int) -> None:
    passed = [version for version in range(1, rounds.last_version + 1) if rounds.passes(version, interval)]
    assert passed == sorted({rounds.version_at(step) for step in range(interval, rounds.num_steps + 1, interval)})


def test_without_local_steps_a_version_is_a_step() -> None:
    rounds = Rounds(7)
    assert rounds.last_version == 7
    assert [len(rounds.steps_from(version)) for version in range(7)] == [1] * 7
    assert [version for version in range(8) if rounds.passes(version, 3)] == [0, 3, 6]
    assert not rounds.is_round(5)
    assert not rounds.passes(6, 0)


def test_rounds_begin_after_the_ordinary_steps() -> None:
    rounds = Rounds(100, 30, 10)
    assert [rounds.is_round(version) for version in (9, 10)] == [False, True]
    assert [rounds.steps_at(version) for version in (9, 10, 11, 13)] == [9, 10, 40, 100]


def test_rounds_in_words() -> None:
    rounds = Rounds(100, 30, 10)
    assert (rounds.num_rounds, [rounds.rounds_at(version) for version in (0, 10, 11, 13)]) == (3, [0, 0, 1, 3])
    assert [rounds.commit_text(version) for version in (0, 9, 10, 12)] == ["step 0", "step 9", "round 1", "round 3"]
    assert [rounds.version_text(version) for version in (10, 11)] == ["version 10", "version 11 (step 40)"]
    plain = Rounds(7)
    assert (plain.num_rounds, plain.rounds_at(3)) == (0, 0)
    assert (plain.commit_text(3), plain.version_text(3)) == ("step 3", "version 3")


@given(
    st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
    st.integers(0, 12),
    st.integers(1, 6),
)
def test_a_slot_of_fewer_steps_uses_each_sample_once(lengths: tuple[int, int], after: int, count: int) -> None:
    length, own = lengths
    rounds = Rounds(after + length * count, length, after, (length, own))
    steps = [[step for v in range(rounds.last_version) for step in rounds.slot_steps(v, slot)] for slot in (0, 1)]
    assert [step.step for step in steps[0]] == [step.number for step in steps[0]] == list(range(rounds.num_steps))
    assert [step.number for step in steps[1]] == list(range(after + own * count))
    # Learning rates and draws: rising steps of the round, the first one at its start.
    assert [step.step for step in steps[1]] == sorted({step.step for step in steps[1]})
    for version in range(after, rounds.last_version):
        found = [step.step for step in rounds.slot_steps(version, 1)]
        assert found == [rounds.steps_at(version) + k * length // own for k in range(own)]
        assert len(found) == rounds.num_slot_steps(version, 1) == own
