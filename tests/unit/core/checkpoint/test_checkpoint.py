"""Checkpoints: written by any number of servers, read in any slices; every damaged byte is found and named."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.micro import MICRO_LLAMA
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.coordinator.planning.placement import place
from gradstream.core.checkpoint.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    WEIGHT,
    CheckpointManifest,
    directory_of,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
    write_manifest,
)
from gradstream.core.checkpoint.shard import CheckpointReader, write_shard
from gradstream.core.checkpoint.weights_files import sent_pieces
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.errors import CheckpointError
from gradstream.core.model.model import initial_weights, inventory
from gradstream.core.plan.fragments import cut
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.pretrained import export
from gradstream.core.pretrained.export import export_huggingface, huggingface_weights
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.storage import files
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import coordinator_pb2

MODEL = MICRO_LLAMA
TENSORS = inventory(MODEL)
WEIGHTS = {name: tensor.numpy() for name, tensor in initial_weights(MODEL, 0)}


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    """A data set's directory, as far as a checkpoint needs it: the tokenizer."""
    directory = tmp_path / "data"
    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def make_plan(data_path: Path, num_servers: int, fragment_elements: int = 256) -> Plan:
    recipe = {
        "name": "tiny",
        "model": {"config": MODEL},
        "training": {"num_steps": 4, "num_slots": 1, "global_batch": 1, "microbatch": 1, "sequence_length": 8},
        "data": {"path": str(data_path)},
    }
    data = {"token_dtype": "uint16", "vocab_size": 64, "end_of_text_id": 0, "shards": []}
    data["tokenizer_sha256"] = files.sha256(str(data_path / "tokenizer.json"))
    return Plan(
        job_id="job",
        epoch=1,
        recipe=parse_recipe(recipe),
        model_config=MODEL,
        data_manifest=parse_manifest(data),
        tensors=tuple(TENSORS),
        fragment_elements=fragment_elements,
        placement=tuple(place(cut(TENSORS, fragment_elements), TENSORS, num_servers)[0]),
        servers=tuple(Server(f"s{index}", f"server-{index}", "") for index in range(num_servers)),
        leader=0,
        start_version=0,
        checkpoint_path="",
        checkpoint_root="",
    )


def moment(name: str) -> np.ndarray:
    """A stand-in for an optimizer's array of a tensor: as large, other numbers."""
    return (WEIGHTS[name] * 3 + 1).astype(np.float32)


def write(root: Path, plan: Plan, version: int = 3) -> str:
    """Write a checkpoint as the servers and the coordinator do; return its directory."""
    directory, reports = write_files(root, plan, version)
    write_manifest(directory, plan, version, reports, {"tokens": 12})
    return directory


def write_files(
    root: Path, plan: Plan, version: int = 3, prefix: str = ""
) -> tuple[str, list[coordinator_pb2.ReportCheckpointRequest]]:
    """Write the servers' files of a checkpoint; return its directory and what the servers report."""
    directory = directory_of(str(root), version)
    reports = []
    for server in range(len(plan.servers)):
        shard = []
        for fragment in plan.fragments_of(server):
            name = TENSORS[fragment.tensor].name
            state = {
                WEIGHT: WEIGHTS[name].reshape(-1)[fragment.begin : fragment.end].copy(),
                "exp_avg": moment(name).reshape(-1)[fragment.begin : fragment.end].copy(),
                "step": np.array([version], dtype=np.float32),
            }
            shard.append((fragment, state))
        entry, digests = write_shard(directory, f"{prefix}shard-{server}.safetensors", plan.tensors, shard)
        reports.append(
            coordinator_pb2.ReportCheckpointRequest(
                server=server,
                file=entry.file,
                num_bytes=entry.num_bytes,
                sha256=entry.sha256,
                fragments=[
                    coordinator_pb2.FragmentDigest(fragment=fragment.index, sha256=digest)
                    for (fragment, _), digest in zip(shard, digests, strict=True)
                ],
            )
        )
    return directory, reports


