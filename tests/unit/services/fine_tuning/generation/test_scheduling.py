"""Decisions of generation: who runs next, which prompt is computed, how long a chunk is, which batches are joined."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.services.fine_tuning.generation.scheduling import (
    FIRST_CHUNK,
    MAX_CHUNK,
    MIN_CHUNK,
    Budget,
    Need,
    Pace,
    Prompt,
    Shape,
    computed_together,
    next_join,
    next_prompt,
    next_request,
)

BUDGET = Budget(cache_bytes=6400, max_running=50)  # 400 are kept for short ones, of at most 100
SHORT, LONG = 100, 2000


def needs(*sizes: int) -> list[Need]:
    return [Need(size, float(at)) for at, size in enumerate(sizes)]


def decide(waiting: list[Need], running: list[Need], budget: Budget = BUDGET) -> tuple[int | None, str]:
    return next_request(10.0, waiting, running, sum(need.num_bytes for need in running), budget)


@pytest.mark.parametrize(
    ("waiting", "running", "index", "reason"),
    [
        ([], [LONG], None, "no request waits"),
        ([LONG], [], 0, "came 10.0 s ago, and no other long request runs"),
        ([LONG], [LONG, LONG], 0, "came 10.0 s ago and fits into the free memory"),
        ([LONG, LONG], [LONG] * 3, None, r"needs 0 MiB for keys and values; 3 running ones hold 0 MiB of 0 MiB"),
        # A short one passes long ones that wait, in the memory that is kept.
        ([LONG, SHORT], [LONG] * 3, 1, "came 9.0 s ago and fits into the memory that is kept for short requests"),
        ([LONG, SHORT], [LONG, LONG, LONG, *[SHORT] * 4], None, "the next request needs"),
        # Without a long one that waits, short ones take all memory.
        ([SHORT], [SHORT] * 40, 0, "for which no long request waits"),
        ([SHORT, LONG], [SHORT] * 40, 1, "fits into the free memory"),
        # The long ones leave what is kept free, unless short ones are in it.
        ([2200], [LONG, LONG], None, "the next request needs"),
        ([2000], [LONG, LONG, *[SHORT] * 4], 0, "fits into the free memory"),
        # One that needs more than there is runs once it is the only long one.
        ([9999], [SHORT] * 4, 0, "no other long request runs"),
        ([9999], [SHORT] * 5, None, "the next request needs"),
        ([9999], [LONG], None, "the next request needs"),
        ([SHORT], [9999], 0, "kept for short"),
        ([SHORT], [1] * 50, None, "50 requests run, the most at once"),
    ],
)
def test_who_runs_next(waiting: list[int], running: list[int], index: int | None, reason: str) -> None:
    chosen, why = decide(needs(*waiting), needs(*running))
    assert chosen == index
    assert reason in why


@given(st.lists(st.integers(1, 8000), max_size=30), st.randoms(use_true_random=False))
def test_all_run_in_the_end_and_within_the_memory(sizes: list[int], random: object) -> None:
    """Short ones come at every step; still each long one runs, in its class's order."""
    waiting = needs(*sizes)
    running: list[Need] = []
    started: list[Need] = []
    for step in range(3000):
        if step % 3 == 0:
            waiting.append(Need(1 + step % SHORT, 100.0 + step))
        while (index := decide(waiting, running)[0]) is not None:
            started.append(waiting.pop(index))
            running.append(started[-1])
        long = [need.num_bytes for need in running if not BUDGET.is_short(need)]
        total = sum(need.num_bytes for need in running)
        assert total <= BUDGET.cache_bytes or len(long) == 1
        assert total - sum(long) <= (BUDGET.cache_bytes if not long else BUDGET.cache_bytes - 100)
        if running:
            running.remove(random.choice(running))  # type: ignore[attr-defined]
        if all(need in started for need in needs(*sizes)):
            break
    else:
        raise AssertionError(f"{len(waiting)} wait")
    for is_short in (True, False):
        of_class = [need.arrived for need in started if BUDGET.is_short(need) == is_short]
        assert of_class == sorted(of_class)


