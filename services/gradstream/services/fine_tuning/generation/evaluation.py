"""Counts the held-out prompts that a model completes exactly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.generation.engine import Engine, GenerationRequest
from gradstream.services.fine_tuning.generation.models import BaseFacts

# Tokens beyond those of the expected completion: for the end of text, or to find that it does not come.
MARGIN_TOKENS = 8
# Prompts that are completed at once.
MAX_TOGETHER = 16


class ExactMatch(NamedTuple):
    """The fields of a pb.Evaluation that come from generating."""

    num_prompts: int
    num_exact: int
    samples: list[pb.Sample]


def is_exact(expected: str, generated: str) -> bool:
    """Return whether a completion is the expected one, ignoring blanks at both ends."""
    return expected.strip() == generated.strip()


def num_new_tokens(num_prompt: int, num_expected: int, max_new_tokens: int, max_positions: int | None) -> int:
    """Compute the number of tokens to generate to find whether the expected completion comes and ends.

    The number is 0 or less when the prompt leaves no room for any.
    """
    wanted = min(num_expected + MARGIN_TOKENS, max_new_tokens)
    return wanted if max_positions is None else min(wanted, max_positions - num_prompt)


def spread(num_items: int, num_picked: int) -> list[int]:
    """Indices of at most `num_picked` items, spread evenly over all."""
    num_picked = min(num_items, num_picked)
    return [index * num_items // num_picked for index in range(num_picked)]


async def exact_match(
    engine: Engine,
    model: str,
    prompts: Sequence[tuple[Sequence[int], str, str]],
    *,
    max_new_tokens: int = 256,
    num_samples: int = 8,
) -> ExactMatch:
    """Complete each (prompt ids, prompt, expected completion) greedily and count the exact ones.

    A prompt that has no token, or leaves the model no room, counts as not exact. At most MAX_TOGETHER and half of
    the engine's rows are used, so other requests are served in the meantime. Raises the errors of `Engine.generate`.
    """
    if not prompts:
        return ExactMatch(0, 0, [])
    facts = await engine.facts(model)
    generated = [""] * len(prompts)
    left = iter(range(len(prompts)))

    async def complete_next() -> None:
        for index in left:
            ids, _, expected = prompts[index]
            generated[index] = await _complete(engine, model, facts, ids, expected, max_new_tokens)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, min(MAX_TOGETHER, engine.limits.max_batch // 2))):
                group.create_task(complete_next())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first error is enough for people
    num_exact = sum(is_exact(expected, text) for (_, _, expected), text in zip(prompts, generated, strict=True))
    samples = [
        pb.Sample(prompt=prompts[index][1], expected=prompts[index][2], generated=generated[index])
        for index in spread(len(prompts), num_samples)
    ]
    return ExactMatch(len(prompts), num_exact, samples)


async def _complete(
    engine: Engine, model: str, facts: BaseFacts, ids: Sequence[int], expected: str, max_new_tokens: int
) -> str:
    num_expected = len(facts.tokenizer.encode(expected, add_special_tokens=False))
    count = num_new_tokens(len(ids), num_expected, max_new_tokens, facts.max_positions)
    if count < 1 or not ids:
        return ""
    request = GenerationRequest(model, tuple(ids), max_new_tokens=count)
    async with aclosing(engine.generate(request, patient=True)) as pieces:
        return "".join([piece.text async for piece in pieces])
