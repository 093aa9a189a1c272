"""Makes the messages that show fine-tunings to people."""

from __future__ import annotations

import math

from google.protobuf.json_format import ParseDict

from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.proto.v1 import fine_tuning_pb2, jobs_pb2
from gradstream.services.fine_tuning.store import Completions, Record, State

STATES: dict[State, fine_tuning_pb2.FineTuningState.ValueType] = {
    "preparing": fine_tuning_pb2.FINE_TUNING_STATE_PREPARING,
    "training": fine_tuning_pb2.FINE_TUNING_STATE_TRAINING,
    "evaluating": fine_tuning_pb2.FINE_TUNING_STATE_EVALUATING,
    "finished": fine_tuning_pb2.FINE_TUNING_STATE_FINISHED,
    "failed": fine_tuning_pb2.FINE_TUNING_STATE_FAILED,
    "cancelled": fine_tuning_pb2.FINE_TUNING_STATE_CANCELLED,
}
# Keeps an answer below the limit of a message.
MAX_SAMPLE_CHARACTERS = 4000


def fine_tuning(record: Record, job: jobs_pb2.Job | None, pushed_bytes: int) -> fine_tuning_pb2.FineTuning:
    """Make the message of a record, with its job as the coordinator shows it."""
    asked = parse_fine_tuning_recipe(record.recipe_json)
    message = fine_tuning_pb2.FineTuning(
        name=record.name,
        state=STATES[record.state],
        reason=record.reason,
        base_title=record.base.title if record.base is not None else asked.base_model,
        base_sha256=record.base.sha256 if record.base is not None else "",
        method=asked.method,
        num_trained_parameters=record.num_trained_parameters,
        job=job,
        examples=ParseDict(record.examples, fine_tuning_pb2.ExamplesReport()) if record.examples is not None else None,
        before=_evaluation(record, 0, record.before),
        pushed_bytes_per_step=pushed_bytes,
        recipe_json=record.recipe_json,
        created_unix_ms=record.created_unix_ms,
    )
    if record.best_version is not None:
        message.best_version = record.best_version
        after = _evaluation(record, record.best_version, record.after)
        if after is not None:
            message.after.CopyFrom(after)
    return message


def _evaluation(record: Record, version: int, completions: Completions | None) -> fine_tuning_pb2.Evaluation | None:
    """Make a version's evaluation; None before both its loss and its completions are known."""
    loss = record.losses.get(version)
    if loss is None or completions is None:
        return None
    return fine_tuning_pb2.Evaluation(
        version=version,
        loss=loss,
        perplexity=perplexity(loss),
        num_prompts=completions.num_prompts,
        num_exact=completions.num_exact,
        samples=[
            fine_tuning_pb2.Sample(
                prompt=sample.prompt[-MAX_SAMPLE_CHARACTERS:],
                expected=sample.expected[:MAX_SAMPLE_CHARACTERS],
                generated=sample.generated[:MAX_SAMPLE_CHARACTERS],
            )
            for sample in completions.samples
        ],
    )


def perplexity(loss: float) -> float:
    """Compute e to the power of the loss; infinity where the result is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