@pytest.mark.parametrize("num_servers", [1, 2, 3])
@pytest.mark.parametrize("other_fragment_elements", [256, 512, 1 << 20])
def test_it_loads_in_any_slices_bit_for_bit(
    tmp_path: Path, data_path: Path, num_servers: int, other_fragment_elements: int
) -> None:
    directory = write(tmp_path, make_plan(data_path, num_servers))
    reader = CheckpointReader(directory)
    for fragment in cut(TENSORS, other_fragment_elements):
        tensor = TENSORS[fragment.tensor]
        assert reader.shape(tensor.name) == tensor.shape
        for kind, whole in ((WEIGHT, WEIGHTS[tensor.name]), ("exp_avg", moment(tensor.name))):
            found = reader.read(kind, tensor.name, fragment.begin, fragment.end)
            assert np.array_equal(found, whole.reshape(-1)[fragment.begin : fragment.end]), (tensor.name, kind)
        assert reader.scalar("step", tensor.name, fragment.begin).tolist() == [3.0]


def test_any_slice_reads_right(tmp_path: Path, data_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, make_plan(data_path, 2)))
    name = "lm_head.weight"
    whole = WEIGHTS[name].reshape(-1)

    @given(st.integers(0, whole.size - 1), st.integers(1, whole.size))
    def check(begin: int, length: int) -> None:
        end = min(whole.size, begin + length)
        assert np.array_equal(reader.read(WEIGHT, name, begin, end), whole[begin:end])

    check()


def test_the_state_digest_does_not_depend_on_who_held_what(tmp_path: Path, data_path: Path) -> None:
    digests = set()
    for num_servers in (1, 2, 3):
        directory = write(tmp_path / str(num_servers), make_plan(data_path, num_servers))
        digests.add(read_manifest(directory).state_sha256)
    assert len(digests) == 1
    one_bit = WEIGHTS["model.norm.weight"]
    one_bit.view(np.uint32)[0] ^= 1
    try:
        other = read_manifest(write(tmp_path / "other", make_plan(data_path, 2))).state_sha256
    finally:
        one_bit.view(np.uint32)[0] ^= 1
    assert other not in digests


@pytest.mark.parametrize("file", ["shard-0.safetensors", "shard-1.safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, data_path: Path, file: str) -> None:
    directory = write(tmp_path, make_plan(data_path, 2))
    path = Path(directory, file)
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(CheckpointError, match=rf"{file} is truncated: {size - 1} bytes instead of {size}"):
        read_everything(directory)


@pytest.mark.parametrize("file", ["shard-0.safetensors", "shard-1.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_flipped_bit_is_found_and_the_file_named(tmp_path: Path, data_path: Path, file: str, share: float) -> None:
    directory = write(tmp_path, make_plan(data_path, 2))
    path = Path(directory, file)
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file} is damaged.*restore the file, or remove"):
        read_everything(directory)


def test_a_missing_file_is_named(tmp_path: Path, data_path: Path) -> None:
    directory = write(tmp_path, make_plan(data_path, 2))
    Path(directory, "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors cannot be read"):
        read_everything(directory)


def read_everything(directory: str) -> None:
    reader = CheckpointReader(directory)
    for tensor in TENSORS:
        reader.read(WEIGHT, tensor.name, 0, tensor.num_elements)


def test_without_a_manifest_there_is_no_checkpoint(tmp_path: Path, data_path: Path) -> None:
    directory = write(tmp_path, make_plan(data_path, 1))
    write(tmp_path, make_plan(data_path, 1), version=5)
    assert [manifest.version for manifest in list_checkpoints(str(tmp_path))] == [3, 5]
    Path(directory, MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no manifest\.json"):
        CheckpointReader(directory)
    assert [manifest.version for manifest in list_checkpoints(str(tmp_path))] == [5]
    assert list_checkpoints(str(tmp_path / "nowhere")) == []


def test_a_removed_checkpoint_is_gone(tmp_path: Path, data_path: Path) -> None:
    write(tmp_path, make_plan(data_path, 1))
    remove_checkpoint(str(tmp_path), 3)
    assert not Path(directory_of(str(tmp_path), 3)).exists()
    remove_checkpoint(str(tmp_path), 3)  # once more is no error


def damaged(manifest: dict[str, Any], change: str) -> Any:
    changes: dict[str, dict[str, Any]] = {
        "placement too short": {"placement": manifest["placement"][:-1]},
        "placement beyond the files": {"placement": [len(manifest["files"]), *manifest["placement"][1:]]},
        "negative placement": {"placement": [-1, *manifest["placement"][1:]]},
        "other cut": {"fragment_elements": 1 << 20},
        "no cut": {"fragment_elements": 0},
        "another format": {"format_version": 2},
        "a path for a file": {"files": [manifest["files"][0] | {"file": "../../etc/passwd"}]},
        "no digest": {"state_sha256": "abc"},
        "more": {"comment": "hello"},
        "no tensors": {"tensors": [], "files": []},
    }
    return manifest | changes[change]


@pytest.mark.parametrize(
    "change",
    [
        "placement too short",
        "placement beyond the files",
        "negative placement",
        "other cut",
        "no cut",
        "another format",
        "a path for a file",
        "no digest",
        "more",
        "no tensors",
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, data_path: Path, change: str) -> None:
    directory = write(tmp_path, make_plan(data_path, 2))
    path = Path(directory, MANIFEST_NAME)
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), change)))
    with pytest.raises(CheckpointError, match=r"manifest.*or remove") as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value)


