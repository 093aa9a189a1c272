"""A worker's frozen base: its tensors, which never change and are shared by jobs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.fine_tuning import write_base
from support.tiny import GPT2, LLAMA, NO_DROPOUT
from torch import nn
from transformers import AutoModelForCausalLM

from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.model.frozen_modules import Held, HeldEmbedding, HeldLinear, HeldMatrix
from gradstream.core.model.lora import adapted_module, frozen_name
from gradstream.core.model.model import build, initial_weights, initialize_buffers, inventory
from gradstream.core.pretrained.base import find_base
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.worker.frozen import BaseStore

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8)
TIED = {**LLAMA, "tie_word_embeddings": True}
CONFIGS = {"llama": LLAMA, "tied": TIED, "gpt2": {**GPT2, **NO_DROPOUT}}


def filled(directory: Path, config: dict[str, Any], held: Held, store: BaseStore | None = None) -> nn.Module:
    """A model with adapters as a worker has it, its adapters at their first values."""
    base, _ = find_base(str(directory))
    model = build(config, "meta", LORA)
    initialize_buffers(model, "cpu")
    with torch.no_grad():
        for name, tensor in initial_weights(config, 1, lora=LORA):
            model.get_parameter(name).copy_(tensor)
    (store or BaseStore()).fill(model, base, held, CPU)
    return model.eval()


def digest(store: BaseStore) -> str:
    state = hashlib.sha256()
    for name, matrix in sorted(store._matrices.items()):
        state.update(name.encode() + matrix.values.contiguous().view(torch.uint8).numpy().tobytes())
    for name, vector in sorted(store._vectors.items()):
        state.update(name.encode() + vector.numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_leaves_the_base_as_it_is(name: str, tmp_path: Path) -> None:
    """To the digits of the matrices' rounding: fp32 exactly, the others nearly."""
    config = CONFIGS[name]
    base = write_base(tmp_path / "base", config)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(input_ids=ids).logits
        for held, tolerance in (("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05)):
            logits = filled(base, config, held)(input_ids=ids, use_cache=False).logits  # type: ignore[arg-type]
            assert float((logits - expected).abs().max() / expected.abs().max()) < tolerance, held


def test_training_changes_the_adapters_alone(tmp_path: Path) -> None:
    base, store = write_base(tmp_path / "base"), BaseStore()
    model = filled(base, LLAMA, "bf16", store).train()
    before = digest(store)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(5):
        logits = model(input_ids=torch.arange(24)[None], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], torch.arange(1, 24))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert digest(store) == before
    assert all(adapted_module(name) for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_jobs_share_the_base(tmp_path: Path) -> None:
    base, store = write_base(tmp_path / "base"), BaseStore()
    one, other = filled(base, LLAMA, "bf16", store), filled(base, LLAMA, "bf16", store)
    addresses = [
        {
            module.matrix.values.data_ptr()
            for module in model.modules()
            if isinstance(module, (HeldLinear, HeldEmbedding))
        }
        for model in (one, other)
    ]
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) == 16
    # Another way of holding it, or another base, takes its place.
    filled(base, LLAMA, "int8", store)
    assert {matrix.values.dtype for matrix in store._matrices.values()} == {torch.int8}
    filled(write_base(tmp_path / "other", seed=4), LLAMA, "int8", store)
    assert len(store._matrices) == 16


def test_what_no_stage_has_any_more_is_let_go(tmp_path: Path) -> None:
    store = BaseStore()
    filled(write_base(tmp_path / "base"), LLAMA, "bf16", store)
    whole = store.num_bytes
    layer = {name for name in [*store._matrices, *store._vectors] if name.startswith("model.layers.0.")}
    store.keep(layer)
    assert {*store._matrices, *store._vectors} == layer
    assert 0 < store.num_bytes < whole / 2
    store.keep(set())
    assert store.num_bytes == 0


def test_a_tied_head_holds_nothing_of_its_own(tmp_path: Path) -> None:
    model = filled(write_base(tmp_path / "base", TIED), TIED, "int8")
    held = [module for module in model.modules() if isinstance(module, (HeldLinear, HeldEmbedding))]
    assert held[-1].matrix is held[0].matrix


@pytest.mark.parametrize("held", get_args(Held))
def test_the_gradient_passes_through_what_is_held(held: Held) -> None:
    torch.manual_seed(0)
    matrix = HeldMatrix.of(torch.randn(6, 5), held)
    x = torch.randn(2, 3, 5, requires_grad=True)
    result = HeldLinear(matrix, torch.ones(6), transposed=False)(x)
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    plain = x.detach().clone().requires_grad_()
    (nn.functional.linear(plain, matrix.whole(torch.float32), torch.ones(6)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_int8_is_as_near_as_its_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]
    held = HeldMatrix.of(matrix, "int8")
    steps = matrix.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((held.whole(torch.float32) - matrix).abs() <= steps * 0.5001).all())
    assert held.num_bytes == matrix.numel() + 4 * 64
    assert not HeldMatrix.of(torch.zeros(3, 3), "int8").whole(torch.float32).any()


def test_a_base_that_has_changed_is_refused(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "base")
    base, _ = find_base(str(directory))
    write_base(directory, seed=9)
    model = build(LLAMA, "meta", LORA)
    with pytest.raises(CheckpointError, match="changed"):
        BaseStore().fill(model, base, "bf16", CPU)


@pytest.mark.parametrize("held", ["fp32", "bf16"])
def test_a_base_that_is_written_to_while_it_is_held(held: Held, tmp_path: Path) -> None:
    """What is held is no view of the file, also where it is held as the file has it."""
    directory = write_base(tmp_path / "base", dtype={"fp32": "float32", "bf16": "bfloat16"}[held])
    base, _ = find_base(str(directory))
    store = BaseStore()
    store.fill(build(LLAMA, "meta", LORA), base, held, CPU)
    before = digest(store)
    weights = directory / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as stream:  # in place: another file of that name would leave the mapped one alone
        stream.seek(size // 4)
        stream.write(bytes(size // 2))
    assert digest(store) == before


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_what_is_trained_are_the_adapters() -> None:
    tensors = inventory(LLAMA, LORA)
    assert all(adapted_module(tensor.name) for tensor in tensors)
    assert len(tensors) == 2 * 7 * LLAMA["num_hidden_layers"]
    assert {tensor.unit for tensor in tensors} == {1, 2}
    assert adapted_module(tensors[0].name) == "model.layers.0.self_attn.q_proj"
    assert frozen_name("a.q_proj.base_layer.weight") == "a.q_proj.weight"


def test_first_values_depend_on_seed_and_name_alone() -> None:
    every = dict(initial_weights(LLAMA, 1, lora=LORA))
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    (found,) = initial_weights(LLAMA, 1, {name}, LORA)
    assert torch.equal(found[1], every[name])
    assert float(found[1].abs().max()) <= 32**-0.5
    assert not torch.equal(dict(initial_weights(LLAMA, 2, lora=LORA))[name], every[name])
    assert not any(tensor.any() for name, tensor in every.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (LLAMA, ["q_prj"], "'q_prj' matches no module of the model; those that can have an adapter are q_proj, k_proj"),
        (LLAMA, ["embed_tokens"], "'embed_tokens' is not a linear module"),
        (TIED, ["q_proj", "lm_head"], "'lm_head' shares its weight with the embedding"),
    ],
)
def test_targets_that_cannot_be(config: dict[str, Any], targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(config, "meta", LoraConfig(target_modules=tuple(targets)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
