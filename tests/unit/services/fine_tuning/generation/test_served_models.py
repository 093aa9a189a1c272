"""Models that generate: one base with many adapters, each as alone with peft; shared weights never change."""

import hashlib
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.bases import lora_checkpoint
from support.generation import (
    CONFIGS,
    MemoryBases,
    adapter_weights,
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

from gradstream.core.checkpoint import shard
from gradstream.core.checkpoint.manifest import FileEntry
from gradstream.core.checkpoint.shard import verified_file
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.model.lora import peft_config
from gradstream.core.model.model import build
from gradstream.core.recipe.fine_tuning import Base, LoraConfig
from gradstream.services.fine_tuning.generation.batch import Batch
from gradstream.services.fine_tuning.generation.batching import Batcher, EngineStatus
from gradstream.services.fine_tuning.generation.engine import EngineLimits
from gradstream.services.fine_tuning.generation.models import ResidentLimits, ServedModels
from gradstream.services.fine_tuning.generation.resident import NO_ADAPTER, ResidentBase
from gradstream.services.fine_tuning.generation.serving import CheckpointWeights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200], [17], [31, 4, 8, 15, 16, 23, 42, 108], [77, 7, 7, 3, 2]]
LORAS = {
    "first": LoraConfig(rank=2, alpha=6),
    "second": LoraConfig(rank=3, alpha=4, rslora=True, target_modules=("v_proj", "down_proj")),
    "third": LoraConfig(rank=1, alpha=2, target_modules=("c_attn",)),
}


@pytest.fixture
def bases() -> MemoryBases:
    return MemoryBases()


def peft_model(config: dict[str, Any], seed: int, lora: LoraConfig, weights: dict[str, torch.Tensor]) -> Any:
    """peft's own model with one adapter."""
    bare = random_model(config, seed)
    wrapped = peft.get_peft_model(bare, peft_config(lora, bare))
    parameters = {name.removeprefix("base_model.model."): value for name, value in wrapped.named_parameters()}
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return wrapped.eval()


