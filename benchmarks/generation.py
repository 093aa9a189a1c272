"""Generation by the fine-tuning service's engine, in multiples of transformers' own `generate` on the same model.

A case is a model. All figures of a case come from one run, in one process with torch's default number of threads:

- tokens a second of 1, 8 and 32 streams, over those of `generate` with the same prompts as one batch;
- the longest gap between two tokens of a running stream while a long prompt arrives, in seconds, and how often it fits
  into the time in which `generate` computes that prompt: a stream of `generate` stands still meanwhile;
- the seconds to the first token of a short request behind eight long ones, and how often they fit into the time of
  `generate` for the eight long ones, which come first.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the service

import tokenizers
import torch
import transformers
from report import Result, arguments_parser, at_most, chosen, named, report, result

from gradstream.core.model.model import build
from gradstream.core.pretrained.base import BaseReader, load_tokenizer
from gradstream.services.fine_tuning.bases import find_base
from gradstream.services.fine_tuning.generation.engine import Engine, EngineLimits, GenerationRequest
from gradstream.services.fine_tuning.generation.models import ServedModels

BENCH = "generation"
STALL_SECONDS = 0.1
SHORT_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A model's shape, and the lengths of prompts and texts, in tokens."""

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    streams: tuple[int, ...] = (1, 8, 32)
    num_new: int = 64
    long_prompt: int = 4096
    waiting_prompt: int = 1024  # of each of the long requests before the short one

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": max(1, self.hidden_size // 128),
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }


CASES = named([Case("tiny", 64, 2, 512), Case("32m", 512, 8, 8192)])
SMOKE = Case("tiny", 64, 2, 512, (1, 2), num_new=4, long_prompt=64, waiting_prompt=32)


def make_base(case: Case, directory: Path) -> Any:
    """Write a base with random weights and a tokenizer of one word a token; return the model."""
    torch.manual_seed(0)
    model: Any = build(case.config).eval().requires_grad_(False)
    model.lm_head.weight[0] = 0  # the token that ends a text is never the likeliest one
    model.save_pretrained(directory)
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, case.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return model


@contextmanager
def served(case: Case) -> Iterator[tuple[ServedModels, Any]]:
    """Serve the case's model as "base". Yields the served models, and the model for transformers."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_base(case, Path(directory))
        models = ServedModels(BaseReader, load_tokenizer)
        models.add_base("base", find_base(directory, directory)[0])
        yield models, model


def prompt(case: Case, length: int, seed: int) -> tuple[int, ...]:
    """Draw a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, case.vocab_size, (length,), generator=generator).tolist())


async def token_times(engine: Engine, ids: Sequence[int], num_new: int) -> list[float]:
    """Generate greedily; return the time of each token."""
    times: list[float] = []
    async with aclosing(engine.generate(GenerationRequest("base", tuple(ids), num_new))) as pieces:
        async for _ in pieces:
            times.append(time.monotonic())
    return times


def generate_seconds(model: Any, prompts: Sequence[Sequence[int]], num_new: int) -> float:
    """Measure transformers' `generate` of one batch of prompts of equal length."""
    ids_BT = torch.tensor(prompts)
    begin = time.monotonic()
    with torch.inference_mode():
        out_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=num_new, do_sample=False, pad_token_id=0
        )
    assert out_BT.shape[1] == ids_BT.shape[1] + num_new
    return time.monotonic() - begin


async def speed(engine: Engine, model: Any, case: Case, num_streams: int) -> Result:
    """Tokens a second of some streams, over those of `generate`."""
    prompts = [prompt(case, SHORT_TOKENS, seed) for seed in range(num_streams)]
    begin = time.monotonic()
    await asyncio.gather(*(token_times(engine, ids, case.num_new) for ids in prompts))
    seconds = time.monotonic() - begin
    rival = await asyncio.to_thread(generate_seconds, model, prompts, case.num_new)
    total = num_streams * case.num_new
    detail = f"{total / seconds:.0f} tokens/s, generate {total / rival:.0f}"
    return result(f"{case.name}_{num_streams}_streams", rival / seconds, 0.8, detail)


async def gap(engine: Engine, model: Any, case: Case) -> list[Result]:
    """The longest gap between a running stream's tokens while a long prompt is computed."""
    running = asyncio.create_task(token_times(engine, prompt(case, SHORT_TOKENS, 0), 2000))
    await asyncio.sleep(0.5)
    begin = time.monotonic()
    async with aclosing(engine.generate(GenerationRequest("base", prompt(case, case.long_prompt, 1), 4))) as pieces:
        await anext(pieces)
        first = time.monotonic()
    times = await running
    if times[-1] < first:
        raise RuntimeError("the running stream ended before the long prompt was computed; let it generate more")
    during = [at for at in times if begin - 1 < at]
    longest = max(later - earlier for earlier, later in pairwise(during) if later > begin and earlier < first + 0.2)
    rival = await asyncio.to_thread(generate_seconds, model, [prompt(case, case.long_prompt, 1)], 1)
    detail = f"the prompt's first token after {first - begin:.2f} s; generate computes the prompt in {rival:.2f} s"
    return [
        at_most(f"{case.name}_gap_seconds", longest, STALL_SECONDS, detail),
        result(f"{case.name}_gap", rival / longest, 0, "a stream's pause with generate over the longest gap"),
        result(f"{case.name}_long_prompt", rival / (first - begin), 0, "speed of the long prompt, beside the stream"),
    ]


async def first_token(engine: Engine, model: Any, case: Case) -> list[Result]:
    """Seconds to the first token of a short request that comes right after eight long ones."""
    long_prompts = [prompt(case, case.waiting_prompt, seed) for seed in range(8)]
    begin = time.monotonic()
    waiting = [asyncio.create_task(token_times(engine, ids, case.num_new)) for ids in long_prompts]
    await asyncio.sleep(0.1)
    asked = time.monotonic()
    short = await token_times(engine, prompt(case, SHORT_TOKENS, 9), 4)
    firsts = [(await task)[0] - begin for task in waiting]
    rival = await asyncio.to_thread(generate_seconds, model, long_prompts, case.num_new)
    seconds = short[0] - asked
    spread = f"{min(firsts):.2f} to {max(firsts):.2f} s"
    detail = f"the long ones' first tokens after {spread}; generate has all in {rival:.2f} s"
    return [
        at_most(f"{case.name}_first_token_seconds", seconds, 0, detail),
        result(f"{case.name}_first_token", rival / seconds, 0, "the wait behind generate over the wait here"),
    ]


async def measure(case: Case) -> list[Result]:
    """Measure a case."""
    with served(case) as (models, model):
        engine = Engine(models, EngineLimits())
        try:
            await token_times(engine, prompt(case, SHORT_TOKENS, 0), 4)  # loads the model
            await asyncio.to_thread(generate_seconds, model, [prompt(case, SHORT_TOKENS, 0)], 4)
            results = [await speed(engine, model, case, num_streams) for num_streams in case.streams]
            return [*results, *await gap(engine, model, case), *await first_token(engine, model, case)]
        finally:
            await engine.close()


def main() -> None:
    arguments = arguments_parser(__doc__).parse_args()
    cases = {SMOKE.name: SMOKE} if arguments.smoke else CASES
    results = [asyncio.run(measure(case)) for case in chosen(BENCH, cases, arguments.only).values()]
    report(BENCH, [item for of_case in results for item in of_case])


if __name__ == "__main__":
    main()