def prompts(*lefts: int) -> list[Prompt]:
    return [Prompt(0, 0, left, 10, float(at)) for at, left in enumerate(lefts)]


def test_the_oldest_prompt_and_the_shortest_take_turns() -> None:
    waiting = prompts(4000, 3000, 20, 20)
    assert next_prompt(5.0, waiting, 0) == (0, "the oldest prompt, which came 5.0 s ago")
    assert next_prompt(5.0, waiting, 1) == (2, "the prompt with the fewest tokens left, 20")


def test_a_long_prompt_is_computed_while_short_ones_come_without_end() -> None:
    num_left = 4096
    for turn in range(2 * num_left // MIN_CHUNK):
        chosen, _ = next_prompt(float(turn), [Prompt(0, 0, num_left, 1, 0.0), *prompts(5, 5, 5)], turn)
        num_left -= MIN_CHUNK if chosen == 0 else 0
    assert num_left <= 0


def test_short_prompts_are_computed_together_where_padding_has_room() -> None:
    waiting = prompts(30, 500, 20, 10)
    assert computed_together(waiting, 0, 100, 1000) == [0, 3, 2]
    assert computed_together(waiting, 0, 60, 1000) == [0, 3]
    assert computed_together(waiting, 0, 100, 20) == [0, 3]  # 2 × (30 + 10) - 40 - 20
    assert computed_together(waiting, 0, 100, 19) == [0, 2]  # 2 × (30 + 10) - 40 - 30
    assert computed_together(waiting, 0, 100, 9) == [0]
    assert computed_together(waiting, 1, 100, 1000) == [1]  # it is longer than a chunk
    other = [waiting[0], dataclasses.replace(waiting[2], base=1), dataclasses.replace(waiting[3], num_done=5)]
    assert computed_together(other, 0, 100, 1000) == [0]
    assert computed_together([dataclasses.replace(waiting[3], num_done=5), waiting[0]], 0, 100, 1000) == [0]


def test_a_chunk_takes_the_time_that_it_is_given() -> None:
    pace = Pace(token_work=1000, position_work=1)
    assert pace.chunk(0, 0.1) == FIRST_CHUNK
    pace = pace.after(0, 32, 0.032)
    assert pace.seconds is not None
    for num_done in (0, 500, 4000):
        num_tokens = pace.chunk(num_done, 0.1)
        assert 0.095 < pace.work(num_done, num_tokens) * pace.seconds <= 0.1
    assert pace.chunk(4000, 0.1) < pace.chunk(0, 0.1) / 4  # tokens attend to those before them
    assert pace.chunk(0, 0.0) == pace.chunk(0, -1.0) == MIN_CHUNK
    assert pace.chunk(0, 100.0) == MAX_CHUNK
    assert Pace(1000, 0).after(0, 100, 0.124).chunk(5000, 0.124) in (99, 100)


def test_a_call_that_was_held_up_does_not_change_the_chunks() -> None:
    pace = Pace(1000, 1)
    for seconds in (0.1, 0.1, 0.1, 9.0):
        pace = pace.after(0, 100, seconds)
    assert pace.chunk(0, 0.1) in (99, 100)
    slower = pace.after(0, 100, 1.0)  # two in a row
    assert slower.chunk(0, 0.1) == MIN_CHUNK


def test_batches_are_joined_where_that_reads_less() -> None:
    one = Shape(base=0, num_rows=4, max_length=100, max_to_come=28, position_bytes=2**20, weights_bytes=2**30)
    near, far = dataclasses.replace(one, max_length=200), dataclasses.replace(one, max_length=1000, num_rows=1)
    assert next_join([one, near], 2**40) == (
        (0, 1),
        "they take 400 MiB of padding, and 1024 MiB of weights are read once",
    )
    assert next_join([one, far], 2**40)[0] is None  # 3600 MiB of padding
    assert next_join([one, near], 399 << 20)[0] is None
    assert next_join([one, one], 0)[0] == (0, 1)
    assert next_join([one, one], -5)[0] == (0, 1)
    assert next_join([one, dataclasses.replace(one, base=1)], 2**40)[0] is None
    assert next_join([one, near, one], 2**40)[0] == (0, 2)
    assert next_join([], 0)[0] is None
