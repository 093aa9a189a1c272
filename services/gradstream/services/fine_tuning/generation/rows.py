"""A request to complete a prompt, the pieces of its completion, and its state while it is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gradstream.core.errors import GradstreamError
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.generation.models import BaseFacts, Served
from gradstream.services.fine_tuning.generation.sampling import choose
from gradstream.services.fine_tuning.generation.scheduling import Need
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

    @property
    def num_positions(self) -> int:
        """The most tokens whose keys and values it needs."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Piece:
    """The next piece of a completion. Only the last piece has a finish reason."""

    text: str
    num_tokens: int  # tokens generated so far, without the one that ends the text
    finish_reason: pb.FinishReason.ValueType = UNFINISHED


@dataclass(eq=False)
class Row:
    """A request while it is served."""

    request: GenerationRequest
    served: Served
    facts: BaseFacts
    deliver: Callable[[Piece | GradstreamError], None]  # called by the compute thread
    patient: bool = False  # may wait beyond max_waiting: the caller bounds the number of patient requests
    arrived: float = 0.0  # seconds, by the batcher's clock
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

    @property
    def need(self) -> Need:
        """The memory that the row needs, and when its request came."""
        return Need(self.request.num_positions * self.facts.position_bytes, self.arrived)

    @property
    def num_to_come(self) -> int:
        """The most tokens that are still to be generated."""
        return self.request.max_new_tokens - self.num_tokens

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
