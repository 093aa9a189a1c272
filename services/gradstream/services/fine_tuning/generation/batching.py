"""Generates for many requests at once, token by token, as `scheduling` decides.

A step gives every running row a token. In the time that is left, prompts are computed, in chunks if they are long.
Between two steps rows that are done or cancelled leave and free their memory, and waiting requests join. Rows of one
base are computed together, in one batch, or in several when their lengths differ much.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch

from gradstream.core.errors import GradstreamError, UnreachableError, one_line
from gradstream.core.foreign import panics_caught
from gradstream.services.fine_tuning.generation import scheduling
from gradstream.services.fine_tuning.generation.batch import Batch
from gradstream.services.fine_tuning.generation.models import ServedModels
from gradstream.services.fine_tuning.generation.resident import ResidentBase, check_request_fits
from gradstream.services.fine_tuning.generation.rows import UNFINISHED, Piece, Row

# Choosing a row's token and its text take 0.1 ms or more, one row after the other, so that a step of more rows would
# make the streams pause.
MAX_RUNNING = 256


@dataclass(frozen=True)
class EngineLimits:
    """Limits of concurrent generation."""

    max_batch: int = MAX_RUNNING  # rows that run at once, if the memory for their keys and values is enough
    max_waiting: int = 64
    cache_bytes: int = 1 << 30  # keys and values of all rows; a single row may exceed it
    memory_bytes: int | None = None  # what a base and the keys and values of a single row may take; None: any


@dataclass(frozen=True)
class EngineStatus:
    """Numbers of running and waiting requests."""

    num_running: int
    num_waiting: int


@dataclass(frozen=True)
class CacheStatus:
    """Memory for keys and values."""

    held_bytes: int  # what the running rows reserve
    budget_bytes: int
    reason: str = ""  # why the next request waits; empty when none does


@dataclass(eq=False)
class _Running:
    """Rows that generate, in one batch."""

    batch: Batch
    resident: ResidentBase
    rows: list[Row]
    tokens: list[int] = field(default_factory=list)  # each row's last token, which the model has not processed yet

    def shape(self) -> scheduling.Shape:
        return scheduling.Shape(
            base=id(self.resident),
            num_rows=len(self.rows),
            max_length=max(self.batch.lengths),
            max_to_come=max(row.num_to_come for row in self.rows),
            position_bytes=self.resident.position_bytes,
            weights_bytes=self.resident.num_bytes,
        )


@dataclass(eq=False)
class _Prompt:
    """An admitted row whose prompt is not computed yet, or only its first tokens, which the batch then holds."""

    row: Row
    resident: ResidentBase
    batch: Batch
    num_done: int = 0

    def shape(self) -> scheduling.Prompt:
        request = self.row.request
        left = len(request.prompt_ids) - self.num_done
        return scheduling.Prompt(id(self.resident), self.num_done, left, request.max_new_tokens, self.row.arrived)


class Batcher:
    """The queue and the batches. Any thread may submit and cancel; one thread steps."""

    def __init__(self, models: ServedModels, limits: EngineLimits, clock: Callable[[], float] = time.monotonic):
        self._models = models
        self._limits = limits
        self._budget = scheduling.Budget(limits.cache_bytes, limits.max_batch)
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running: list[_Running] = []
        self._prompts: list[_Prompt] = []
        self._paces: WeakKeyDictionary[ResidentBase, scheduling.Pace] = WeakKeyDictionary()
        self._turn = 0
        self._num_running = 0
        self._cache = CacheStatus(0, limits.cache_bytes)
        self._closed = False

    def submit(self, row: Row) -> None:
        """Put a request at the end of the queue. Raises UnreachableError when it is full or the service is ending."""
        with self._changed:
            if self._closed:
                raise UnreachableError("the service is ending; retry when it is back")
            num_waiting = sum(not waiting.patient for waiting in self._waiting)
            if not row.patient and num_waiting >= self._limits.max_waiting:
                raise UnreachableError(
                    f"busy: {self._num_running} requests are being generated and {num_waiting} wait already; try "
                    f"again later"
                )
            row.arrived = self._clock()
            self._waiting.append(row)
            self._changed.notify()

    def cancel(self, row: Row) -> None:
        """Cancel a request: the row leaves before the next token. Harmless when the row is done."""
        with self._changed:
            row.cancelled = True
            if row in self._waiting:
                self._waiting.remove(row)
            self._changed.notify()

    def status(self) -> EngineStatus:
        """The numbers of running and waiting requests."""
        with self._changed:
            return EngineStatus(self._num_running, len(self._waiting))

    def cache(self) -> CacheStatus:
        """The memory for keys and values, as of the last step."""
        with self._changed:
            return self._cache if self._waiting else replace(self._cache, reason="")

    def close(self) -> None:
        """Take no more requests; `wait` returns False from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self) -> bool:
        """Wait until there is work to do. Returns False after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running or self._prompts)
            return not self._closed

    def abandon(self) -> None:
        """End all requests with an error. Called after `close`, by the thread that steps."""
        error = UnreachableError("the service ended before the text did; retry when it is back")
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for row in left:
            row.deliver(error)
        for running in list(self._running):
            self._fail(running, error)
        self._fail_prompts(list(self._prompts), error)

    def step(self) -> None:
        """Compute one token for every row, and prompts in the time left. Before, rows leave and requests join."""
        self._drop_cancelled()
        self._admit()
        begin = self._clock()
        for running in list(self._running):
            self._advance(running, self._next_tokens)
        self._compute_prompts(begin)
        self._join_batches()
        self._forget_empty()
        with self._changed:
            self._cache = replace(self._cache, held_bytes=self._held_bytes())

    # -- requests ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting requests run while there is memory for them."""
        while True:
            with self._changed:
                waiting = list(self._waiting)
            running = [row.need for row in self._rows()]
            index, reason = scheduling.next_request(
                self._clock(), [row.need for row in waiting], running, self._held_bytes(), self._budget
            )
            if index is None:
                break
            row = waiting[index]
            try:
                resident = self._models.acquire(row.served)
                if resident is not None and (memory_bytes := self._limits.memory_bytes) is not None:
                    try:
                        check_request_fits(
                            row.request.num_positions, resident.position_bytes, resident.num_bytes, memory_bytes
                        )
                    except GradstreamError:
                        self._models.release(row.served, resident)
                        raise
            except GradstreamError as error:
                self._take(row)
                row.deliver(error)
                continue
            if resident is None:
                reason = "the models of the running requests leave no memory for the next request's model"
                break
            if not self._take(row):
                self._models.release(row.served, resident)
                continue
            self._prompts.append(_Prompt(row, resident, Batch(resident)))
            with self._changed:
                self._num_running += 1
        with self._changed:
            self._cache = replace(self._cache, reason=reason if self._waiting else "")

    def _rows(self) -> list[Row]:
        return [row for running in self._running for row in running.rows] + [one.row for one in self._prompts]

    def _held_bytes(self) -> int:
        batches = sum(running.shape().peak_bytes for running in self._running if running.rows)
        return batches + sum(prompt.row.need.num_bytes for prompt in self._prompts)

    def _spare_bytes(self) -> int:
        """Memory for the padding of rows that are computed together."""
        return self._budget.cache_bytes - self._budget.kept_bytes - self._held_bytes()

    def _take(self, row: Row) -> bool:
        """Remove a request from the queue. Returns False when it was cancelled in the meantime."""
        with self._changed:
            if row not in self._waiting:
                return False
            self._waiting.remove(row)
            return True

    # -- prompts ----------------------------------------------------------------------------------------------------

    def _compute_prompts(self, begin: float) -> None:
        """Compute prompts, or chunks of them, while the step that began at `begin` has time; one call at least."""
        step_seconds = scheduling.STEP_SECONDS if self._running else scheduling.CHUNK_SECONDS
        while self._prompts:
            shapes = [prompt.shape() for prompt in self._prompts]
            chosen, _ = scheduling.next_prompt(self._clock(), shapes, self._turn)
            self._turn += 1
            first = self._prompts[chosen]
            resident = first.resident
            seconds = begin + step_seconds - self._clock()
            num_tokens = self._pace(resident).chunk(first.num_done, seconds)
            spare = self._spare_bytes() // resident.position_bytes
            indices = scheduling.computed_together(shapes, chosen, num_tokens, spare)
            self._compute([self._prompts[index] for index in indices], num_tokens)
            if begin + step_seconds - self._clock() < step_seconds / 4:
                break

    def _compute(self, prompts: list[_Prompt], num_tokens: int) -> None:
        """Compute the next tokens of prompts. Rows whose prompts are complete become a batch that generates."""
        resident, num_done = prompts[0].resident, prompts[0].num_done
        begin = self._clock()
        try:
            with panics_caught():
                num_computed, logits_BV = _extended(prompts, num_tokens)
        except Exception as error:
            self._fail_prompts(prompts, _known(error))
            return
        self._paces[resident] = self._pace(resident).after(num_done, num_computed, self._clock() - begin)
        if all(prompt.num_done == len(prompt.row.request.prompt_ids) for prompt in prompts):
            self._prompts = [prompt for prompt in self._prompts if prompt not in prompts]
            rows = [prompt.row for prompt in prompts]
            running = _Running(prompts[0].batch, resident, rows, [0] * len(rows))
            self._running.append(running)
            self._advance(running, partial(self._take_all, logits_BV))

    def _pace(self, resident: ResidentBase) -> scheduling.Pace:
        known = self._paces.get(resident)
        return known or scheduling.Pace(float(resident.num_parameters), float(resident.attention_width))

    def _join_batches(self) -> None:
        """Make one batch of those for which this is faster."""
        while True:
            batches = [running for running in self._running if running.rows]
            pair, _ = scheduling.next_join([running.shape() for running in batches], self._spare_bytes())
            if pair is None:
                return
            mine, other = batches[pair[0]], batches[pair[1]]
            mine.rows += other.rows
            mine.tokens += other.tokens
            other.rows, other.tokens = [], []
            self._advance(mine, partial(_absorb, absorbed=other.batch))

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _next_tokens(self, running: _Running) -> None:
        self._take_all(running.batch.step(running.tokens), running)

    def _take_all(self, logits_BV: torch.Tensor, running: _Running) -> None:
        """Choose the next token of every row. Rows that are done leave before their pieces are sent."""
        done: set[int] = set()
        said: list[tuple[Row, Piece | GradstreamError]] = []
        for index, logits_V in enumerate(logits_BV):
            row = running.rows[index]
            try:
                with panics_caught():
                    token = row.choose(logits_V)
                    piece = row.take(token)
            except Exception as error:
                done.add(index)
                said.append((row, _known(error)))
                continue
            running.tokens[index] = token
            if piece is not None:
                if piece.finish_reason != UNFINISHED:
                    done.add(index)
                said.append((row, piece))
        try:
            self._keep_others(running, done)
        finally:
            for row, piece_or_error in said:
                row.deliver(piece_or_error)

    # -- leaving ----------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        cancelled = [prompt for prompt in self._prompts if prompt.row.cancelled]
        self._remove_prompts(cancelled)
        for running in list(self._running):
            leaving = {index for index, row in enumerate(running.rows) if row.cancelled}
            self._advance(running, partial(self._keep_others, leaving=leaving))
        self._forget_empty()

    def _forget_empty(self) -> None:
        """Drop empty batches: a batch keeps its base in memory."""
        self._running = [running for running in self._running if running.rows]

    def _advance(self, running: _Running, action: Callable[[_Running], None]) -> None:
        """Apply an action to a batch. An error ends the rows of this batch only."""
        try:
            with panics_caught():
                action(running)
        except Exception as error:
            self._fail(running, _known(error))

    def _fail(self, running: _Running, error: GradstreamError) -> None:
        for row in running.rows:
            self._leave(row, running.resident)
            row.deliver(error)
        running.rows, running.tokens = [], []
        self._forget_empty()

    def _fail_prompts(self, prompts: Sequence[_Prompt], error: GradstreamError) -> None:
        self._remove_prompts(prompts)
        for prompt in prompts:
            prompt.row.deliver(error)

    def _remove_prompts(self, prompts: Sequence[_Prompt]) -> None:
        self._prompts = [prompt for prompt in self._prompts if prompt not in prompts]
        for prompt in prompts:
            self._leave(prompt.row, prompt.resident)

    def _keep_others(self, running: _Running, leaving: set[int]) -> None:
        if not leaving:
            return
        kept = [index for index in range(len(running.rows)) if index not in leaving]
        for index in leaving:
            self._leave(running.rows[index], running.resident)
        running.rows = [running.rows[index] for index in kept]
        running.tokens = [running.tokens[index] for index in kept]
        running.batch.keep(kept)

    def _leave(self, row: Row, resident: ResidentBase) -> None:
        self._models.release(row.served, resident)
        with self._changed:
            self._num_running -= 1


