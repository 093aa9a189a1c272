"""Every key of a model's config is used, refused or named before training starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bases import FAMILIES, write_checkpoint
from support.micro import MICRO_LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.core.data.manifest import Manifest
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.model import check
from gradstream.core.model.model import build, inventory, load_config
from gradstream.core.model.trial import describe
from gradstream.core.pretrained.export import write_huggingface
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import LearningRateScheduleConfig, Recipe

MANIFEST = Manifest(token_dtype="uint16", vocab_size=60, end_of_text_id=3, tokenizer_sha256="0" * 64, shards=())
GLM = {"model_type": "glm", "head_dim": 8, "pad_token_id": None} | {
    key: MICRO_LLAMA[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
}


def recipe(config: dict[str, Any], **sections: Any) -> Recipe:
    training = {"num_steps": 3, "sequence_length": 8}
    return parse_recipe(
        {"name": "checked", "model": {"config": config}, "training": training, "data": {"path": "data"}} | sections
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config asks for quantized weights"),
        ({"text_config": {"quantization_config": {}}}, "text_config.quantization_config asks for quantized weights"),
        ({"rms_norm_eps": "1e-5"}, "model.config.rms_norm_eps is the text '1e-5', and a number is meant"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "model.config.rope_parameters.rope_theta is the text '1e6'"),
        ({"vocab_size": 304, "pad_token_id": 32000}, "pad_token_id 32000 is outside of the vocabulary of 304; set it"),
        ({"vocab_size": 304, "eos_token_id": [0, 304]}, "eos_token_id 304 is outside of the vocabulary of 304"),
        ({"text_config": {"vocab_size": 9, "bos_token_id": 9}}, "text_config.bos_token_id 9 is outside"),
        (
            {"vocab_size": 304, "eos_token_id": [0, 151643], "bos_token_id": 151643, "pad_token_id": 304},
            "model.config.eos_token_id 151643 and model.config.bos_token_id 151643 and model.config.pad_token_id 304 "
            "are outside of the vocabulary of 304; set each to null or to a token's id",
        ),
        (
            {"vocab_size": 304, "pad_token_id": -1},
            "pad_token_id -1 is outside of the vocabulary of 304; set it to null",
        ),
    ],
)
def test_a_config_that_no_model_can_be_trained_from(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe({"model_type": "llama"} | config)
    assert message in str(refused.value)
    if "quant" in message or "text '" in message:
        with pytest.raises(ConfigError, match=r"model\.config"):
            build(MICRO_LLAMA | config, "meta")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 3.2e1, "is 32.0, and llama expects a whole number without point or exponent"),
        ("initializer_range", 0, "is 0, and llama expects a number with a point, as 1.0"),
        ("tie_word_embeddings", "no", "is 'no', and llama expects true or false"),
        ("hidden_act", 3, "is 3, and llama expects a text"),
    ],
)
def test_a_value_of_another_kind_is_named_with_the_kind_that_is_expected(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.config\.{key} {expected}; correct it$"):
        build(MICRO_LLAMA | {key: value}, "meta")


@pytest.mark.parametrize("num_layers", [0, -1, 5000])
def test_a_model_has_layers(num_layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"model.config has {num_layers} layers; 1 to 1024 can be built"):
        build(MICRO_LLAMA | {"num_hidden_layers": num_layers}, "meta")


def test_what_is_no_number_to_compute_with_may_be_a_text() -> None:
    harmless = {
        "transformers_version": "4.40",
        "id2label": {"0": "0"},
        "quantization_config": None,
        "rope_scaling": None,
    }
    assert recipe(MICRO_LLAMA | harmless).model.config["transformers_version"] == "4.40"
    build(MICRO_LLAMA | harmless, "meta")


def test_a_familys_own_padding_outside_of_the_vocabulary_is_named() -> None:
    config = {key: value for key, value in GLM.items() if key != "pad_token_id"}
    with pytest.raises(
        ConfigError, match=r"pad_token_id 151329 \(the default of glm\) is outside of the vocabulary of"
    ):
        build(config, "meta")
    filled = check.with_ends(recipe(config), MANIFEST).model.config
    assert filled["pad_token_id"] is None
    assert describe(filled)["padding_ids"] == []


@pytest.mark.parametrize("nested", [False, True])
def test_ends_of_text_are_filled_in_or_must_agree(nested: bool) -> None:
    def config(**ids: Any) -> dict[str, Any]:
        return {"model_type": "llama", "text_config": ids} if nested else {"model_type": "llama", **ids}

    filled = check.with_ends(recipe(config()), MANIFEST).model.config
    inner = filled["text_config"] if nested else filled
    assert (inner["eos_token_id"], inner["bos_token_id"], inner["pad_token_id"]) == (3, 3, None)
    agreed = recipe(config(eos_token_id=[5, 3], bos_token_id=3, pad_token_id=1))
    assert check.with_ends(agreed, MANIFEST) == agreed
    for key in ("eos_token_id", "bos_token_id"):
        with pytest.raises(DataError, match=rf"{key} is 2, and the documents of the data set .* token 3; set model"):
            check.with_ends(recipe(config(**{key: 2})), MANIFEST)
    with pytest.raises(DataError) as refused:
        check.with_ends(recipe(config(eos_token_id=2, bos_token_id=1)), MANIFEST)
    prefix = "model.config.text_config." if nested else "model.config."
    assert str(refused.value) == (
        f"{prefix}eos_token_id is 2 and {prefix}bos_token_id is 1, and the documents of the data set data end with and "
        f"begin after token 3; set {prefix}eos_token_id=3 and {prefix}bos_token_id=3, or leave them out"
    )


def test_padding_must_not_be_what_is_trained_on() -> None:
    model = build(MICRO_LLAMA | {"pad_token_id": 5}, "meta")
    assert check.padding_ids(model) == [5]
    check.check_padding([5], MANIFEST, special={5})
    check.check_padding([60], MANIFEST, special=())  # beyond the data's vocabulary
    for token, special in ((5, ()), (3, {3})):
        with pytest.raises(DataError, match=f"pad_token_id is {token}, .* would never be trained"):
            check.check_padding([token], MANIFEST, special)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, ["max_position_embeddings", 2048]),
        ({"model_type": "gpt2"}, ["max_position_embeddings", 1024]),
        ({"model_type": "gpt2", "n_positions": 64}, ["max_position_embeddings", 64]),
        ({"model_type": "mpt", "max_seq_len": 96}, ["max_seq_len", 96]),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 40}}, ["max_position_embeddings", 40]),
        ({"model_type": "bloom"}, None),
    ],
)
def test_positions_are_the_familys_own_where_the_config_says_none(config: dict[str, Any], expected: Any) -> None:
    found = check.positions(load_config(config))
    assert found == (tuple(expected) if expected else None)
    if found is not None:
        check.check_positions(found, found[1], config["model_type"])
        with pytest.raises(ConfigError, match=rf"{found[1] + 1} is longer than the {found[1]} positions of"):
            check.check_positions(found, found[1] + 1, config["model_type"])


def test_sizes_that_do_not_go_together_are_refused_before_a_worker_computes() -> None:
    """Built it can be; a pass of shapes alone shows it. No memory is taken: this one would have 400 GB."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 32}
    with pytest.raises(ConfigError, match=r"its sizes do not match .*size of tensor a \(4\) must match"):
        describe(MICRO_LLAMA | heads)
    large = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 24, "num_attention_heads": 128}
    assert describe(MICRO_LLAMA | large | {"num_key_value_heads": 8})["unknown_keys"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_as_transformers_writes_it_has_no_unknown_key(family: str) -> None:
    """Also one of the hub: with the keys of older versions and of tools."""
    written = build(FAMILIES[family], "meta").config.to_dict()
    older = {"torch_dtype": "float16", "rope_theta": 1e4, "_name_or_path": "x", "use_cache": True, "do_sample": True}
    found = describe({**written, **older})
    assert (found["unknown_keys"], found["misspelt"]) == ([], "")


def test_an_unknown_key_is_named() -> None:
    found = describe(MICRO_LLAMA | {"favourite_colour": "blue", "nothing": None})
    assert (found["unknown_keys"], found["misspelt"]) == (["favourite_colour"], "")
    assert check.unknown_warning(["a"], "llama") == ["model.config: a is not read by llama and changes nothing"]
    assert check.unknown_warning(list("abcdefg"), "llama") == [
        "model.config: a, b, c, d, e and 2 more are not read by llama and change nothing"
    ]
    assert "did you mean 'rms_norm_eps'?" in describe(MICRO_LLAMA | {"rms_norm_epss": 1e-5})["misspelt"]


@pytest.mark.parametrize(
    ("schedule", "num_steps", "message"),
    [
        ({"warmup_steps": 2000}, 3, "warmup_steps 2000 is longer than the run of 3 steps"),
        ({"kind": "constant", "warmup_steps": 4}, 3, "only reaches 75.0% of"),
        ({"kind": "wsd", "decay_steps": 50, "warmup_steps": 3}, 3, "decay_steps 50 is longer than the run of 3 steps"),
        ({"kind": "wsd", "decay_steps": 6, "warmup_steps": 6}, 10, "are together longer than the run of 10 steps"),
        ({"kind": "cosine", "decay_steps": 5}, 10, "decay_steps 5 changes nothing with kind cosine"),
        ({"kind": "wsd"}, 10, "a wsd learning-rate schedule without a decay is a constant one"),
        ({"warmup_steps": 3}, 3, ""),
        ({"kind": "wsd", "decay_steps": 5, "warmup_steps": 5}, 10, ""),
        ({"kind": "constant"}, 1, ""),
    ],
)
def test_a_schedule_longer_than_the_run_is_a_warning(schedule: dict[str, Any], num_steps: int, message: str) -> None:
    found = check.learning_rate_schedule_warnings(LearningRateScheduleConfig(**schedule), num_steps)
    assert len(found) == bool(message)
    assert message in "".join(found)


def test_a_recipe_says_what_has_no_use() -> None:
    found = check.recipe_warnings(
        recipe(MICRO_LLAMA, cluster={"min_workers": 9}, pipeline={"schedule": "gpipe"}, schedule={"warmup_steps": 9})
    )
    assert [line.split()[0] for line in found] == [
        "schedule.warmup_steps",
        "pipeline.schedule",
        "cluster.min_workers",
    ]
    assert check.recipe_warnings(recipe(MICRO_LLAMA)) == []


def test_shapes_alone_are_built() -> None:
    assert all(parameter.device == torch.device("meta") for parameter in build(MICRO_LLAMA, "meta").parameters())


def test_an_export_loads_by_itself_and_stops_at_the_datas_end(tmp_path: Path) -> None:
    """Without the keys that would have transformers look for code, kernels or quantized weights."""
    odd = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "quantization_config": None, "torch_dtype": "bfloat16"}
    architecture = {key: value for key, value in (MICRO_LLAMA | odd).items() if not key.endswith("os_token_id")}
    manifest = MANIFEST.model_copy(update={"end_of_text_id": 0})
    config = check.with_ends(recipe(architecture), manifest).model.config
    tensors = inventory(config)
    silent = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in tensors}  # so the first token is likeliest
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, tensors, silent)
    write_huggingface(checkpoint, tmp_path)
    assert {"auto_map", "quantization_config", "torch_dtype"}.isdisjoint(
        json.loads((tmp_path / "config.json").read_text())
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.dtype, model.generation_config.eos_token_id) == (torch.float32, 0)
    start_BT = torch.tensor([[5, 6]])
    assert model.generate(start_BT, do_sample=False, max_new_tokens=9, pad_token_id=0).tolist() == [[5, 6, 0]]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 0


def test_a_constructor_that_computes_with_values_is_no_reason_to_refuse() -> None:
    """Gemma 3's part that sees asks a tensor for a number, which shapes without values have not."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64}
    config = {
        "model_type": "gemma3",
        "text_config": text | {"pad_token_id": None},
        "vision_config": {**small, "image_size": 28, "patch_size": 14},
    }
    assert describe(config)["architecture"] == "Gemma3ForConditionalGeneration"
