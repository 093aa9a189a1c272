"""Decides what is generated next, as pure functions that return a decision and its reason.

Memory: a row reserves the keys and values of its prompt and of all tokens that it may generate, so no row is ever
stopped for lack of memory. Requests are admitted in the order in which they came, in two classes. A part of the memory
is kept for short requests, so that a short one need not wait for long ones. While a long one waits, short ones get no
more than that part, so that a long one need not wait without end.

Time: the running rows get a token each, and then prompts are computed in chunks, for as long as the streams may pause.
The oldest prompt and the one with the fewest tokens left take turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Of the memory for keys and values, for short requests alone.
KEPT_SHARE = 1 / 16
# A request is short when a quarter of that part is enough for it.
SHORT_SHARE = KEPT_SHARE / 4
# A step of the running streams aims at this. The rest up to the 0.1 s that people may notice is for what the estimate
# of a chunk's time is off by.
STEP_SECONDS = 0.06
# While there is no stream that could pause. A new request waits for the end of a chunk.
CHUNK_SECONDS = 0.2
FIRST_CHUNK = 32
MIN_CHUNK = 16
MAX_CHUNK = 2048
# A call of the model takes about as long as this many tokens more would: the weights are read for any number of tokens.
CALL_TOKENS = 24
RECENT_CALLS = 3
# Reading this many bytes takes about as long as a call of the model takes beside its arithmetic.
CALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Need:
    """A request's memory for keys and values in bytes, and when it came in seconds."""

    num_bytes: int
    arrived: float


@dataclass(frozen=True)
class Budget:
    """Memory for the keys and values of all rows, and the number of rows that may run at once."""

    cache_bytes: int
    max_running: int

    @property
    def kept_bytes(self) -> int:
        """The part for short requests alone."""
        return int(self.cache_bytes * KEPT_SHARE)

    def is_short(self, need: Need) -> bool:
        """Return whether a request may use the part that is kept for short ones."""
        return need.num_bytes <= self.cache_bytes * SHORT_SHARE


def next_request(
    now: float, waiting: Sequence[Need], running: Sequence[Need], held_bytes: int, budget: Budget
) -> tuple[int | None, str]:
    """Decide which waiting request runs next. Returns its index, or None, and the reason.

    `waiting` is in the order in which the requests came. `held_bytes` is what the running rows reserve, with the
    padding of rows that are computed together.
    """
    if not waiting:
        return None, "no request waits"
    if len(running) >= budget.max_running:
        return None, f"{len(running)} requests run, the most at once"
    short = [need.num_bytes for need in running if budget.is_short(need)]
    num_long, free_bytes = len(running) - len(short), budget.cache_bytes - held_bytes
    long_waits = any(not budget.is_short(need) for need in waiting)
    seen: set[bool] = set()
    for index, need in enumerate(waiting):
        is_short = budget.is_short(need)
        if is_short in seen:
            continue
        seen.add(is_short)
        age = f"came {now - need.arrived:.1f} s ago"
        if is_short:
            if sum(short) + need.num_bytes <= budget.kept_bytes:
                return index, f"{age} and fits into the memory that is kept for short requests"
            if not long_waits and need.num_bytes <= free_bytes:
                return index, f"{age} and fits into the free memory, for which no long request waits"
        elif num_long == 0 and sum(short) <= budget.kept_bytes:
            return index, f"{age}, and no other long request runs"
        elif need.num_bytes <= free_bytes - max(0, budget.kept_bytes - sum(short)):
            return index, f"{age} and fits into the free memory"
    first = waiting[0]
    return None, (
        f"the next request needs {_mib(first.num_bytes)} for keys and values; {len(running)} running ones hold "
        f"{_mib(held_bytes)} of {_mib(budget.cache_bytes)}"
    )


@dataclass(frozen=True)
class Prompt:
    """A prompt of a running row that is not computed yet."""

    base: int  # equal for rows that can be computed together
    num_done: int
    num_left: int
    num_new: int  # the most tokens that are generated after it
    arrived: float


def next_prompt(now: float, prompts: Sequence[Prompt], turn: int) -> tuple[int, str]:
    """Decide which prompt is computed next: in even turns the oldest, in odd ones that with the fewest tokens left.

    So a short prompt waits for at most two chunks of long ones, and the oldest one gets every second chunk at least.
    """
    oldest = min(range(len(prompts)), key=lambda index: prompts[index].arrived)
    if turn % 2 == 0:
        return oldest, f"the oldest prompt, which came {now - prompts[oldest].arrived:.1f} s ago"
    fewest = min(range(len(prompts)), key=lambda index: (prompts[index].num_left, prompts[index].arrived))
    return fewest, f"the prompt with the fewest tokens left, {prompts[fewest].num_left}"