def _extended(prompts: Sequence[_Prompt], num_tokens: int) -> tuple[int, torch.Tensor]:
    """Compute the next tokens of a prompt, or several whole prompts, in the first one's batch.

    Returns the number of tokens that a row's work is counted for, and the logits after the last ones, shape (B, V).
    """
    first = prompts[0]
    if len(prompts) > 1 or first.num_done == 0:
        chunks = [prompt.row.request.prompt_ids[:num_tokens] for prompt in prompts]
        longest = max(len(prompt.row.request.prompt_ids) for prompt in prompts)
        logits_BV = first.batch.join(chunks, [prompt.row.served.adapter for prompt in prompts], longest)
        for prompt, chunk in zip(prompts, chunks, strict=True):
            prompt.num_done = len(chunk)
        return len(chunks) * max(map(len, chunks)), logits_BV
    chunk = first.row.request.prompt_ids[first.num_done : first.num_done + num_tokens]
    logits_BV = first.batch.extend([chunk])
    first.num_done += len(chunk)
    return len(chunk), logits_BV


def _absorb(running: _Running, absorbed: Batch) -> None:
    running.batch.absorb(absorbed)


def _known(error: Exception) -> GradstreamError:
    if isinstance(error, GradstreamError):
        return error
    return GradstreamError(
        f"generating failed ({one_line(error)}); try again with a shorter prompt, or see the service's log"
    )