def digest(parameters: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        if ".lora_" not in name:
            total.update(name.replace(".base_layer.", ".").encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


def bytes_of(model: Any) -> int:
    return sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.parametrize(("family", "names"), [("llama", ("first", "second")), ("gpt2", ("first", "third"))])
def test_adapters_and_base_in_one_batch_are_each_as_alone_with_peft(
    family: str, names: tuple[str, str], bases: MemoryBases
) -> None:
    bare = random_model(CONFIGS[family])
    resident = ResidentBase(bases.open(bases.add("base", bare)), torch.float32, CPU)
    before = digest(dict(bare.named_parameters()))
    assert digest(dict(resident.model.named_parameters())) == before
    alone: dict[str, Any] = {NO_ADAPTER: bare}
    for seed, name in enumerate(names):
        weights = adapter_weights(bare, LORAS[name], seed)
        resident.add_adapter(name, LORAS[name], weights)
        alone[name] = peft_model(CONFIGS[family], 0, LORAS[name], weights)
    adapters = [names[1], NO_ADAPTER, names[0], names[1]]
    batch = Batch(resident)
    logits_BV = batch.join(PROMPTS, adapters)
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(4):
        expected_BV = torch.stack([last_logits(alone[name], ids) for name, ids in zip(adapters, rows, strict=True)])
        assert torch.allclose(logits_BV, expected_BV, atol=1e-4)
        for ids, token in zip(rows, logits_BV.argmax(-1).tolist(), strict=True):
            ids.append(token)
        logits_BV = batch.step([ids[-1] for ids in rows])
    unlike_V = last_logits(alone[names[0]], PROMPTS[0]) - last_logits(alone[NO_ADAPTER], PROMPTS[0])
    assert unlike_V.abs().max() > 0.1
    assert digest(dict(resident.model.named_parameters())) == before
    resident.remove_adapter(names[0])
    assert not any(f".{names[0]}." in name for name, _ in resident.model.named_parameters())
    left_V = Batch(resident).join([PROMPTS[0]], [names[1]])[0]
    assert torch.allclose(left_V, last_logits(alone[names[1]], PROMPTS[0]), atol=1e-4)
    assert digest(dict(resident.model.named_parameters())) == before


def test_adapters_are_loaded_on_demand_and_the_longest_unused_makes_room(bases: MemoryBases) -> None:
    models = bases.served(ResidentLimits(max_adapters=2))
    bare = with_adapters(bases, models, "one", "two", "three")
    own = {name: models.find(name).adapter for name in ("one", "two", "three")}
    assert models.names() == ["base", "one", "three", "two"]
    before = digest(dict(bare.named_parameters()))
    requests = [ask(name, PROMPTS[0]) for name in ("base", "one", "two", "three", "one")]
    together = generated(models, *requests)
    assert models.resident_adapters() == [own["three"], own["one"]]
    assert bases.num_reads == {"base": 1}
    assert together[1].text == together[4].text
    assert len({one.text for one in together}) == 4
    assert together[0].text == text_of(bases, PROMPTS[0], greedy_of(bare, PROMPTS[0]))
    assert digest(dict(models.resident_bases()[0].model.named_parameters())) == before
    # Three at once have no room: the third waits until one has gone.
    batcher = Batcher(models, EngineLimits())
    asked = submit(batcher, models, *(ask(name, PROMPTS[0], 4) for name in ("one", "two", "three", "base")))
    batcher.step()
    assert batcher.status() == EngineStatus(2, 2)
    drain(batcher)
    assert [one.text for one in asked[:3]] == [
        one.text for one in generated(models, *(ask(name, PROMPTS[0], 4) for name in ("one", "two", "three")))
    ]


def test_an_adapter_that_is_replaced_goes_on_for_those_who_have_it(bases: MemoryBases) -> None:
    models = bases.served()
    bare = with_adapters(bases, models, "one", "two")
    two = generated(models, ask("two", PROMPTS[0]))[0].text
    batcher = Batcher(models, EngineLimits())
    (old,) = submit(batcher, models, ask("one", PROMPTS[0]))
    batcher.step()
    lora = LoraConfig(rank=2)
    models.add_adapter("one", models.find("one").base, lora, adapter_weights(bare, lora, 1))
    (new,) = submit(batcher, models, ask("one", PROMPTS[0]))
    drain(batcher)
    assert new.text == two != old.text


def test_bases_make_room_for_each_other_and_are_waited_for(bases: MemoryBases) -> None:
    plain, other = random_model(CONFIGS["llama"]), random_model(CONFIGS["llama"], seed=1)
    resident: list[weakref.ref[Any]] = []
    num_alive: list[int] = []

    def opened(base: Base) -> Any:
        num_alive.append(sum(model() is not None for model in resident))
        return bases.open(base)

    limits = ResidentLimits(bases_bytes=int(bytes_of(plain) * 1.5))
    models = ServedModels(opened, lambda base: bases.tokenizer, limits)
    models.add_base("plain", bases.add("plain", plain))
    models.add_base("other", bases.add("other", other))
    batcher = Batcher(models, EngineLimits())
    asked = submit(batcher, models, *(ask(name, PROMPTS[0]) for name in ("plain", "other", "plain")))
    batcher.step()
    assert batcher.status() == EngineStatus(1, 2)  # nobody is overtaken
    resident.append(weakref.ref(models.resident_bases()[0].model))
    drain(batcher)
    assert bases.num_reads == {"plain": 2, "other": 1}
    assert len(models.resident_bases()) == 1
    # Opened for the facts twice, two sizes and three loads; the first model is gone before the second is loaded.
    assert num_alive == [0] * 7
    assert [one.text for one in asked] == [
        text_of(bases, PROMPTS[0], greedy_of(model, PROMPTS[0])) for model in (plain, other, plain)
    ]


def test_two_bases_generate_side_by_side(bases: MemoryBases) -> None:
    both = [random_model(CONFIGS[family]) for family in ("llama", "gpt2")]
    models = bases.served()
    for number, model in enumerate(both):
        models.add_base(f"base{number}", bases.add(f"base{number}", model))
    batcher = Batcher(models, EngineLimits())
    asked = submit(batcher, models, ask("base0", PROMPTS[0]), ask("base1", PROMPTS[0]))
    batcher.step()
    assert batcher.status() == EngineStatus(2, 0)
    drain(batcher)
    assert [one.text for one in asked] == [text_of(bases, PROMPTS[0], greedy_of(model, PROMPTS[0])) for model in both]


def test_bf16_holds_half_and_tied_weights_stay_tied(bases: MemoryBases) -> None:
    base = bases.add("base", random_model(CONFIGS["gpt2"]))
    full = ResidentBase(bases.open(base), torch.float32, CPU)
    half = ResidentBase(bases.open(base), torch.bfloat16, CPU)
    assert half.num_bytes * 2 == full.num_bytes == bytes_of(build(CONFIGS["gpt2"], "meta"))
    assert half.position_bytes * 2 == full.position_bytes == 2 * 2 * 32 * 4
    model: Any = half.model
    assert model.lm_head.weight is model.transformer.wte.weight
    half.add_adapter("one", LORAS["first"], adapter_weights(full.model, LORAS["first"], 0))
    assert {value.dtype for name, value in half.model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert Batch(half).join(PROMPTS, ["one", NO_ADAPTER, "one", "one"]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_is_no_view_of_what_was_read(bases: MemoryBases, dtype: torch.dtype) -> None:
    """What was read may be a mapped file, which changes under whoever looks at it."""
    base = bases.add("base", random_model(CONFIGS["gpt2"]))
    tensors = bases.open(base)
    read: list[torch.Tensor] = []

    class Kept:
        config = tensors.config
        names = tensors.names

        def tensor(self, name: str) -> torch.Tensor:
            read.append(tensors.tensor(name).to(dtype))
            return read[-1]

    resident = ResidentBase(Kept(), dtype, CPU)
    before = last_logits(resident.model, PROMPTS[0])
    for tensor in read:
        tensor.zero_()
    assert torch.equal(last_logits(resident.model, PROMPTS[0]), before)


def test_what_cannot_be_loaded_fails_alone(bases: MemoryBases) -> None:
    models = bases.served(ResidentLimits(bases_bytes=200_000))
    bare = with_adapters(bases, models, "good")
    base, lora = models.find("base").base, LoraConfig(rank=2)
    weights = adapter_weights(bare, lora, 0)
    lacking = dict(list(weights.items())[1:])
    models.add_adapter("lacking", base, lora, lacking)
    models.add_adapter("large", base, LoraConfig(rank=3), weights)
    models.add_adapter("nowhere", base, LoraConfig(rank=2, target_modules=("q_prj",)), weights)
    models.add_base("huge", bases.add("huge", build({**CONFIGS["llama"], "hidden_size": 64})))
    broken = random_model(CONFIGS["llama"], seed=2)
    broken.model.norm.weight.fill_(float("nan"))
    models.add_base("damaged", bases.add("damaged", broken))
    names = ("good", "lacking", "large", "nowhere", "huge", "good", "damaged")
    first, *failed, second, damaged = generated(models, *(ask(name, PROMPTS[0]) for name in names))
    assert first.text == second.text
    patterns = ["lacks the tensor .*lora_A", "has shape .* say", "matches no module", "takes 0.00 GiB of memory, but"]
    kinds = [CheckpointError, CheckpointError, ConfigError, ConfigError]
    for one, pattern, kind in zip([*failed], patterns, kinds, strict=True):
        with pytest.raises(kind, match=pattern):
            raise one.error
        assert "\n" not in str(one.error)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        raise damaged.error
    bases.missing.add("model.layers.1.mlp.up_proj.weight")
    models.add_base("missing", bases.add("missing", random_model(CONFIGS["llama"])))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        raise generated(models, ask("missing", PROMPTS[0]))[0].error


def test_a_checkpoint_is_verified_once_for_all_its_tensors(
    bases: MemoryBases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lora = CONFIGS["llama"], LORAS["first"]
    base = bases.add("base", random_model(config))
    weights = CheckpointWeights(lora_checkpoint(tmp_path / "checkpoint", base, config, lora))
    verified: list[str] = []

    def verify(directory: str, entry: FileEntry) -> str:
        verified.append(entry.file)
        return verified_file(directory, entry)

    monkeypatch.setattr(shard, "verified_file", verify)
    read = dict(weights.items())
    assert len(read) == len(weights) > 1
    assert len(verified) == 1
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    resident = ResidentBase(bases.open(base), torch.float32, CPU)
    verified.clear()
    resident.add_adapter("one", lora, weights)
    assert len(verified) == 1
