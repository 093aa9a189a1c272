"""Bases: every family is found and read correctly, in any slices; each error in a base is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.bases import CHAT_TEMPLATE, FAMILIES, change_json, full_checkpoint, lora_checkpoint, save_base
from support.micro import MICRO_LLAMA
from transformers import AutoModelForCausalLM

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError
from gradstream.core.pretrained import files as base_files
from gradstream.core.pretrained.base import BaseReader, find_base, load_tokenizer
from gradstream.core.recipe.fine_tuning import FineTuning, LoraConfig

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", chat=True)


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A llama base that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a base in one file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def check_equal(directory: Path, reader: BaseReader, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = dict(model.named_parameters())
    assert reader.names() == list(expected)
    for name, parameter in expected.items():
        assert reader.shape(name) == tuple(parameter.shape)
        assert reader.dtype(name) == reader.tensor(name).dtype == dtype
        assert torch.equal(reader.tensor(name), parameter.detach())
        values = reader.read(name, 0, parameter.numel())
        assert values.dtype == np.float32
        assert np.array_equal(values, parameter.detach().float().reshape(-1).numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    directory = save_base(tmp_path / "model", family)
    base, config = find_base(str(directory), "the base")
    assert (base.kind, base.path, base.title) == ("huggingface", str(directory), "the base")
    assert config == json.loads((directory / "config.json").read_text()) == BaseReader(base).config
    check_equal(directory, BaseReader(base), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = save_base(tmp_path / "model", "llama", dtype, max_shard_size="5KB")
    base, _ = find_base(str(directory))
    assert len(base.files) > 2
    check_equal(directory, BaseReader(base), dtype)


@pytest.mark.parametrize("head", [False, True])
def test_gpt2_files_without_the_prefix(tmp_path: Path, head: bool) -> None:
    """As the first ones were saved: bare names, buffers among the weights, the tied head there or not."""
    directory = save_base(tmp_path / "model", "gpt2")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        if head:
            bare["lm_head.weight"] = bare["wte.weight"].clone()
        tensors.clear()
        tensors.update(bare)

    rewrite(directory, change)
    base, _ = find_base(str(directory))
    check_equal(directory, BaseReader(base), torch.float32)


def test_known_buffers_and_copies_are_left_alone(directory: Path) -> None:
    """Rotary frequencies of older files, and the same weights in the layout of another library."""
    added("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")(directory)
    shutil.copyfile(directory / "model.safetensors", directory / "consolidated.safetensors")
    shutil.copyfile(directory / "model.safetensors", directory / "model.fp16.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"")
    check_equal(directory, BaseReader(find_base(str(directory))[0]), torch.float32)


def test_a_tied_tensor_under_its_other_name(tmp_path: Path) -> None:
    directory = save_base(tmp_path / "model", "llama-tied")
    whole = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    reader = BaseReader(find_base(str(directory))[0])
    assert torch.equal(reader.tensor("model.embed_tokens.weight"), whole)
    assert "lm_head.weight" not in reader.names()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseReader, dict[str, torch.Tensor]]:
    directory = save_base(tmp_path_factory.mktemp("bf16") / "model", "gpt2", torch.bfloat16)
    return BaseReader(find_base(str(directory))[0]), load_file(directory / "model.safetensors")


@given(data=st.data())
def test_any_slice_reads_right(halves: tuple[BaseReader, dict[str, torch.Tensor]], data: st.DataObject) -> None:
    reader, whole = halves
    name = data.draw(st.sampled_from(reader.names()))
    flat = whole[name].float().reshape(-1).numpy()
    begin = data.draw(st.integers(0, flat.size))
    end = data.draw(st.integers(begin, flat.size))
    values = reader.read(name, begin, end)
    assert np.array_equal(values, flat[begin:end])
    values[:] = 0  # it is the caller's
    assert np.array_equal(reader.read(name, begin, end), flat[begin:end])


def test_slices_outside_the_tensor_are_refused(pristine: Path) -> None:
    reader = BaseReader(find_base(str(pristine))[0])
    for begin, end in ((-1, 2), (3, 2), (0, 16 * 32 + 1)):
        with pytest.raises(ValueError, match=r"is not within tensor"):
            reader.read(NAME, begin, end)
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.nothing'"):
        reader.tensor("model.nothing")


def test_a_whole_tensor_is_a_view_of_the_file(pristine: Path) -> None:
    """Of a base that many processes hold, the machine has one copy."""
    reader = BaseReader(find_base(str(pristine))[0])
    first, second = reader.tensor(NAME), reader.tensor(NAME)
    assert first.data_ptr() == second.data_ptr()


def test_the_identity_is_that_of_weights_and_config(directory: Path, pristine: Path) -> None:
    first = find_base(str(pristine))[0]
    assert first.title == str(pristine)
    assert find_base(str(directory))[0].sha256 == first.sha256  # wherever it lies
    change_json(directory / "config.json", rms_norm_eps=1e-4)
    other = find_base(str(directory))[0]
    assert other.sha256 != first.sha256
    assert other.files == first.files
    rewrite(directory, lambda tensors: tensors[NAME].add_(1))
    assert find_base(str(directory))[0].files != first.files


def test_a_file_is_hashed_once(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = base_files.files.digest
    monkeypatch.setattr(base_files, "_digests", {})
    monkeypatch.setattr(base_files.files, "digest", lambda stream: hashed.append(stream) or real(stream))
    base, _ = find_base(str(pristine))
    BaseReader(base).read(NAME, 0, 4)
    BaseReader(base).tensor(NAME)
    find_base(str(pristine))
    assert len(hashed) == 1


def test_what_is_mapped_is_what_was_verified(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is put in the file's place between its check and its use."""
    other = save_base(tmp_path / "other", "gpt2")
    base, _ = find_base(str(directory))
    weights = directory / "model.safetensors"
    real = base_files.local_path

    def swapped(path: str) -> str:
        weights.rename(tmp_path / "kept")
        weights.symlink_to(other / "model.safetensors")
        return real(path)

    monkeypatch.setattr(base_files, "local_path", swapped)
    with pytest.raises(CheckpointError, match="has changed since it was verified"):
        BaseReader(base).tensor(NAME)


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    directory = save_base(tmp_path / "model", "llama", max_shard_size="5KB")
    base, _ = find_base(str(directory))
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(entry.file for entry in base.files if entry.file != index[NAME])
    (directory / other).unlink()
    reader = BaseReader(base)
    assert reader.read(NAME, 3, 40).size == 37
    name = next(name for name, file in index.items() if file == other)
    with pytest.raises(CheckpointError, match=other):
        reader.read(name, 0, 1)


