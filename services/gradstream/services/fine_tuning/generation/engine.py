"""Generates text with many models for many callers at once, and streams it.

One thread computes. The event loop checks requests, passes them to that thread and gets pieces of text back. When a
caller goes away, its row is freed before the next token.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable

from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.storage.pool import LOAD_SECONDS, StorageThreads
from gradstream.services.fine_tuning.generation.batching import Batcher, CacheStatus, EngineLimits, EngineStatus
from gradstream.services.fine_tuning.generation.models import BaseFacts, Served, ServedModels
from gradstream.services.fine_tuning.generation.rows import UNFINISHED, GenerationRequest, Piece, Row
from gradstream.services.fine_tuning.generation.text_stream import special_tokens

__all__ = ["CacheStatus", "Engine", "EngineLimits", "EngineStatus", "GenerationRequest", "Piece", "check_request"]

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024


class Engine:
    """Generates text. `close` it when done."""

    def __init__(self, models: ServedModels, limits: EngineLimits | None = None):
        self.models = models
        self.limits = limits or EngineLimits()
        self._batcher = Batcher(models, self.limits)
        self._storage = StorageThreads(LOAD_SECONDS)
        self._thread: threading.Thread | None = None

    async def facts(self, model: str) -> BaseFacts:
        """Return a model's tokenizer and bounds, without loading its weights.

        Raises ConfigError for an unknown model, UnreachableError when its storage does not answer.
        """
        return await self._facts(self.models.find(model))

    async def _facts(self, served: Served) -> BaseFacts:
        return await self._storage.call(served.base.path, self.models.facts, served)

    async def generate(self, request: GenerationRequest, patient: bool = False) -> AsyncGenerator[Piece, None]:
        """Yield the completion in pieces. Only the last piece has a finish reason.

        The work begins when the first piece is requested. Close the generator (`aclosing`) if you leave it early.
        `patient` requests are never refused because too many wait; their caller bounds their number. Raises ConfigError
        for a request that cannot be met, UnreachableError when too many requests wait or the service ends, and
        CheckpointError when the model cannot be loaded.
        """
        served = self.models.find(request.model)
        facts = await self._facts(served)
        check_request(request, facts)
        pieces: asyncio.Queue[Piece | GradstreamError] = asyncio.Queue()  # bounded by max_new_tokens
        row = Row(request, served, facts, _deliverer(asyncio.get_running_loop(), pieces), patient)
        self._batcher.submit(row)
        self._start()
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, GradstreamError):
                    raise piece
                yield piece
                if piece.finish_reason != UNFINISHED:
                    return
        finally:
            self._batcher.cancel(row)

    def status(self) -> EngineStatus:
        """The numbers of running and waiting requests."""
        return self._batcher.status()

    def cache(self) -> CacheStatus:
        """The memory for keys and values."""
        return self._batcher.cache()

    async def close(self) -> None:
        """End all generations with an error, and end the thread."""
        self._batcher.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._compute, name="generation", daemon=True)
            self._thread.start()

    def _compute(self) -> None:
        try:
            while self._batcher.wait():
                self._batcher.step()
        finally:
            self._batcher.close()
            self._batcher.abandon()


def check_request(request: GenerationRequest, facts: BaseFacts) -> None:
    """Raise ConfigError, in one line with the remedy, for a request that a model of these facts cannot meet."""
    num_prompt = len(request.prompt_ids)
    if num_prompt == 0:
        raise ConfigError("the prompt has no token; give it some text")
    strange = [token for token in request.prompt_ids if not 0 <= token < facts.vocab_size]
    if strange:
        raise ConfigError(
            f"the prompt has token {strange[0]}, but the model knows {facts.vocab_size} tokens; use the model's own "
            f"tokenizer"
        )
    if request.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
    longest = facts.max_positions
    if longest is not None and num_prompt + request.max_new_tokens > longest:
        room = longest - num_prompt
        cure = f"ask for at most {room} new tokens, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"the prompt's {num_prompt} tokens and max_new_tokens {request.max_new_tokens} are more than the model's "
            f"{longest} positions; {cure}"
        )
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise ConfigError(f"temperature is {request.temperature}; it must be 0 (the likeliest token) or more")
    if not 0 <= request.top_p <= 1:
        raise ConfigError(f"top_p is {request.top_p}; it must be 0 (the likeliest token) to 1 (all tokens)")
    if not 0 <= request.seed < 2**64:
        raise ConfigError(f"seed is {request.seed}; it must be at least 0 and below 2**64")
    if len(request.stop) > MAX_STOP_TEXTS:
        raise ConfigError(f"there are {len(request.stop)} stop texts; give at most {MAX_STOP_TEXTS}")
    for text in request.stop:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise ConfigError(f"a stop text has {len(text)} characters; give it 1 to {MAX_STOP_CHARACTERS}")
    special = special_tokens(facts.tokenizer)
    for text in request.stop:
        if text not in special and (found := next((token for token in special if token and token in text), None)):
            raise ConfigError(
                f"stop text {text!r} has the special token {found!r} in it, which no text contains; give the "
                f"token as a stop text of its own"
            )


def _deliverer(
    loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece | GradstreamError]
) -> Callable[[Piece | GradstreamError], None]:
    """Make a function that passes pieces from the compute thread to the event loop."""

    def deliver(piece: Piece | GradstreamError) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:
            pass  # the loop is closed: no caller reads the piece

    return deliver