def test_a_manifest_with_any_bytes_is_refused(tmp_path: Path, data_path: Path) -> None:
    directory = write(tmp_path, make_plan(data_path, 1))
    path = Path(directory, MANIFEST_NAME)
    whole = path.read_bytes()

    @settings(deadline=None, max_examples=50)
    @given(st.one_of(st.binary(max_size=60), st.integers(0, len(whole) - 1).map(lambda end: whole[:end])))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_manifest(directory)

    check()


def test_reports_that_do_not_cover_the_plan_make_no_checkpoint(tmp_path: Path, data_path: Path) -> None:
    plan = make_plan(data_path, 2)
    directory = directory_of(str(tmp_path), 1)
    with pytest.raises(CheckpointError, match="do not cover the plan"):
        write_manifest(directory, plan, 1, [], {})
    assert not files.list_names(directory)


def test_leftovers_of_an_earlier_epoch_are_removed_and_what_a_newer_one_writes_stays(
    tmp_path: Path, data_path: Path
) -> None:
    old, new = make_plan(data_path, 3), replace(make_plan(data_path, 1), epoch=2)
    directory, _ = write_files(tmp_path, old, prefix="epoch-0001-")
    _, reports = write_files(tmp_path, new, prefix="epoch-0002-")
    stays = ["epoch-0003-shard-000-of-001.safetensors", "epoch-0001-shard-000-of-003.safetensors.tmp-7-abcd"]
    for name in stays:
        Path(directory, name).write_bytes(b"being written")
    write_manifest(directory, new, 3, reports, {})
    assert sorted(files.list_names(directory)) == sorted(
        [MANIFEST_NAME, "epoch-0002-shard-0.safetensors", TOKENIZER_NAME, *stays]
    )
    read_everything(directory)


@pytest.mark.parametrize("damage", ["absent", "truncated"])
@pytest.mark.parametrize("server", [0, 1])
def test_a_manifest_states_what_is_there(tmp_path: Path, data_path: Path, server: int, damage: str) -> None:
    """A server wrote to a disk of its own, or not all of it arrived: then there is no checkpoint."""
    plan = make_plan(data_path, 2)
    directory, reports = write_files(tmp_path, plan)
    path = Path(directory, reports[server].file)
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"parameter server .*{server} reported .*{path.name}") as caught:
        write_manifest(directory, plan, 3, reports, {})
    assert ("does not exist" if damage == "absent" else f"has {path.stat().st_size} bytes") in str(caught.value)
    assert MANIFEST_NAME not in files.list_names(directory)