def change_weights(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors[NAME].add_(1))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (change_weights, "model.safetensors"),
        (truncate, "model.safetensors"),
        (lambda directory: change_json(directory / "config.json", rms_norm_eps=1e-4), "config.json"),
    ],
)
def test_a_base_that_changed_is_found_out(directory: Path, change: Callable[[Path], None], file: str) -> None:
    base, _ = find_base(str(directory))
    change(directory)
    with pytest.raises(CheckpointError, match=f"{file}: the base has changed since the job was created"):
        BaseReader(base).read(NAME, 0, 1)


def test_a_base_that_is_gone(directory: Path) -> None:
    base, _ = find_base(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        BaseReader(base).read(NAME, 0, 1)
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        BaseReader(base)


def make_index(directory: Path) -> None:
    """An index whose second file is not there."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {NAME: "b.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def wrong_index(directory: Path) -> None:
    """An index that has a tensor in a file that has it not."""
    make_index(directory)
    save_file({"other": torch.ones(2)}, directory / "b.safetensors")


def escaping_index(directory: Path) -> None:
    make_index(directory)
    path = directory / "model.safetensors.index.json"
    shutil.copy(directory / "a.safetensors", directory.parent / "b.safetensors")
    path.write_text(path.read_text().replace("b.safetensors", "../b.safetensors"))


def to_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def without(*names: str) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda tensors: [tensors.pop(name) for name in names])


def replaced(tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda tensors: tensors.update({NAME: tensor}))


def config(**values: object) -> Callable[[Path], None]:
    return lambda directory: change_json(directory / "config.json", **values)


def untold_end(directory: Path) -> None:
    change_json(directory / "tokenizer_config.json", eos_token=None)
    for name in ("config.json", "generation_config.json"):
        change_json(directory / name, eos_token_id=None)


def untied_in_files(directory: Path) -> None:
    change_json(directory / "config.json", tie_word_embeddings=True)


def added(*names: str, shape: tuple[int, ...] = (16,)) -> Callable[[Path], None]:
    """Tensors beside those of the model."""
    return lambda directory: rewrite(directory, lambda tensors: tensors.update({n: torch.zeros(shape) for n in names}))


def biased(directory: Path) -> None:
    added(*(f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in range(2) for part in "qkvo"))(directory)


def third_layer(directory: Path) -> None:
    """As of a config whose num_hidden_layers somebody has lowered."""
    tensors = load_file(directory / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    save_file(tensors | {n.replace(".1.", ".2."): t.clone() for n, t in last.items()}, directory / "model.safetensors")


def twice(directory: Path) -> None:
    """A tensor in both files of a base, of which the index names one."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "a.safetensors")
    save_file({NAME: tensors[NAME] + 1}, directory / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {NAME: "b.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def beside(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(b"{}")


WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    ("no directory", shutil.rmtree, r"does not exist; nothing is downloaded"),
    ("no config", lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    ("config no JSON", lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
    ("config no object", lambda d: (d / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
    ("family", config(model_type="bloom"), r"'bloom'; .* llama, mistral, qwen2, qwen3, gpt2$"),
    ("config no model", config(num_attention_heads="two"), r"base .*model\.config"),
    ("quantized", config(quantization_config={"quant_method": "gptq"}), r"is quantized; take the model"),
    ("pickle", to_pickle, r"pytorch_model\.bin and no safetensors.*save_pretrained"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    ("index names a missing file", make_index, r"index\.json names b\.safetensors, which is not beside it"),
    ("index names a file elsewhere", escaping_index, r"names \.\./b\.safetensors, which is not beside it"),
    ("index is wrong", wrong_index, rf"b\.safetensors has no tensor '{NAME}', which model\.safetensors\.index"),
    ("truncated", truncate, r"model\.safetensors is truncated or not a safetensors file"),
    ("not safetensors", lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), r"not a safetensors file"),
    ("one tensor missing", without(NAME), rf"has no tensor '{NAME}', which"),
    ("tensors missing", without("lm_head.weight", "model.norm.weight"), r"'model\.norm\.weight' and 1 more"),
    ("shape", replaced(torch.ones(16, 33)), rf"'{NAME}' has the shape 16×33, and config\.json asks for 16×32"),
    ("dtype", replaced(torch.ones(16, 32, dtype=torch.float64)), rf"'{NAME}' is F64; only F32, BF16, F16"),
    ("tied but not equal", untied_in_files, r"'model\.embed_tokens\.weight' and 'lm_head\.weight' differ"),
    ("no tokenizer", lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json; write one"),
    ("broken tokenizer", lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be used"),
    ("biases", biased, r"'model\.layers\.0\.self_attn\.k_proj\.bias' and 7 more .*does not ask for; .*attention_bias"),
    ("a third layer", third_layer, r"has tensor 'model\.layers\.2\.\S+' and 8 more .*do not belong together"),
    ("LoRA tensors", added("model.layers.0.mlp.up_proj.lora_A.weight"), r"lora_A\.weight' in .*merge the adapter"),
    ("another head", added("v_head.summary.weight"), r"has tensor 'v_head\.summary\.weight' in model\.safetensors"),
    ("a bias like a buffer", added("model.layers.0.self_attn.bias"), r"has tensor 'model\.layers\.0\.self_attn\.bias'"),
    ("a tensor twice", twice, rf"'{NAME}' in a\.safetensors and in b\.safetensors"),
    ("adapter beside", beside("adapter_config.json"), r"adapter_config\.json beside its model, an adapter that would"),
    ("adapter's weights", beside("adapter_model.safetensors"), r"adapter_model\.safetensors beside its model"),
    (
        "other weights",
        beside("medusa_head.safetensors"),
        r"medusa_head\.safetensors beside model\.safetensors, and",
    ),
    ("older shards", beside("model-00001-of-00002.safetensors"), r"model-00001-of-00002\.safetensors beside"),
    ("no end of text", untold_end, r"says which token ends a text; set eos_token"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*case, id=name) for name, *case in WRONG])
def test_what_is_wrong_is_said_in_one_line(directory: Path, change: Callable[[Path], object], message: str) -> None:
    change(directory)
    with pytest.raises(GradstreamError, match=message) as raised:
        find_base(str(directory))
    assert isinstance(raised.value, ConfigError | CheckpointError)
    assert "\n" not in str(raised.value)
    assert str(directory) in str(raised.value)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "small", MICRO_LLAMA | {"vocab_size": 20})
    directory = save_base(tmp_path / "model", "small")
    with pytest.raises(ConfigError, match="has ids up to 29, and its model has 20 of them"):
        find_base(str(directory))


def test_a_path_that_is_no_directory_of_a_base(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; name the directory"):
        find_base(str(pristine / "model.safetensors"))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_base("nonsense://x/y")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter; merge it"):
        find_base(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "manifest.json").write_text('{"token_dtype": "uint16"}')
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="is a data set, not a model"):
        find_base(str(tmp_path / "adapter"))


def test_a_checkpoint_is_a_base(tmp_path: Path) -> None:
    directory = full_checkpoint(tmp_path / "checkpoints" / "step-00000004", MICRO_LLAMA)
    base, found = find_base(directory)
    assert (base.kind, found) == ("checkpoint", MICRO_LLAMA)
    reader, direct = BaseReader(base), CheckpointReader(directory)
    assert reader.config == MICRO_LLAMA
    assert reader.names() == [entry.name for entry in direct.manifest.tensors]
    for name in reader.names():
        size = int(np.prod(reader.shape(name)))
        assert np.array_equal(reader.read(name, 1, size), direct.read(WEIGHT, name, 1, size))
        assert np.array_equal(reader.tensor(name).numpy().reshape(-1), direct.read(WEIGHT, name, 0, size))
        assert reader.dtype(name) == reader.tensor(name).dtype
    assert load_tokenizer(base).eos_token_id == 0
    for above in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(ConfigError, match=f"has checkpoints below it; name one, the newest is {directory}"):
            find_base(str(above))


def test_a_checkpoint_that_changed(tmp_path: Path) -> None:
    directory = full_checkpoint(tmp_path / "step-00000004", MICRO_LLAMA)
    base, _ = find_base(directory)
    shard = Path(directory) / "shard-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"shard-0\.safetensors is not the one that its manifest names"):
        find_base(directory)
    reader = BaseReader(base)
    with pytest.raises(CheckpointError, match=r"shard-0\.safetensors is damaged"):
        reader.read(NAME, 0, 1)
    change_json(Path(directory) / "manifest.json", architecture=MICRO_LLAMA | {"rms_norm_eps": 1e-3})
    with pytest.raises(CheckpointError, match=r"manifest\.json: the base has changed since the job was created"):
        BaseReader(base)
    change_json(Path(directory) / "manifest.json", architecture=MICRO_LLAMA | {"hidden_size": 32})
    with pytest.raises(CheckpointError, match="has other tensors than its architecture"):
        find_base(directory)


def test_an_adapters_checkpoint_is_no_base(pristine: Path, tmp_path: Path) -> None:
    base, found = find_base(str(pristine))
    directory = lora_checkpoint(tmp_path / "step-00000004", base, found, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="is an adapter's checkpoint and has no whole model; export it merged"):
        find_base(directory)


def test_the_tokenizer(pristine: Path, directory: Path, tmp_path: Path) -> None:
    base, found = find_base(str(pristine))
    tokenizer = load_tokenizer(base)
    ids = tokenizer("a b zz")["input_ids"]
    assert ids == [4, 5, 1]
    assert (tokenizer.eos_token_id, tokenizer.bos_token, tokenizer.chat_template) == (0, None, CHAT_TEMPLATE)
    message = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "user a "
    # The template inside tokenizer_config.json, and the end of text said by the model's config alone.
    (directory / "chat_template.jinja").unlink()
    change_json(directory / "tokenizer_config.json", chat_template="other", eos_token=None)
    change_json(directory / "config.json", eos_token_id=[0, 5])
    other = load_tokenizer(find_base(str(directory))[0])
    assert (other.eos_token_id, other.chat_template) == (0, "other")
    # A fine-tuning's checkpoint keeps the template of what it began from, as long as that is there.
    fine_tuning = FineTuning(base=find_base(str(directory))[0], method="full")
    tuned = find_base(full_checkpoint(tmp_path / "step-00000004", found, fine_tuning))[0]
    assert load_tokenizer(tuned).chat_template == "other"
    shutil.rmtree(directory)
    # What was found with the template does not go on without it.
    with pytest.raises(CheckpointError, match=r"No such file or directory.*; restore the file"):
        load_tokenizer(tuned)
    assert load_tokenizer(find_base(tuned.path)[0]).chat_template is None


def test_a_tokenizer_never_runs_code_or_grows(directory: Path) -> None:
    """What a stranger's tokenizer_config.json asks for beyond a few tokens does not happen."""
    (directory / "evil.py").write_text("raise SystemExit('it ran')")
    change_json(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="EvilTokenizer",
        pad_token="<not in the vocabulary>",
    )
    tokenizer = load_tokenizer(find_base(str(directory))[0])
    assert tokenizer.pad_token is None
    assert len(tokenizer) == 30


def test_a_base_on_another_file_system(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = fsspec.filesystem("memory")
    for path in pristine.iterdir():
        remote.pipe(f"/bases/tiny/{path.name}", path.read_bytes())
    try:
        base, _ = find_base("memory://bases/tiny")
        assert base.path == "memory://bases/tiny"
        assert base.sha256 == find_base(str(pristine))[0].sha256
        reader, local = BaseReader(base), BaseReader(find_base(str(pristine))[0])
        for name in reader.names():
            assert torch.equal(reader.tensor(name), local.tensor(name))
        copy = base_files.local_path("memory://bases/tiny/model.safetensors")
        assert BaseReader(base).tensor(NAME).shape == (16, 32)
        assert base_files.local_path("memory://bases/tiny/model.safetensors") == copy  # copied once

        whole = load_file(pristine / "model.safetensors")
        save_file(whole | {NAME: whole[NAME] + 1}, copy + ".new")
        remote.pipe("/bases/tiny/model.safetensors", Path(copy + ".new").read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the base has changed"):
            BaseReader(base).tensor(NAME)
        assert not Path(copy).exists()

        monkeypatch.setattr(base_files, "SPARE_BYTES", 1 << 60)
        remote.pipe("/bases/tiny/model.safetensors", (pristine / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match="set TMPDIR to a larger disk"):
            find_base("memory://bases/tiny")
    finally:
        remote.rm("/bases", recursive=True)
