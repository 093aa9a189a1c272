"""What the fine-tuning client returns: frozen values, as in `_types`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from gradstream.client._job_types import Job
from gradstream.client._values import Value, time_or_none
from gradstream.client._watch_types import WatchItem
from gradstream.proto.v1 import fine_tuning_pb2

FinishReason = Literal["", "end-of-text", "stop", "length"]
"""Why a generation ended; empty while it goes on."""


class FineTuningState(StrEnum):
    """Where a fine-tuning is in its life."""

    UNSPECIFIED = "unspecified"
    PREPARING = "preparing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it unless it is resumed."""
        return self in (FineTuningState.FINISHED, FineTuningState.FAILED, FineTuningState.CANCELLED)


_STATES = {
    number: FineTuningState(name.removeprefix("FINE_TUNING_STATE_").lower())
    for name, number in fine_tuning_pb2.FineTuningState.items()
}
_FINISH_REASONS: dict[int, FinishReason] = {
    fine_tuning_pb2.FINISH_REASON_END_OF_TEXT: "end-of-text",
    fine_tuning_pb2.FINISH_REASON_STOP: "stop",
    fine_tuning_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class ExamplesReport(Value):
    """What became of the rows of a task's data."""

    format: str
    num_rows: int
    num_train: int
    num_validation: int
    num_bad: int
    num_too_long: int
    num_truncated: int
    num_target_tokens: int
    num_packed_rows: int
    bad_rows: tuple[str, ...]
    """The first of them, one line each: file, line and reason."""
    sha256: tuple[str, ...]
    num_tokens: int = 0
    """Tokens to train on, targets and others."""
    unused_fields: Mapping[str, int] = field(default_factory=dict)
    """Fields that no example was made of, and in how many rows each is not null."""
    notes: tuple[str, ...] = ()
    """What people should know of how the rows were read, one line each."""

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.ExamplesReport) -> ExamplesReport:
        """The report that a message describes."""
        return cls(
            format=message.format,
            num_rows=message.num_rows,
            num_train=message.num_train,
            num_validation=message.num_validation,
            num_bad=message.num_bad,
            num_too_long=message.num_too_long,
            num_truncated=message.num_truncated,
            num_target_tokens=message.num_target_tokens,
            num_packed_rows=message.num_packed_rows,
            bad_rows=tuple(message.bad_rows),
            sha256=tuple(message.sha256),
            num_tokens=message.num_tokens,
            unused_fields=dict(sorted(message.unused_fields.items())),
            notes=tuple(message.notes),
        )


@dataclass(frozen=True, slots=True)
class Generation(Value):
    """How many requests the service generates for, and the memory of their keys and values."""

    num_running: int
    num_waiting: int
    cache_bytes: int
    """What the running requests reserve."""
    max_cache_bytes: int
    reason: str = ""
    """Why the next request waits; empty when none does."""

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.GetGenerationResponse) -> Generation:
        """The values of a message."""
        return cls(
            num_running=message.num_running,
            num_waiting=message.num_waiting,
            cache_bytes=message.cache_bytes,
            max_cache_bytes=message.max_cache_bytes,
            reason=message.reason,
        )


@dataclass(frozen=True, slots=True)
class Sample(Value):
    """A held-out prompt, what its example says, and what a model said."""

    prompt: str
    expected: str
    generated: str


@dataclass(frozen=True, slots=True)
class Evaluation(Value):
    """How good a version is on the held-out examples. `loss` is in nats a target token; version 0 is the base."""

    version: int
    loss: float
    perplexity: float
    num_prompts: int
    num_exact: int
    samples: tuple[Sample, ...]

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.Evaluation) -> Evaluation:
        """The evaluation that a message describes."""
        return cls(
            version=message.version,
            loss=message.loss,
            perplexity=message.perplexity,
            num_prompts=message.num_prompts,
            num_exact=message.num_exact,
            samples=tuple(Sample(sample.prompt, sample.expected, sample.generated) for sample in message.samples),
        )


@dataclass(frozen=True, slots=True)
class FineTuning(Value):
    """A fine-tuning: its state, its job and how good its result is."""

    name: str
    state: FineTuningState
    reason: str
    base: str
    base_sha256: str
    method: str
    num_trained_parameters: int
    job: Job | None
    """None before it was submitted, and while the coordinator does not answer."""
    examples: ExamplesReport | None
    before: Evaluation | None
    after: Evaluation | None
    best_version: int | None
    pushed_bytes_per_step: int
    recipe: Mapping[str, Any]
    created: datetime | None

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.FineTuning) -> FineTuning:
        """The fine-tuning that a message describes."""
        try:
            recipe = json.loads(message.recipe_json) if message.recipe_json else {}
        except ValueError:
            recipe = {}
        return cls(
            name=message.name,
            state=_STATES.get(message.state, FineTuningState.UNSPECIFIED),
            reason=message.reason,
            base=message.base_title,
            base_sha256=message.base_sha256,
            method=message.method,
            num_trained_parameters=message.num_trained_parameters,
            job=Job.from_proto(message.job) if message.HasField("job") else None,
            examples=ExamplesReport.from_proto(message.examples) if message.HasField("examples") else None,
            before=Evaluation.from_proto(message.before) if message.HasField("before") else None,
            after=Evaluation.from_proto(message.after) if message.HasField("after") else None,
            best_version=message.best_version if message.HasField("best_version") else None,
            pushed_bytes_per_step=message.pushed_bytes_per_step,
            recipe=recipe if isinstance(recipe, dict) else {},
            created=time_or_none(message.created_unix_ms),
        )


@dataclass(frozen=True, slots=True)
class RenderedPiece(Value):
    """A piece of a rendered example; `is_target` says whether its tokens are trained on."""

    text: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class RenderedExample(Value):
    """An example as it is trained on."""

    origin: str
    pieces: tuple[RenderedPiece, ...]
    num_tokens: int
    num_targets: int


@dataclass(frozen=True, slots=True)
class ExamplesPreview(Value):
    """The first examples, rendered, and what would become of all rows."""

    examples: tuple[RenderedExample, ...]
    report: ExamplesReport

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.PreviewExamplesResponse) -> ExamplesPreview:
        """The preview that a message describes."""
        return cls(
            examples=tuple(
                RenderedExample(
                    origin=example.origin,
                    pieces=tuple(RenderedPiece(piece.text, piece.is_target) for piece in example.pieces),
                    num_tokens=example.num_tokens,
                    num_targets=example.num_targets,
                )
                for example in message.examples
            ),
            report=ExamplesReport.from_proto(message.report),
        )


@dataclass(frozen=True, slots=True)
class GeneratedText(Value):
    """More of a completion: `text` comes after all before it. The last one has a `finish_reason`."""

    text: str
    num_tokens: int
    """Generated so far."""
    finish_reason: FinishReason

    @classmethod
    def from_proto(cls, message: fine_tuning_pb2.GenerateResponse) -> GeneratedText:
        """The piece that a message describes."""
        return cls(message.text, message.num_tokens, _FINISH_REASONS.get(message.finish_reason, ""))


FineTuningWatchItem = FineTuning | WatchItem
