"""Long prompts are computed in chunks between the tokens of running streams, and short requests get in between."""

from typing import Any

import pytest
import torch
from support.generation import CONFIGS, Asked, MemoryBases, ask, drain, greedy_of, random_model, submit, text_of

from gradstream.core.errors import ConfigError
from gradstream.services.fine_tuning.generation.batching import Batcher, EngineLimits, EngineStatus
from gradstream.services.fine_tuning.generation.models import ServedModels
from gradstream.services.fine_tuning.generation.resident import ResidentBase
from gradstream.services.fine_tuning.generation.scheduling import FIRST_CHUNK, MIN_CHUNK

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 1024


class SlowMachine:
    """A clock by which every call of a model takes a second: so chunks have their least length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []  # rows and tokens of each
        logits = ResidentBase.logits

        def slow(resident: ResidentBase, ids_BT: torch.Tensor, *arguments: Any) -> torch.Tensor:
            self.now += 1.0
            self.calls.append((ids_BT.shape[0], ids_BT.shape[1]))
            return logits(resident, ids_BT, *arguments)

        monkeypatch.setattr(ResidentBase, "logits", slow)

    def clock(self) -> float:
        return self.now


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SlowMachine:
    return SlowMachine(monkeypatch)


@pytest.fixture
def bases() -> MemoryBases:
    return MemoryBases()


def served(bases: MemoryBases, family: str = "llama") -> ServedModels:
    longest = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model = random_model({**CONFIGS[family], longest: POSITIONS})
    models = bases.served()
    models.add_base("base", bases.add("base", model))
    return models


def drawn(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_in_chunks_and_batches_give_the_text_of_transformers(
    family: str, bases: MemoryBases, machine: SlowMachine
) -> None:
    models = served(bases, family)
    batcher = Batcher(models, EngineLimits(), machine.clock)
    lengths = (9, 100, 3, 61, 16, 40)
    prompts = [drawn(length, length) for length in lengths]
    asked = submit(batcher, models, *(ask("base", prompt) for prompt in prompts))
    drain(batcher)
    expected = [text_of(bases, prompt, greedy_of(bases.models["base"], prompt)) for prompt in prompts]
    assert [one.text for one in asked] == expected
    assert len(set(expected)) > 1
    assert max(num_tokens for _, num_tokens in machine.calls) <= FIRST_CHUNK
    assert max(num_rows for num_rows, _ in machine.calls) > 1  # also rows whose prompts came in chunks


def test_streams_go_on_while_a_long_prompt_is_computed(bases: MemoryBases, machine: SlowMachine) -> None:
    models = served(bases)
    batcher = Batcher(models, EngineLimits(), machine.clock)
    (stream,) = submit(batcher, models, ask("base", drawn(5), 200))
    batcher.step()
    (long,) = submit(batcher, models, ask("base", drawn(600, 1), 4))
    while long.row.num_tokens == 0:
        before = stream.row.num_tokens
        machine.calls.clear()
        batcher.step()
        assert stream.row.num_tokens == before + 1
        assert len(machine.calls) == 2  # the stream's token, and one chunk
        assert machine.calls[1][1] <= MIN_CHUNK
    drain(batcher)
    assert long.text == text_of(bases, drawn(600, 1), greedy_of(bases.models["base"], drawn(600, 1), 4))


def test_a_short_request_gets_in_between_eight_long_ones(bases: MemoryBases, machine: SlowMachine) -> None:
    models = served(bases)
    batcher = Batcher(models, EngineLimits(), machine.clock)
    long = submit(batcher, models, *(ask("base", drawn(600, seed), 4) for seed in range(8)))
    for _ in range(3):
        batcher.step()
    machine.calls.clear()
    (short,) = submit(batcher, models, ask("base", drawn(7), 4))
    while short.row.num_tokens == 0:
        batcher.step()
    assert sum(num_tokens > 1 for _, num_tokens in machine.calls) <= 2
    assert not any(one.row.num_tokens for one in long)
    drain(batcher)


def test_how_many_run_follows_from_the_memory(bases: MemoryBases) -> None:
    models = served(bases)
    each = models.facts(models.find("base")).position_bytes * 20
    batcher = Batcher(models, EngineLimits(cache_bytes=40 * each))
    asked = submit(batcher, models, *(ask("base", drawn(8, seed)) for seed in range(64)))
    batcher.step()
    cache = batcher.cache()
    # A part is kept for requests of 12 positions or fewer.
    assert batcher.status() == EngineStatus(37, 27)
    assert 0.95 * 37 * each <= cache.held_bytes <= 37 * each  # a row's last token is not kept
    assert cache.budget_bytes == 40 * each
    assert cache.reason.startswith("the next request needs")
    (short,) = submit(batcher, models, ask("base", drawn(2), 2))
    drain(batcher)
    assert short.finished
    assert all(one.finished for one in asked)
    assert (batcher.cache().held_bytes, batcher.cache().reason) == (0, "")


def test_a_cancelled_prompt_frees_its_place_at_once(bases: MemoryBases, machine: SlowMachine) -> None:
    models = served(bases)
    each = models.facts(models.find("base")).position_bytes
    batcher = Batcher(models, EngineLimits(cache_bytes=700 * each), machine.clock)
    first, second = submit(batcher, models, *(ask("base", drawn(600, seed), 4) for seed in range(2)))
    batcher.step()
    batcher.step()
    assert batcher.status() == EngineStatus(1, 1)
    batcher.cancel(first.row)
    batcher.step()
    assert batcher.status() == EngineStatus(1, 0)
    assert batcher.cache().held_bytes == 604 * each
    drain(batcher)
    assert first.delivered == []
    assert second.finished
    (resident,) = models.resident_bases()
    assert resident.num_users == 0


def test_a_request_that_never_fits_beside_its_base_is_refused_in_one_line(bases: MemoryBases) -> None:
    models = served(bases)
    facts = models.facts(models.find("base"))
    base_bytes = sum(parameter.numel() * 4 for parameter in bases.models["base"].parameters())
    memory_bytes = base_bytes + 100 * facts.position_bytes
    batcher = Batcher(models, EngineLimits(cache_bytes=facts.position_bytes, memory_bytes=memory_bytes))
    refused, fits = submit(batcher, models, ask("base", drawn(90), 11), ask("base", drawn(90), 10))
    drain(batcher)
    assert fits.finished
    with pytest.raises(
        ConfigError, match=r"^the prompt and max_new_tokens are 101 tokens, .* memory for 100 beside"
    ) as error:
        raise refused.error
    assert "\n" not in str(error.value)


def test_a_chunk_that_fails_ends_its_request_and_no_other(bases: MemoryBases, machine: SlowMachine) -> None:
    models = served(bases)
    batcher = Batcher(models, EngineLimits(), machine.clock)
    (stream,) = submit(batcher, models, ask("base", drawn(5), 30))
    batcher.step()
    (long,) = submit(batcher, models, ask("base", drawn(600), 4))
    batcher.step()

    def fail(_module: Any, arguments: Any) -> None:
        if arguments[0].shape[1] > 1:
            raise RuntimeError("out of\nmemory")

    (resident,) = models.resident_bases()
    hook = resident.model.model.layers[1].register_forward_pre_hook(fail)  # type: ignore[union-attr]
    batcher.step()
    hook.remove()
    assert str(long.error).startswith("generating failed (RuntimeError: out of memory);")
    drain(batcher)
    assert stream.text == text_of(bases, drawn(5), greedy_of(bases.models["base"], drawn(5), 30))


def test_draws_are_the_seeds_also_over_chunks(bases: MemoryBases, machine: SlowMachine) -> None:
    models = served(bases)
    request = ask("base", drawn(200), temperature=1.5, top_p=0.9, seed=5)

    def one(clock: Any, *mates: int) -> Asked:
        batcher = Batcher(models, EngineLimits(), clock)
        *_, asked = submit(batcher, models, *(ask("base", drawn(length), temperature=2.0) for length in mates), request)
        drain(batcher)
        return asked

    whole = one(lambda: 0.0)
    machine.calls.clear()
    assert one(machine.clock, 100, 4).text == whole.text
    assert max(num_tokens for _, num_tokens in machine.calls) <= FIRST_CHUNK
