"""Exports of fine-tunings: peft and transformers compute the same with them as the workers did."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.bases import (
    CHAT_TEMPLATE,
    FAMILIES,
    adapted_model,
    change_json,
    full_checkpoint,
    lora_checkpoint,
    save_base,
)
from support.micro import MICRO_LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.core.checkpoint.weights_files import safetensors_file, sent_pieces, write_weights
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.pretrained.base import BaseReader, find_base
from gradstream.core.pretrained.export import export_huggingface
from gradstream.core.recipe.fine_tuning import Base, FineTuning, LoraConfig
from gradstream.core.storage.pool import StorageThreads
from gradstream.core.storage.tensor_files import TensorSpec
from gradstream.services.fine_tuning.export import directories
from gradstream.services.fine_tuning.export.directories import (
    CardFacts,
    DataFacts,
    Score,
    export_adapter,
    export_merged,
    model_card,
    tensor_bytes,
)

IDS_BT = torch.tensor([[4, 9, 11, 5, 7, 30, 63, 2], [1, 8, 8, 12, 40, 41, 3, 0]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS_BT).logits
    return found


def tuned(root: Path, family: str = "llama", lora: LoraConfig | None = None, **options: object) -> tuple[Path, str]:
    """A base's directory and the checkpoint of a LoRA job on it."""
    directory = save_base(root / "base", family, chat=True, **options)  # type: ignore[arg-type]
    base, config = find_base(str(directory))
    lora = lora or LoraConfig(rank=3, alpha=7)
    return directory, lora_checkpoint(root / "step-00000004", base, config, lora)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_peft_the_workers_logits(tmp_path: Path, family: str) -> None:
    base, checkpoint = tuned(tmp_path, family)
    export_adapter(checkpoint, tmp_path / "adapter", "the card")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    expected = logits(adapted_model(checkpoint, json.loads((base / "config.json").read_text()), base))
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(before, expected, atol=1e-2)  # the adapter does something
    assert (tmp_path / "adapter" / "README.md").read_text() == "the card"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert (tokenizer("a b")["input_ids"], tokenizer.chat_template) == ([4, 5], CHAT_TEMPLATE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_gives_the_workers_logits(tmp_path: Path, family: str) -> None:
    base, checkpoint = tuned(tmp_path, family, LoraConfig(rank=4, alpha=6, rslora=True))
    export_merged(checkpoint, tmp_path / "merged", "the card")
    expected = logits(adapted_model(checkpoint, json.loads((base / "config.json").read_text()), base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / "README.md").read_text() == "the card"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tokenizer("a b")["input_ids"], tokenizer.chat_template) == ([4, 5], CHAT_TEMPLATE)
    assert find_base(str(tmp_path / "merged"))[0].kind == "huggingface"  # to go on from


def test_merged_weights_are_those_of_peft(tmp_path: Path) -> None:
    base, checkpoint = tuned(tmp_path, "gpt2")
    export_adapter(checkpoint, tmp_path / "adapter", "")
    export_merged(checkpoint, tmp_path / "merged", "")
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = dict(peft_model.merge_and_unload().named_parameters())
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_bf16_base_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, and whole where there is no adapter; several files with an index, as the base itself."""
    lora = LoraConfig(rank=2, target_modules=("q_proj", "mlp.down_proj"))
    base, checkpoint = tuned(tmp_path, "llama", lora, dtype=torch.bfloat16, max_shard_size="5KB")
    monkeypatch.setattr(directories, "EXPORT_FILE_BYTES", 4096)
    export_merged(checkpoint, tmp_path / "merged", "")
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    old = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    adapters = adapted_model(checkpoint, json.loads((base / "config.json").read_text()), base)
    tensors = dict(adapters.named_parameters())
    changed = set()
    for name, parameter in merged.named_parameters():
        module = name.removesuffix(".weight")
        a, b = (tensors.get(f"{module}.lora_{letter}.default.weight") for letter in "AB")
        if a is None or b is None:
            assert torch.equal(parameter, old[name]), name
        else:
            changed.add(name.split(".", 3)[-1])
            assert torch.equal(parameter, (old[name].float() + b @ a * lora.scaling).to(torch.bfloat16)), name
    assert changed == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}


def test_target_modules_are_named_as_people_do(tmp_path: Path) -> None:
    """By the last parts of their names, where these mean nothing else."""

    def targets(name: str, family: str, modules: tuple[str, ...] | None) -> list[str]:
        lora = LoraConfig(rank=2) if modules is None else LoraConfig(rank=2, target_modules=modules)
        _, checkpoint = tuned(tmp_path / name, family, lora)
        export_adapter(checkpoint, tmp_path / name / "adapter", "")
        config = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / name / "base")
        assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 16, "CAUSAL_LM")
        assert config["fan_in_fan_out"] == (family == "gpt2")
        return sorted(config["target_modules"])

    assert targets("all", "gpt2", None) == ["c_attn", "c_fc", "c_proj"]
    assert targets("some", "llama", ("q_proj", "v_proj")) == ["q_proj", "v_proj"]
    layers = [f"transformer.h.{layer}.attn.c_proj" for layer in range(2)]
    assert targets("ambiguous", "gpt2", ("attn.c_proj",)) == layers  # mlp.c_proj has the same last part


def test_a_full_fine_tuning(tmp_path: Path) -> None:
    """Its checkpoint is fp32, whatever its base was in, and transformers must load it so."""
    base, config = find_base(str(save_base(tmp_path / "base", dtype=torch.bfloat16, chat=True)))
    checkpoint = full_checkpoint(tmp_path / "step-00000004", config, FineTuning(base=base, method="full"))
    export_merged(checkpoint, tmp_path / "model", "the card")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reader = BaseReader(find_base(checkpoint)[0])
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, reader.tensor(name)), name
    assert (tmp_path / "model" / "README.md").read_text() == "the card"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="is of a full fine-tuning, which has no adapter; export it merged"):
        export_adapter(checkpoint, tmp_path / "adapter", "")
    pretrained = full_checkpoint(tmp_path / "step-00000005", MICRO_LLAMA)
    with pytest.raises(ConfigError, match="is not of a fine-tuning"):
        export_merged(pretrained, tmp_path / "pretrained", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "step-00000004", "step-00000005"]


def test_an_adapter_of_a_checkpoint(tmp_path: Path) -> None:
    """The base may be a checkpoint: merged it is a Hugging Face model like any other."""
    base, config = find_base(full_checkpoint(tmp_path / "base", MICRO_LLAMA))
    checkpoint = lora_checkpoint(tmp_path / "step-00000004", base, config, LoraConfig(rank=2))
    export_merged(checkpoint, tmp_path / "merged", "")
    export_huggingface(base.path, tmp_path / "plain")
    expected = logits(adapted_model(checkpoint, config, tmp_path / "plain"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    export_adapter(checkpoint, tmp_path / "adapter", "")
    for name in ("merged", "adapter"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<end>"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)


def test_a_merged_model_holds_what_only_a_constructor_sets(tmp_path: Path) -> None:
    """Apertus' activations have constants that transformers does not set when it loads a model."""
    config = {key: value for key, value in MICRO_LLAMA.items() if key != "hidden_act"} | {"model_type": "apertus"}
    base, config = find_base(full_checkpoint(tmp_path / "base", config))
    checkpoint = lora_checkpoint(tmp_path / "step-00000004", base, config, LoraConfig(rank=2))
    export_merged(checkpoint, tmp_path / "merged", "")
    export_huggingface(base.path, tmp_path / "plain")
    found, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    assert found.keys() == plain.keys()
    constants = [name for name in found if name.rsplit(".", 1)[-1] in ("beta", "eps")]
    assert constants
    for name in constants:
        assert torch.equal(found[name], plain[name]), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(adapted_model(checkpoint, config, tmp_path / "plain"))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_a_head_of_its_own_is_merged_the_right_way_round(tmp_path: Path) -> None:
    """GPT-2's modules have their weights transposed, its head has not."""
    config = FAMILIES["gpt2"] | {"tie_word_embeddings": False}
    base, config = find_base(full_checkpoint(tmp_path / "base", config))
    lora = LoraConfig(rank=2, target_modules=("c_attn", "lm_head"))
    checkpoint = lora_checkpoint(tmp_path / "step-00000004", base, config, lora)
    export_merged(checkpoint, tmp_path / "merged", "")
    export_huggingface(base.path, tmp_path / "plain")
    expected = logits(adapted_model(checkpoint, config, tmp_path / "plain"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, checkpoint = tuned(tmp_path)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").write_text("mine")
    for write in (export_adapter, export_merged):
        with pytest.raises(CheckpointError, match="is not empty; choose another directory"):
            write(checkpoint, occupied, "")
    assert [path.name for path in occupied.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    export_merged(checkpoint, tmp_path / "empty", "")  # an empty one is taken
    # A base that goes bad half-way: nothing is left, not under another name either.
    before = sorted(tmp_path.iterdir())
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="the base has changed since the job was created"):
        export_merged(checkpoint, tmp_path / "merged", "")
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        export_adapter(checkpoint, tmp_path / "adapter", "")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_adapter(checkpoint, base / "config.json" / "adapter", "")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    _, checkpoint = tuned(tmp_path)
    gpt2 = find_base(str(save_base(tmp_path / "gpt2", "gpt2")))[0]
    manifest = json.loads((Path(checkpoint) / "manifest.json").read_text())
    manifest["recipe"]["fine_tuning"]["base"] = gpt2.model_dump(mode="json")
    change_json(Path(checkpoint) / "manifest.json", recipe=manifest["recipe"])
    with pytest.raises(CheckpointError, match=r"no weight for the adapter of 'model\.layers\.0\.mlp\.down_proj'"):
        export_merged(checkpoint, tmp_path / "merged", "")


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Of what is asked for, nothing is kept; the library reads what was written, in whatever order it came."""
    tensors = {
        "c": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.arange(5, dtype=torch.bfloat16),
        "b": torch.tensor(3.5),
        "d": torch.arange(12, dtype=torch.float16).reshape(3, 4).T,
    }
    kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    asked: list[str] = []

    def read(name: str) -> Iterator[memoryview]:
        asked.append(name)
        yield tensor_bytes(tensors[name])

    specs = [TensorSpec(name, directories.DTYPE_NAMES[dtype], shape) for name, dtype, shape in kinds]
    write_weights([safetensors_file("x.safetensors", specs, read)], tmp_path)
    assert asked == ["b", "c", "a", "d"]
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    file = safetensors_file("y.safetensors", specs, lambda name: iter([b"1234"]))
    with pytest.raises(ValueError, match="tensor 'c' is not the F32"):
        write_weights([file], tmp_path)


async def test_the_weights_are_sent_as_they_are_read_and_never_written(tmp_path: Path) -> None:
    _, checkpoint = tuned(tmp_path)
    export_merged(checkpoint, tmp_path / "written", "the card")
    made = export_merged(checkpoint, tmp_path / "sent", "the card", weights=False)
    written, sent = ({path.name for path in (tmp_path / name).iterdir()} for name in ("written", "sent"))
    assert written - sent == {"model.safetensors"}
    received = b""
    async for name, num_bytes, piece in sent_pieces(made, StorageThreads(), "/"):
        assert (name, num_bytes) == ("model.safetensors", (tmp_path / "written" / name).stat().st_size)
        assert 0 < len(piece) <= 1 << 20
        received += piece
    assert received == (tmp_path / "written" / "model.safetensors").read_bytes()


BASE = Base(kind="huggingface", path="/models/tiny", title="tiny: llama", files=(), sha256="ab" * 32)


def test_the_card_says_everything(tmp_path: Path) -> None:
    facts = CardFacts(
        name="signatures",
        version=40,
        base=BASE,
        method="lora",
        recipe={"seed": 7, "lora": LoraConfig(rank=4, target_modules=("q_proj",)).model_dump()},
        data=DataFacts(num_train=1234, num_validation=56, sha256=("cd" * 32,)),
        num_trained_parameters=98304,
        num_target_tokens=1_000_000,
        before=Score(loss=3.25, perplexity=25.79, num_prompts=32, num_exact=0),
        after=Score(loss=1.5, perplexity=4.4817, num_prompts=32, num_exact=20),
        description="Signatures from docstrings.",
    )
    card = model_card(facts, "adapter")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "tiny: llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["gradstream", "fine-tuning", "lora"],
    }
    for said in (
        "# signatures\n",
        "Signatures from docstrings.",
        "version 40",
        "PeftModel.from_pretrained",
        "| loss (nats a target token) | 3.2500 | 1.5000 |",
        "| perplexity | 25.790 | 4.482 |",
        "| exact matches | 0 of 32 | 20 of 32 |",
        "parameters trained: 98,304",
        "target tokens trained on: 1,000,000",
        "energy: not measured",
        "`/models/tiny`, sha256 `" + "ab" * 32,
        "1,234 examples to train on, 56 held out",
        "- sha256 `" + "cd" * 32,
    ):
        assert said in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 7
    assert recipe["lora"]["target_modules"] == ["q_proj"]
    front = yaml.safe_load(model_card(facts, "merged").split("---\n")[1])
    assert front["library_name"] == "transformers"


def test_the_card_says_what_nobody_measured() -> None:
    facts = CardFacts(
        name="x",
        version=1,
        base=BASE,
        method="full",
        recipe={},
        data=DataFacts(num_train=1, num_validation=1, sha256=()),
        after=Score(loss=1.0, perplexity=2.718),
    )
    card = model_card(facts, "merged")
    assert "energy: not measured" in card
    assert "target tokens trained on: not measured" in card
    assert "| perplexity | not measured | 2.718 |" in card
    assert "| exact matches | not measured | no prompts |" in card
    assert "lora" not in yaml.safe_load(card.split("---\n")[1])["tags"]