def test_another_models_tensor_or_optimizer_is_named(tmp_path: Path, data_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, make_plan(data_path, 1)))
    with pytest.raises(CheckpointError, match="has no tensor 'nonsense'"):
        reader.shape("nonsense")
    with pytest.raises(CheckpointError, match="written with another optimizer"):
        reader.read("momentum_buffer", TENSORS[0].name, 0, 1)


def test_the_manifest_says_what_was_trained(tmp_path: Path, data_path: Path) -> None:
    plan = make_plan(data_path, 2)
    directory = write(tmp_path, plan)
    manifest = read_manifest(directory)
    assert (manifest.job_id, manifest.epoch, manifest.version) == ("job", 1, 3)
    assert manifest.progress == {"tokens": 12}
    assert parse_recipe(manifest.recipe) == plan.recipe
    assert manifest == CheckpointManifest.model_validate_json(manifest.model_dump_json())
    for entry in manifest.files:
        data = Path(directory, entry.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.num_bytes, entry.sha256)


@pytest.mark.parametrize("file_bytes", [4 << 30, 8 << 10], ids=["one file", "several files"])
def test_the_export_is_the_very_model(
    tmp_path: Path, data_path: Path, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "EXPORT_FILE_BYTES", file_bytes)
    destination = tmp_path / "out" / "model"
    export_huggingface(write(tmp_path, make_plan(data_path, 3)), destination)
    several = (destination / "model.safetensors.index.json").exists()
    assert several == (file_bytes < 1 << 20)
    model, info = AutoModelForCausalLM.from_pretrained(destination, output_loading_info=True)
    assert not any(info.values()), "no key is missing, unexpected or of another shape"
    assert model.dtype == torch.float32
    parameters = dict(model.named_parameters())
    assert parameters.keys() == WEIGHTS.keys()
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.detach().numpy(), WEIGHTS[name]), name
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.eos_token_id == 0
    assert [path.name for path in destination.parent.iterdir()] == ["model"], "no temporary directory is left"


def test_an_export_does_not_overwrite(tmp_path: Path, data_path: Path) -> None:
    directory = write(tmp_path, make_plan(data_path, 1))
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_huggingface(directory, destination)
    assert [path.name for path in destination.iterdir()] == ["mine.txt"]
    (destination / "mine.txt").unlink()
    export_huggingface(directory, destination)
    assert (destination / "config.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, data_path: Path) -> None:
    directory = write(tmp_path, make_plan(data_path, 2))
    Path(directory, "shard-1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors is truncated"):
        export_huggingface(directory, tmp_path / "exports" / "model")
    assert list((tmp_path / "exports").iterdir()) == []


async def test_an_export_is_sent_in_pieces_of_tensors_and_never_held(
    tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a whole tensor in memory nor a file of weights on disk: a model may be larger than both."""
    monkeypatch.setattr(export, "EXPORT_ELEMENTS", 100)
    monkeypatch.setattr(export, "EXPORT_FILE_BYTES", 8 << 10)
    directory = write(tmp_path, make_plan(data_path, 3))
    export_huggingface(directory, tmp_path / "model")
    read = CheckpointReader.read

    def of_few(self: CheckpointReader, kind: str, tensor: str, begin: int, end: int) -> Any:
        assert end - begin <= 100
        return read(self, kind, tensor, begin, end)

    monkeypatch.setattr(CheckpointReader, "read", of_few)
    received: dict[str, bytes] = {}
    async for name, num_bytes, piece in sent_pieces(
        huggingface_weights(CheckpointReader(directory)), StorageThreads(), directory
    ):
        received[name] = received.get(name, b"") + piece
        assert num_bytes == (tmp_path / "model" / name).stat().st_size
    for name, content in received.items():
        assert content == (tmp_path / "model" / name).read_bytes(), name
    assert len(received) > 3
