"""Chooses the requests that are generated together, token by token.

Requests wait in the order in which they came. Between any two tokens, rows that are done or cancelled leave their
batch, and the requests at the head of the queue join while there is room: rows, memory for keys and values, and memory
for their base and adapter. A request that cannot join yet is not overtaken, so none waits without end. Each base in use
has one batch, and the batches compute their next token in turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from gradstream.core.errors import GradstreamError, UnreachableError, one_line
from gradstream.core.foreign import panics_caught
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.generation.batch import Batch, peak_positions
from gradstream.services.fine_tuning.generation.models import BaseFacts, Served, ServedModels
from gradstream.services.fine_tuning.generation.resident import ResidentBase
from gradstream.services.fine_tuning.generation.sampling import choose
from gradstream.services.fine_tuning.generation.text_stream import TextStream, special_tokens

UNFINISHED = pb.FINISH_REASON_UNSPECIFIED


@dataclass(frozen=True)
class GenerationRequest:
    """A request to complete a prompt."""

    model: str  # a name among the served models
    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    seed: int = 0
    stop: tuple[str, ...] = ()  # the completion ends before the first of these


@dataclass(frozen=True)
class Piece:
    """The next piece of a completion. Only the last piece has a finish reason."""

    text: str
    num_tokens: int  # tokens generated so far, without the one that ends the text
    finish_reason: pb.FinishReason.ValueType = UNFINISHED


@dataclass(frozen=True)
class EngineLimits:
    """Limits of concurrent generation."""

    max_batch: int = 8
    max_waiting: int = 64
    cache_bytes: int = 1 << 30  # keys and values of all rows; a single row may exceed it


@dataclass(frozen=True)
class EngineStatus:
    """Numbers of running and waiting requests."""

    num_running: int
    num_waiting: int


@dataclass(eq=False)
class Row:
    """A request while it is served."""

    request: GenerationRequest
    served: Served
    facts: BaseFacts
    deliver: Callable[[Piece | GradstreamError], None]  # called by the compute thread
    patient: bool = False  # may wait beyond max_waiting: the caller bounds the number of patient requests
    cancelled: bool = False
    num_tokens: int = 0
    text: TextStream = field(init=False)
    stop_ids: frozenset[int] = field(init=False)  # stop texts that are special tokens, which have no text
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        special = special_tokens(self.facts.tokenizer)
        self.stop_ids = frozenset(special[text] for text in request.stop if text in special)
        texts = [text for text in request.stop if text not in special]
        self.text = TextStream(self.facts.tokenizer, request.prompt_ids, texts)
        self.generator = torch.Generator().manual_seed(request.seed)

    def choose(self, logits_V: torch.Tensor) -> int:
        """Choose the next token."""
        return choose(logits_V, self.request.temperature, self.request.top_p, self.generator)

    def take(self, token: int) -> Piece | None:
        """Return the piece that can be shown after `token`, or None if there is no new text."""
        if token in self.facts.end_ids:
            return self._last(self.text.flush(), pb.FINISH_REASON_END_OF_TEXT)
        if token in self.stop_ids:
            return self._last(self.text.flush(), pb.FINISH_REASON_STOP)
        self.num_tokens += 1
        text = self.text.push(token)
        if self.text.stopped:
            return Piece(text, self.num_tokens, pb.FINISH_REASON_STOP)
        if self.num_tokens >= self.request.max_new_tokens:
            return self._last(text + self.text.flush(), pb.FINISH_REASON_LENGTH)
        return Piece(text, self.num_tokens) if text else None

    def _last(self, text: str, reason: pb.FinishReason.ValueType) -> Piece:
        return Piece(text, self.num_tokens, pb.FINISH_REASON_STOP if self.text.stopped else reason)


@dataclass(eq=False)
class _Running:
    """The batch of one base."""

    batch: Batch
    resident: ResidentBase
    rows: list[Row] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # each row's last token, which the model has not processed yet

    def peak_bytes(self, joining: list[Row]) -> int:
        """Peak bytes of keys and values if these rows join."""
        now = [
            (length, row.request.max_new_tokens - row.num_tokens)
            for length, row in zip(self.batch.lengths, self.rows, strict=True)
        ]
        new = [(len(row.request.prompt_ids), row.request.max_new_tokens) for row in joining]
        return peak_positions(now + new) * self.resident.position_bytes


class Batcher:
    """The queue and the batches. Any thread may submit and cancel; one thread steps."""

    def __init__(self, models: ServedModels, limits: EngineLimits):
        self._models = models
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running: list[_Running] = []
        self._num_running = 0
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

    def close(self) -> None:
        """Take no more requests; `wait` returns False from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self) -> bool:
        """Wait until there is work to do. Returns False after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
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
        self._running.clear()

    def step(self) -> None:
        """Compute one token for every row. Rows that are done or cancelled leave; requests join while there is room."""
        self._advance_each(self._drop_cancelled)
        self._forget_empty()
        joining = self._admit()
        self._advance_each(self._next_tokens)
        for running, rows in joining:
            self._advance(running, partial(self._first_tokens, rows))
        # Not earlier: a batch whose last rows have ended may be about to get new rows.
        self._forget_empty()

    def _forget_empty(self) -> None:
        """Drop empty batches. Called before requests are admitted, too: a batch keeps its base in memory."""
        self._running = [running for running in self._running if running.rows]

    def _advance_each(self, action: Callable[[_Running], None]) -> None:
        for running in list(self._running):
            if running.rows:
                self._advance(running, action)

    def _admit(self) -> list[tuple[_Running, list[Row]]]:
        """Take requests from the head of the queue while there is room."""
        joining: dict[_Running, list[Row]] = {}
        while True:
            with self._changed:
                if not self._waiting or self._num_running >= self._limits.max_batch:
                    break
                row = self._waiting[0]
            try:
                resident = self._models.acquire(row.served)
            except GradstreamError as error:
                self._take_first(row)
                row.deliver(error)
                continue
            if resident is None:
                break
            running = next((one for one in self._running if one.resident is resident), None)
            fresh = running or _Running(Batch(resident), resident)
            planned = {one: joining.get(one, []) for one in [*self._running, fresh]}
            planned[fresh] = [*planned[fresh], row]
            needed = sum(one.peak_bytes(rows) for one, rows in planned.items())
            taken = (self._num_running == 0 or needed <= self._limits.cache_bytes) and self._take_first(row)
            if not taken:
                self._models.release(row.served, resident)
                if row.cancelled:
                    continue
                break
            joining[fresh] = planned[fresh]
            if running is None:
                self._running.append(fresh)
            with self._changed:
                self._num_running += 1
        return list(joining.items())

    def _take_first(self, row: Row) -> bool:
        """Remove the head of the queue. Returns False when it was cancelled in the meantime."""
        with self._changed:
            if not self._waiting or self._waiting[0] is not row:
                return False
            self._waiting.popleft()
            return True

    def _advance(self, running: _Running, action: Callable[[_Running], None]) -> None:
        """Apply an action to a batch. An error ends the rows of this batch only."""
        try:
            with panics_caught():
                action(running)
        except Exception as error:
            known = error if isinstance(error, GradstreamError) else GradstreamError(_failed(error))
            self._fail(running, known)

    def _fail(self, running: _Running, error: GradstreamError) -> None:
        for row in running.rows:
            self._leave(running, row)
            row.deliver(error)
        running.rows, running.tokens = [], []
        running.batch = Batch(running.resident)  # the old batch may have computed a part of a token

    def _drop_cancelled(self, running: _Running) -> None:
        cancelled = {index for index, row in enumerate(running.rows) if row.cancelled}
        self._keep_others(running, cancelled)

    def _next_tokens(self, running: _Running) -> None:
        self._take_all(running, running.batch.step(running.tokens), 0)

    def _first_tokens(self, rows: list[Row], running: _Running) -> None:
        num_before = len(running.rows)
        running.rows += rows
        running.tokens += [0] * len(rows)
        prompts = [row.request.prompt_ids for row in rows]
        logits_BV = running.batch.join(prompts, [row.served.adapter for row in rows])
        self._take_all(running, logits_BV, num_before)

    def _take_all(self, running: _Running, logits_BV: torch.Tensor, first: int) -> None:
        """Choose the next token of the rows from `first` on. Rows that are done leave before their pieces are sent."""
        done: set[int] = set()
        said: list[tuple[Row, Piece | GradstreamError]] = []
        for index, logits_V in enumerate(logits_BV, first):
            row = running.rows[index]
            try:
                with panics_caught():
                    token = row.choose(logits_V)
                    piece = row.take(token)
            except Exception as error:
                done.add(index)
                said.append((row, error if isinstance(error, GradstreamError) else GradstreamError(_failed(error))))
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

    def _keep_others(self, running: _Running, leaving: set[int]) -> None:
        if not leaving:
            return
        kept = [index for index in range(len(running.rows)) if index not in leaving]
        for index in leaving:
            self._leave(running, running.rows[index])
        running.rows = [running.rows[index] for index in kept]
        running.tokens = [running.tokens[index] for index in kept]
        running.batch.keep(kept)

    def _leave(self, running: _Running, row: Row) -> None:
        self._models.release(row.served, running.resident)
        with self._changed:
            self._num_running -= 1


def _failed(error: Exception) -> str:
    return f"generating failed ({one_line(error)}); try again with a shorter prompt, or see the service's log"
