"""What slots keep, in a checkpoint: one safetensors file for each slot, beside the servers' files.

The keys in a file are `KEY/TENSOR[BEGIN:END]`, where KEY is a key of the codec's state ("residual", "basis"), or an
array of the slot's own optimizer ("exp_avg", "step"). The file's metadata names the codec. What slots keep is not part
of the version's identity (`state_sha256`), because it belongs to slots, not to weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from safetensors import safe_open

from gradstream.core.checkpoint.manifest import FileEntry, write_checkpoint_file
from gradstream.core.checkpoint.shard import slice_name, verified_file
from gradstream.core.codecs import State
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import CheckpointError
from gradstream.core.foreign import parsing
from gradstream.core.optimizer.rule import STEP_COUNT
from gradstream.core.optimizer.rules import kept_arrays
from gradstream.core.plan.fragments import Fragment
from gradstream.core.plan.plan import Plan
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import TensorSpec, write_tensors


def residual_file_name(epoch: int, slot: int, node_id: str) -> str:
    """The name of a slot's file. The name has the worker's id, because two workers may hold the slot for a moment."""
    return f"epoch-{epoch:04d}-residual-slot-{slot:03d}-{node_id}.safetensors"


def write_residual(directory: str, file: str, plan: Plan, states: Mapping[int, State]) -> FileEntry:
    """Write a slot's states, by fragment, which must be on the CPU. Raises OSError."""
    arrays = {
        f"{key}/{slice_name(plan.tensors, plan.fragments[index])}": array.contiguous()
        for index, state in states.items()
        for key, array in state.items()
    }
    specs = [TensorSpec(name, "F32", tuple(array.shape)) for name, array in arrays.items()]
    metadata = {"format": "gradstream", "codec": plan.recipe.codec.push}

    def write(stream: BinaryIO) -> tuple[int, str]:
        return write_tensors(stream, specs, lambda name: arrays[name].reshape(-1).numpy(), metadata)

    return write_checkpoint_file(directory, file, write)


def read_residual(directory: str, entry: FileEntry, plan: Plan) -> tuple[dict[int, State], str]:
    """Read a slot's states, by fragment, as (states, ""); ({}, reason) when they do not fit the plan.

    Raises CheckpointError for a damaged file.
    """
    path = files.join(directory, entry.file)
    local = verified_file(directory, entry)
    states: dict[int, State] = {}

    def refused(cause: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint file {path} cannot be read ({cause}); restore it, or remove {directory} to go back to an "
            f"older checkpoint"
        )

    with parsing(refused), safe_open(local, framework="pt") as opened:
        codec = (opened.metadata() or {}).get("codec", "none")
        if codec != plan.recipe.codec.push:
            return {}, f"its codec is {codec}, and the job's is {plan.recipe.codec.push}"
        left = set(opened.keys())
        for fragment, fresh in _fresh_states(plan):
            state = {}
            for key, like in fresh.items():
                name = f"{key}/{slice_name(plan.tensors, fragment)}"
                if name not in left or tuple(opened.get_slice(name).get_shape()) != tuple(like.shape):
                    return {}, f"the model was cut into other fragments: it has no {name} of shape {[*like.shape]}"
                state[key] = opened.get_tensor(name).to(torch.float32, copy=True)
                left.discard(name)
            states[fragment.index] = state
        if left:
            return {}, f"the model was cut into other fragments: {min(left)} is not in the plan"
    return states, ""


def _fresh_states(plan: Plan) -> Iterator[tuple[Fragment, State]]:
    """Each fragment of which a slot keeps something, with its initial state."""
    book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
    for bundle in plan.bundles:
        bundle_codec = book.of(bundle, plan.recipe.codec.push)
        for codec, fragment in zip(bundle_codec.codecs, bundle.fragments, strict=True):
            state: State = {}
            if plan.recipe.codec.decay and bundle_codec.keeps_residual(codec):
                state |= codec.new_state(fragment.shape)
            for name in kept_arrays(plan.recipe, plan.tensors[fragment.tensor]):
                state[name] = torch.zeros(1 if name == STEP_COUNT else fragment.num_elements)
            if state:
                yield fragment, state
