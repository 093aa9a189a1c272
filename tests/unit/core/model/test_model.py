"""Models: the inventory equals the model, and initial weights are a function of (config, seed) alone."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, derive_seed, forward_units, initial_weights, inventory, load_config

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
CONFIGS["llama-tied"] = CONFIGS["llama"] | {"tie_word_embeddings": True}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


@every_model
def test_the_inventory_is_the_models_parameters(config: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(load_config(config))
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = inventory(config)
    assert {tensor.name: tensor.shape for tensor in tensors} == real
    assert len(tensors) == len(real)
    assert sum(tensor.num_elements for tensor in tensors) == model.num_parameters()
    for tensor in tensors:
        assert tensor.decay == (len(tensor.shape) > 1), tensor


@every_model
def test_tensors_come_in_the_order_in_which_the_forward_pass_uses_them(config: dict[str, Any]) -> None:
    model = build(config)
    used: list[int] = []
    for number, (_, unit) in enumerate(forward_units(model)):
        unit.register_forward_pre_hook(lambda *_, number=number: used.append(number))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    with_tensors = [tensor.unit for tensor in inventory(config)]
    assert with_tensors == sorted(with_tensors)
    first_use = [unit for unit in dict.fromkeys(used) if unit in with_tensors]
    assert first_use == sorted(set(with_tensors))


@every_model
def test_units_cover_every_parameter_once(config: dict[str, Any]) -> None:
    model = build(config)
    units = forward_units(model)
    assert len({name for name, _ in units}) == len(units)
    modules = [id(module) for _, unit in units for module in unit.modules()]
    assert len(modules) == len(set(modules)), "units do not overlap"
    inside = {id(parameter) for _, unit in units for parameter in unit.parameters()}
    assert inside == {id(parameter) for parameter in model.parameters()}
    layers = [name for name, _ in units if name.rsplit(".", 1)[-1].isdigit()]
    assert len(layers) == 2


def test_a_tied_tensor_appears_once_in_the_first_unit() -> None:
    names = [tensor.name for tensor in inventory(CONFIGS["llama-tied"])]
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in [tensor.name for tensor in inventory(CONFIGS["llama"])]


@every_model
def test_initial_weights_cover_the_inventory(config: dict[str, Any]) -> None:
    weights = dict(initial_weights(config, seed=0))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        tensor.name: tensor.shape for tensor in inventory(config)
    }
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all(), name


@every_model
def test_initial_weights_do_not_depend_on_what_is_wanted(config: dict[str, Any]) -> None:
    whole = dict(initial_weights(config, seed=5))
    for name, expected in whole.items():
        found = dict(initial_weights(config, 5, {name}))
        assert list(found) == [name]
        assert torch.equal(found[name], expected), name
    halves = [set(sorted(whole)[::2]), set(sorted(whole)[1::2])]
    together = {name: tensor for half in halves for name, tensor in initial_weights(config, 5, half)}
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    assert dict(initial_weights(config, 5, set())) == {}


@every_model
def test_the_seed_changes_every_matrix_and_the_process_state_none(config: dict[str, Any]) -> None:
    first = dict(initial_weights(config, 1))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = dict(initial_weights(config, 1))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    other = dict(initial_weights(config, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other[name]), name


@every_model
def test_initial_weights_are_distributed_as_transformers_makes_them(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(config))
    ours = dict(initial_weights(config, 0))
    for name, parameter in model.named_parameters():
        theirs = parameter.detach()
        if theirs.std() == 0:  # norms and biases
            assert torch.equal(ours[name], theirs), name
        else:
            assert 0.75 < float(ours[name].std() / theirs.std()) < 1.33, name
            assert abs(float(ours[name].mean())) < 4 * float(theirs.std()) / theirs.numel() ** 0.5, name


def test_two_threads_at_once_do_not_disturb_each_other() -> None:
    """A shard that was dropped while it loaded still draws in its thread when the next one loads."""
    expected = dict(initial_weights(CONFIGS["llama"], 7))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: dict(initial_weights(CONFIGS["llama"], 7)), range(12)):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_get_different_weights() -> None:
    weights = dict(initial_weights(CONFIGS["llama"], 0))
    assert not torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.1.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "did you mean"),
        ({}, "model_type None is not known"),
        ({"model_type": 3}, "model_type 3 is not known"),
        (CONFIGS["llama"] | {"num_attention_heads": 0}, "not a valid llama config"),
        (CONFIGS["llama"] | {"hidden_size": "wide"}, "hidden_size is 'wide', and llama expects a whole number"),
        ({"model_type": "clip"}, "model.config"),
    ],
)
def test_a_config_of_which_no_model_can_be_made(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        inventory(config)
    assert "\n" not in str(caught.value)


def test_seeds_are_stable_over_time_and_processes() -> None:
    """A change here changes every trajectory: it must be made on purpose."""
    assert derive_seed(1, "init", "model.layers.0") == derive_seed("1", "init", "model.layers.0")
    assert derive_seed(0, "step", 0, 0, 0) == 7071691480557895051 < 2**63
    assert len({derive_seed(0, "step", step, slot) for step in range(20) for slot in range(20)}) == 400
