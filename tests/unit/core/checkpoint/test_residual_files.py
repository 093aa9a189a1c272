"""Files of residuals: complete, or refused by name; those of another codec or another cut are not used."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.micro import micro_plan

from gradstream.core.checkpoint.manifest import CheckpointManifest, FileEntry, ResidualEntry, _check_residuals
from gradstream.core.checkpoint.residual_files import read_residual, residual_file_name, write_residual
from gradstream.core.codecs import ResidualCodec, State
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import CheckpointError
from gradstream.core.plan.plan import Plan


def plan_of(codec: str = "powersgd") -> Plan:
    return micro_plan(codec={"push": codec})


def states_of(plan: Plan) -> dict[int, State]:
    book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
    states = {}
    for bundle in plan.bundles:
        for codec, fragment in zip(book.of(bundle, plan.recipe.codec.push).codecs, bundle.fragments, strict=True):
            if isinstance(codec, ResidualCodec):
                states[fragment.index] = {
                    key: torch.randn(value.shape) for key, value in codec.new_state(fragment.shape).items()
                }
    return states


def written(directory: Path, plan: Plan) -> FileEntry:
    return write_residual(str(directory), residual_file_name(1, 3, "worker-0.ab"), plan, states_of(plan))


def test_a_file_has_a_name_a_worker_and_a_slot_and_comes_back(tmp_path: Path) -> None:
    plan = plan_of()
    states = states_of(plan)
    entry = write_residual(str(tmp_path / "new"), residual_file_name(1, 3, "worker-0.ab"), plan, states)
    assert entry.file == "epoch-0001-residual-slot-003-worker-0.ab.safetensors"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [entry.file]
    found, reason = read_residual(str(tmp_path / "new"), entry, plan)
    assert not reason
    assert found.keys() == states.keys()
    assert len(states) > 10
    assert all(torch.equal(found[index][key], value) for index in states for key, value in states[index].items())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "garbage"])
def test_a_damaged_file_is_named_with_its_cure(tmp_path: Path, damage: str) -> None:
    plan = plan_of()
    entry = written(tmp_path, plan)
    path = tmp_path / entry.file
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "gone":
        path.unlink()
    else:
        garbage = b"\xff" * len(data)
        path.write_bytes(garbage)
        entry = entry.model_copy(update={"sha256": hashlib.sha256(garbage).hexdigest()})
    with pytest.raises(CheckpointError) as caught:
        read_residual(str(tmp_path), entry, plan)
    assert str(path) in str(caught.value)
    assert "restore" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_codec_or_cut_is_not_used_and_says_why(tmp_path: Path) -> None:
    plan = plan_of()
    entry = written(tmp_path, plan)
    assert read_residual(str(tmp_path), entry, plan_of("topk")) == (
        {},
        "its codec is powersgd, and the job's is topk",
    )
    coarser = replace(plan, fragment_elements=512)
    coarser = replace(coarser, placement=(0,) * len(coarser.fragments))
    states, reason = read_residual(str(tmp_path), entry, coarser)
    assert states == {}
    assert "cut into other fragments" in reason
    fewer = {index: state for index, state in states_of(plan).items() if index % 2}
    short = write_residual(str(tmp_path), "short.safetensors", plan, fewer)
    states, reason = read_residual(str(tmp_path), short, plan)
    assert states == {}
    assert "it has no " in reason


def test_a_residual_that_the_coordinator_does_not_see_is_refused(tmp_path: Path) -> None:
    entry = ResidualEntry(**written(tmp_path, plan_of()).model_dump(), slot=3)
    _check_residuals(str(tmp_path), [entry])
    for directory, found in ((tmp_path / "elsewhere", entry), (tmp_path, entry.model_copy(update={"num_bytes": 1}))):
        with pytest.raises(CheckpointError, match="workers that see the coordinator's run_root"):
            _check_residuals(str(directory), [found])


def test_a_manifest_from_before_residuals_loads() -> None:
    assert CheckpointManifest.model_fields["residuals"].default == ()
    assert not CheckpointManifest.model_fields["residuals"].is_required()