def computed_together(prompts: Sequence[Prompt], chosen: int, num_tokens: int, spare_positions: int) -> list[int]:
    """Find the prompts that are computed whole in one call with the chosen one; the chosen one is the first.

    All of them with their padding are at most `num_tokens`, and what their rows then reserve, with the padding, is at
    most `spare_positions` more than what they need.
    """
    first = prompts[chosen]
    together = [chosen]
    if first.num_done > 0 or first.num_left > num_tokens:
        return together
    others = [index for index in range(len(prompts)) if index != chosen]
    for index in sorted(others, key=lambda index: (prompts[index].num_left, prompts[index].arrived)):
        prompt = prompts[index]
        if prompt.base != first.base or prompt.num_done > 0:
            continue
        joined = [*(prompts[other] for other in together), prompt]
        longest = max(one.num_left for one in joined)
        reserved = len(joined) * (longest + max(one.num_new for one in joined))
        padding = reserved - sum(one.num_left + one.num_new for one in joined)
        if len(joined) * longest <= num_tokens and padding <= max(0, spare_positions):
            together.append(index)
    return together


@dataclass(frozen=True)
class Pace:
    """How fast prompts of a base are computed: seconds a unit of work in each of the last calls.

    A token's work is `token_work`, and `position_work` for each token before it, which it attends to. A call by itself
    has the work of CALL_TOKENS tokens.
    """

    token_work: float
    position_work: float
    recent: tuple[float, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The median of the last calls, which one that was held up does not change; None before the first call."""
        return sorted(self.recent)[len(self.recent) // 2] if self.recent else None

    def work(self, num_done: int, num_tokens: int) -> float:
        """The work of a number of tokens after those that are done."""
        own = num_tokens * (self.token_work + self.position_work * (num_done + num_tokens / 2))
        return own + CALL_TOKENS * self.token_work

    def after(self, num_done: int, num_tokens: int, seconds: float) -> Pace:
        """Take a call's time into account."""
        return replace(self, recent=(*self.recent, seconds / self.work(num_done, num_tokens))[-RECENT_CALLS:])

    def chunk(self, num_done: int, seconds: float) -> int:
        """The number of tokens that are computed in about so many seconds."""
        if not self.seconds:
            return FIRST_CHUNK
        work = max(0.0, seconds / self.seconds - CALL_TOKENS * self.token_work)
        each = self.token_work + self.position_work * num_done
        # The positive root of a quadratic equation, in the form that is exact also without position_work.
        fitting = 2 * work / (each + math.sqrt(each * each + 2 * self.position_work * work))
        return min(max(MIN_CHUNK, int(fitting)), MAX_CHUNK)


@dataclass(frozen=True)
class Shape:
    """A batch: its base, its rows, and the most columns that they will have."""

    base: int  # equal for batches that can be joined
    num_rows: int
    max_length: int
    max_to_come: int
    position_bytes: int
    weights_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The peak of its keys and values, with the padding."""
        return self.num_rows * (self.max_length + self.max_to_come) * self.position_bytes

    def joined(self, other: Shape) -> Shape:
        """The shape of both together."""
        return replace(
            self,
            num_rows=self.num_rows + other.num_rows,
            max_length=max(self.max_length, other.max_length),
            max_to_come=max(self.max_to_come, other.max_to_come),
        )


def next_join(batches: Sequence[Shape], spare_bytes: int) -> tuple[tuple[int, int] | None, str]:
    """Decide which two batches become one. Returns their indices, or None, and the reason.

    A step of a batch reads the weights once. So two batches become one when the padding that this takes is less to read
    than the weights, and is at most `spare_bytes`.
    """
    best: tuple[int, int] | None = None
    least = 0
    for left, one in enumerate(batches):
        for right in range(left + 1, len(batches)):
            other = batches[right]
            if one.base != other.base:
                continue
            padding = one.joined(other).peak_bytes - one.peak_bytes - other.peak_bytes
            if padding > max(0, spare_bytes) or padding > one.weights_bytes + CALL_BYTES:
                continue
            if best is None or padding < least:
                best, least = (left, right), padding
    if best is None:
        return None, "no two batches take less padding than weights"
    weights = _mib(batches[best[0]].weights_bytes)
    return best, f"they take {_mib(least)} of padding, and {weights} of weights are read once"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
