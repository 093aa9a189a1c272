"""Generation: rows in a batch give the same text as alone; bounds, refusals, cancellation and errors."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch
from support.generation import (
    CONFIGS,
    Asked,
    MemoryBases,
    ask,
    drain,
    generated,
    greedy_of,
    last_logits,
    random_model,
    submit,
    text_of,
    with_adapters,
)

from gradstream.core.errors import CheckpointError, ConfigError, UnreachableError
from gradstream.core.model.model import build
from gradstream.core.recipe.fine_tuning import Base
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.generation.batch import Batch
from gradstream.services.fine_tuning.generation.batching import Batcher, EngineStatus
from gradstream.services.fine_tuning.generation.engine import Engine, EngineLimits, GenerationRequest, check_request
from gradstream.services.fine_tuning.generation.evaluation import exact_match, num_new_tokens, spread
from gradstream.services.fine_tuning.generation.models import ServedModels
from gradstream.services.fine_tuning.generation.resident import NO_ADAPTER, ResidentBase

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200], [17], [31, 4, 8, 15, 16, 23, 42, 108], [77, 7, 7, 3, 2]]


@pytest.fixture
def bases() -> MemoryBases:
    return MemoryBases()


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_that_join_and_leave_compute_as_if_alone(family: str, bases: MemoryBases) -> None:
    model = random_model(CONFIGS[family])
    bases.add("base", model)
    resident = ResidentBase(bases.open(bases.add("base", model)), torch.float32, CPU)
    batch = Batch(resident)
    rows: list[list[int]] = []

    def check(logits_BV: torch.Tensor, of: list[list[int]]) -> None:
        for logits_V, ids in zip(logits_BV, of, strict=True):
            assert torch.allclose(logits_V, last_logits(model, ids), atol=1e-4), ids

    def join(*prompts: list[int]) -> None:
        new = [list(prompt) for prompt in prompts]
        rows.extend(new)
        check(batch.join(prompts, [NO_ADAPTER] * len(prompts)), new)

    def step(first_token: int) -> None:
        for at, ids in enumerate(rows):
            ids.append(first_token + at)
        check(batch.step([ids[-1] for ids in rows]), rows)

    join(PROMPTS[0], PROMPTS[1])  # lengths 3 and 1
    step(50)
    join(PROMPTS[2])  # longer than all
    step(60)
    join(PROMPTS[1], PROMPTS[3])  # shorter
    step(70)
    batch.keep([0, 1, 4])  # the longest leaves
    rows[:] = [rows[0], rows[1], rows[4]]
    assert batch.lengths == [len(ids) for ids in rows]
    step(80)
    batch.keep([])
    rows.clear()
    join(PROMPTS[3])
    step(90)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_is_that_of_transformers(family: str, bases: MemoryBases) -> None:
    model = random_model(CONFIGS[family])
    models = bases.served()
    models.add_base("base", bases.add("base", model))
    asked = generated(models, *(ask("base", prompt) for prompt in PROMPTS), max_batch=3)
    expected = [greedy_of(model, prompt) for prompt in PROMPTS]
    assert [one.text for one in asked] == [
        text_of(bases, prompt, ids) for prompt, ids in zip(PROMPTS, expected, strict=True)
    ]
    assert [one.pieces[-1].num_tokens for one in asked] == [len(ids) for ids in expected]
    assert len({one.text for one in asked}) == len(PROMPTS)


def test_end_of_text_ends_it(bases: MemoryBases) -> None:
    model = random_model(CONFIGS["gpt2"])
    third = greedy_of(model, PROMPTS[0])[2]
    config = {**CONFIGS["gpt2"], "eos_token_id": [third, 1]}
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(config)))
    (asked,) = generated(models, ask("base", PROMPTS[0]))
    assert asked.pieces[-1].finish_reason == pb.FINISH_REASON_END_OF_TEXT
    assert asked.pieces[-1].num_tokens == 2
    assert asked.text == text_of(bases, PROMPTS[0], greedy_of(model, PROMPTS[0])[:2])


def test_draws_are_the_seeds_whoever_shares_the_batch(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    drawn = ask("base", PROMPTS[0], temperature=1.5, top_p=0.9, seed=5)
    (alone,) = generated(models, drawn)
    mates = [ask("base", prompt, 5, temperature=2.0, seed=5) for prompt in PROMPTS[1:]]
    *_, among = generated(models, *mates, drawn)
    (other,) = generated(models, ask("base", PROMPTS[0], temperature=1.5, top_p=0.9, seed=6))
    assert alone.text == among.text != other.text


def test_a_stop_text_that_is_a_special_token_ends_the_text_there(bases: MemoryBases) -> None:
    """It has no text that could be looked for."""
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    (whole,) = generated(models, ask("base", PROMPTS[2], 20))
    ids = greedy_of(bases.models["base"], PROMPTS[2], 20)
    word = bases.tokenizer.convert_ids_to_tokens(ids[4])
    bases.tokenizer.add_special_tokens({"additional_special_tokens": [word]}, replace_extra_special_tokens=False)
    assert (ids.index(ids[4]), bases.tokenizer.convert_tokens_to_ids(word)) == (4, ids[4])
    (asked,) = generated(models, ask("base", PROMPTS[2], 20, stop=(word,)))
    assert asked.pieces[-1].finish_reason == pb.FINISH_REASON_STOP
    assert asked.pieces[-1].num_tokens == 4
    assert whole.text.startswith(asked.text)
    assert asked.text == text_of(bases, PROMPTS[2], ids[:4])


def test_a_stop_text_ends_the_text_before_it(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    (whole,) = generated(models, ask("base", PROMPTS[2], 20))
    stop = whole.text[6:9]
    (asked,) = generated(models, ask("base", PROMPTS[2], 20, stop=("never there", stop)))
    assert asked.text == whole.text[: whole.text.index(stop)]
    assert asked.pieces[-1].finish_reason == pb.FINISH_REASON_STOP
    assert asked.pieces[-1].num_tokens < 20
    assert whole.pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_a_cancelled_row_leaves_before_the_next_token(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    batcher = Batcher(models, EngineLimits(max_batch=2))
    first, second, third = submit(batcher, models, *(ask("base", PROMPTS[index], 30) for index in range(3)))
    batcher.step()
    batcher.step()
    assert batcher.status() == EngineStatus(num_running=2, num_waiting=1)
    batcher.cancel(first.row)
    num_tokens = first.row.num_tokens
    batcher.step()
    assert first.row.num_tokens == num_tokens
    assert batcher.status() == EngineStatus(num_running=2, num_waiting=0)  # the third has its place
    (resident,) = models.resident_bases()
    assert resident.num_users == 2
    batcher.cancel(third.row)
    batcher.cancel(third.row)
    drain(batcher)
    assert resident.num_users == 0
    assert [second.text] == [one.text for one in generated(models, ask("base", PROMPTS[1], 30))]
    assert not first.finished
    assert not third.finished


def test_a_row_joins_a_batch_whose_last_row_ends_at_that_token(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    batcher = Batcher(models, EngineLimits())
    (first,) = submit(batcher, models, ask("base", PROMPTS[0], 2))
    batcher.step()
    (second,) = submit(batcher, models, ask("base", PROMPTS[1]))
    batcher.step()
    assert first.finished
    drain(batcher)
    assert second.text == generated(models, ask("base", PROMPTS[1]))[0].text


def test_what_goes_wrong_in_a_batch_ends_its_rows_and_no_others(bases: MemoryBases) -> None:
    models = bases.served()
    for family in ("llama", "gpt2"):
        models.add_base(family, bases.add(family, random_model(CONFIGS[family])))
    whole = [one.text for one in generated(models, ask("llama", PROMPTS[0]), ask("gpt2", PROMPTS[0]))]
    batcher = Batcher(models, EngineLimits())
    failed, other = submit(batcher, models, ask("llama", PROMPTS[0]), ask("gpt2", PROMPTS[0]))
    batcher.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of\nmemory")

    failing: Any = models.resident_bases()[0].model
    hook = failing.model.layers[1].register_forward_pre_hook(fail)  # the first layer's keys have grown already
    batcher.step()
    hook.remove()
    error = failed.delivered.pop()
    assert str(error).startswith("generating failed (RuntimeError: out of memory);")
    (again,) = submit(batcher, models, ask("llama", PROMPTS[0]))
    drain(batcher)
    assert [again.text, other.text] == whole
    assert [resident.num_users for resident in models.resident_bases()] == [0, 0]


def test_waiting_is_bounded_and_cancelled_too(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    batcher = Batcher(models, EngineLimits(max_batch=1, max_waiting=2))
    request = ask("base", PROMPTS[0], 3)
    first, second = submit(batcher, models, request, request)
    with pytest.raises(UnreachableError, match=r"^busy: 0 requests are being generated and 2 wait already; try again"):
        submit(batcher, models, request)
    patient = Asked(models, request, patient=True)
    batcher.submit(patient.row)
    batcher.cancel(first.row)
    submit(batcher, models, request)
    assert batcher.status() == EngineStatus(0, 3)
    drain(batcher)
    assert first.delivered == []
    assert second.text == patient.text


def test_rows_wait_for_memory_for_their_keys_and_values(bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    position_bytes = 2 * 2 * 1 * 16 * 4  # keys and values, layers, heads, elements, fp32
    requests = [ask("base", PROMPTS[index], 10) for index in (0, 1, 2)]  # 13, 11 and 18 positions at most
    batcher = Batcher(models, EngineLimits(cache_bytes=26 * position_bytes))
    asked = submit(batcher, models, *requests)
    batcher.step()
    (resident,) = models.resident_bases()
    assert resident.position_bytes == position_bytes
    assert batcher.status() == EngineStatus(2, 1)
    drain(batcher)
    assert [one.text for one in asked] == [one.text for one in generated(models, *requests)]
    # One that alone needs more is served alone.
    batcher = Batcher(models, EngineLimits(cache_bytes=1))
    submit(batcher, models, *requests)
    batcher.step()
    assert batcher.status() == EngineStatus(1, 2)
    drain(batcher)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "the prompt has no token"),
        ({"prompt_ids": (5, 320)}, "has token 320, but the model knows 320"),
        (
            {"prompt_ids": (5,) * 40},
            "40 tokens and max_new_tokens 30 are more than the model.s 64 positions; .* 24 new",
        ),
        ({"prompt_ids": (5,) * 64}, "positions; shorten the prompt"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"stop": ("",)}, "a stop text has 0 characters"),
        ({"stop": ("a",) * 17}, "17 stop texts"),
        ({"stop": ("<end>\n",)}, "stop text '<end>.n' has the special token '<end>' in it"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(change: dict[str, Any], message: str, bases: MemoryBases) -> None:
    models = bases.served()
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    facts = models.facts(models.find("base"))
    fields: dict[str, Any] = {"model": "base", "prompt_ids": (5,), "max_new_tokens": 30}
    check_request(GenerationRequest(**fields), facts)
    check_request(GenerationRequest(**{**fields, "prompt_ids": (5,) * 34}), facts)  # just fits
    with pytest.raises(ConfigError, match=message):
        check_request(GenerationRequest(**{**fields, **change}), facts)


# --- the engine ---


async def collected(engine: Engine, request: GenerationRequest) -> str:
    async with aclosing(engine.generate(request)) as pieces:
        return "".join([piece.text async for piece in pieces])


async def test_the_engine_streams_and_frees_what_is_left(bases: MemoryBases) -> None:
    models = bases.served()
    bare = with_adapters(bases, models, "one")
    engine = Engine(models, EngineLimits(max_batch=2))
    try:
        left = engine.generate(ask("one", PROMPTS[2], 50))
        first = await anext(left)
        assert (first.finish_reason, first.text != "") == (pb.FINISH_REASON_UNSPECIFIED, True)
        await left.aclose()
        # The other one's first token comes after the row has left.
        assert await collected(engine, ask("base", PROMPTS[0])) == text_of(
            bases, PROMPTS[0], greedy_of(bare, PROMPTS[0])
        )
        assert engine.status() == EngineStatus(0, 0)
        with pytest.raises(ConfigError, match=r"no model 'on' can generate; did you mean 'one'.*there are: base, one"):
            await collected(engine, ask("on", PROMPTS[0]))
        with pytest.raises(ConfigError, match="64 positions"):
            await collected(engine, ask("one", PROMPTS[0], 62))
        models.remove("one")
        with pytest.raises(ConfigError, match="no model 'one'"):
            await collected(engine, ask("one", PROMPTS[0]))
    finally:
        await engine.close()


async def test_an_engine_that_closes_tells_everyone(bases: MemoryBases) -> None:
    models = bases.served()
    config = {**CONFIGS["llama"], "max_position_embeddings": 100_000}
    models.add_base("base", bases.add("base", random_model(config)))
    engine = Engine(models, EngineLimits(max_batch=1))
    running = engine.generate(ask("base", PROMPTS[0], 90_000, temperature=2.0))
    await anext(running)
    await engine.close()
    with pytest.raises(UnreachableError, match="ended before the text did"):
        async for _ in running:
            pass
    with pytest.raises(UnreachableError, match="is ending"):
        await collected(engine, ask("base", PROMPTS[0]))


async def test_loading_that_fails_reaches_the_caller(bases: MemoryBases) -> None:
    def unreadable(base: Base) -> Any:
        raise OSError("no such\nfile")

    def with_config(base: Base) -> Any:
        return bases.open(base)

    opened: list[Callable[[Base], Any]] = [with_config]
    models = ServedModels(lambda base: opened[0](base), lambda base: bases.tokenizer)
    models.add_base("base", bases.add("base", random_model(CONFIGS["llama"])))
    engine = Engine(models)
    try:
        await engine.facts("base")
        opened[0] = unreadable
        with pytest.raises(CheckpointError, match=r"^model 'base' cannot be loaded \(OSError: no such file\)$"):
            await collected(engine, ask("base", PROMPTS[0]))
        opened[0] = with_config
        assert await collected(engine, ask("base", PROMPTS[0]))
    finally:
        await engine.close()


# --- evaluation ---


def test_how_much_is_generated() -> None:
    assert num_new_tokens(10, 5, 256, 64) == 13
    assert num_new_tokens(10, 5, 4, 64) == 4
    assert num_new_tokens(60, 5, 256, 64) == 4
    assert num_new_tokens(64, 5, 256, 64) == 0
    assert num_new_tokens(64, 5, 256, None) == 13
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(0, 4) == []


async def test_exact_matches_are_counted(bases: MemoryBases) -> None:
    """By a model that was taught four sums, and to end after them."""
    encode = bases.tokenizer.encode
    sums = {"2+3=": " 5", "4+4=": " 8", "1+8=": " 9", "3+3=": " six"}
    torch.manual_seed(0)
    model: Any = build(CONFIGS["llama"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for prompt, completion in sums.items():
            ids = [*encode(prompt), *encode(completion), 0]
            labels = torch.tensor([[-100] * len(encode(prompt)) + ids[len(encode(prompt)) :]])
            model(torch.tensor([ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models = bases.served()
    models.add_base("sums", bases.add("sums", model.eval().requires_grad_(False)))
    prompts = [(encode(prompt), prompt, completion + "\n") for prompt, completion in sums.items()]
    prompts += [(encode("2+3="), "2+3=", "6"), (encode("2+3="), "2+3=", "5 and more"), ([5] * 64, "long", "5")]
    engine = Engine(models, EngineLimits(max_batch=4, max_waiting=1))
    try:
        match = await exact_match(engine, "sums", prompts, num_samples=7)
        assert (match.num_prompts, match.num_exact) == (7, 4)
        assert [sample.generated for sample in match.samples] == [" 5", " 8", " 9", " six", " 5", " 5", ""]
        assert (match.samples[4].prompt, match.samples[4].expected) == ("2+3=", "6")
        assert await exact_match(engine, "sums", []) == (0, 0, [])
        with pytest.raises(ConfigError, match="no model 'sum'"):
            await exact_match(engine, "sum", prompts)
        with pytest.raises(ConfigError, match="has token 400"):
            await exact_match(engine, "sums", [([400], "?", "5")])
    finally:
        await engine.close()
