"""The weights of a Hugging Face directory: the file of each tensor, and tensors read in slices.

torch and transformers are imported inside the functions, because their import is slow.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.model.model import build
from gradstream.core.pretrained import files as base_files
from gradstream.core.pretrained.files import open_safetensors, read_json
from gradstream.core.recipe.fine_tuning import Base, BaseFile
from gradstream.core.storage import files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
COMPARED_BYTES = 16 << 20
BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|(?:attn|crossattention)\.(?:masked_)?bias)$")
"""Names of buffers that older files have among the weights. A model computes them from its config."""
COPIES = re.compile(r"consolidated.*\.safetensors|model\.[A-Za-z0-9_]+\.safetensors")
"""Names of files with the same weights in another layout or dtype."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the model.

    `aliases` are the names of the tensors that are tied to it. `bare` is its name without the model's prefix, as in a
    file that was saved without the head.
    """

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    bare: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The names under which a file may have the tensor, the likeliest first."""
        return tuple(dict.fromkeys((self.name, self.bare, *self.aliases)))


def model_parameters(config: Mapping[str, Any]) -> dict[str, Parameter]:
    """The model's tensors by name, found on the meta device. Tied tensors appear once, under their first name.

    Raises ConfigError when the model cannot be built.
    """
    return _model_parameters(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _model_parameters(config_json: str) -> dict[str, Parameter]:
    model = build(json.loads(config_json), "meta")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = f"{model.base_model_prefix}."
    return {
        name: Parameter(name, tuple(parameter.shape), tuple(names[id(parameter)][1:]), name.removeprefix(prefix))
        for name, parameter in model.named_parameters()
    }


class HuggingFaceWeights:
    """The tensors of a Hugging Face directory, by the model's names.

    A base without files is still being found: no recorded hashes are compared.
    """

    def __init__(self, base: Base):
        self.path = base.path
        self.config = read_json(base.path, CONFIG_NAME)
        self._entries = {entry.file: entry for entry in base.files}
        if self._entries and identity(base.files, self.config) != base.sha256:
            raise CheckpointError(changed(files.join(base.path, CONFIG_NAME)))
        self.parameters = model_parameters(self.config)
        self._open_files: dict[str, Any] = {}
        self._index = read_index(base.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        import numpy as np
        import torch

        if begin == end:
            return np.empty(0, np.float32)
        shape = self.parameters[name].shape
        if not shape:
            return self.tensor(name).reshape(1).to(torch.float32, copy=True).numpy()
        row = math.prod(shape[1:])
        first = begin // row
        rows = self.slice(*self._place(name))[first : -(-end // row)].reshape(-1)
        cut: torch.Tensor = rows[begin - first * row : end - first * row]
        return cut.to(torch.float32, copy=True).numpy()

    def dtype(self, name: str) -> torch.dtype:
        import torch

        stored = self.slice(*self._place(name)).get_dtype()
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[stored]

    def tensor(self, name: str) -> torch.Tensor:
        file, key = self._place(name)
        return self.opened(file).get_tensor(key)  # type: ignore[no-any-return]

    def weights_files(self) -> list[str]:
        """The names of the weights' files, sorted."""
        return [WEIGHTS_NAME] if self._index is None else sorted(set(self._index.values()))

    def places(self, name: str) -> list[tuple[str, str]]:
        """The places of a tensor as (file, key): the one to read first, then copies of the tensors tied to it."""
        keys = self.parameters[name].keys
        if self._index is None:
            there = set(self.opened(WEIGHTS_NAME).keys())
            return [(WEIGHTS_NAME, key) for key in keys if key in there]
        return [(self._index[key], key) for key in keys if key in self._index]

    def slice(self, file: str, key: str) -> Any:
        """A tensor in a file, which can be read in slices. Raises CheckpointError when the file does not have it."""
        from safetensors import SafetensorError

        try:
            return self.opened(file).get_slice(key)
        except SafetensorError:
            raise CheckpointError(
                f"{files.join(self.path, file)} has no tensor '{key}', which {INDEX_NAME} says it has; get both again"
            ) from None

    def opened(self, file: str) -> Any:
        """An open file. It is verified when it is opened for the first time."""
        if file not in self._open_files:
            path, expected = files.join(self.path, file), None
            if self._entries:
                entry = self._entries.get(file)
                expected = base_files.Digest(entry.num_bytes, entry.sha256) if entry is not None else None
                if expected is None or base_files.digest(path) != expected:
                    raise CheckpointError(changed(path))
            self._open_files[file] = open_safetensors(path, expected)
        return self._open_files[file]

    def _place(self, name: str) -> tuple[str, str]:
        places = self.places(name)
        if not places:  # the index is not part of the base's identity, so it may have changed
            raise CheckpointError(changed(files.join(self.path, INDEX_NAME)))
        return places[0]


def read_index(directory: str) -> dict[str, str] | None:
    """Read the file of each tensor from the index; None for a base in one file.

    Raises ConfigError for an invalid index.
    """
    names = files.list_names(directory)
    if WEIGHTS_NAME in names or INDEX_NAME not in names:
        return None
    index = read_json(directory, INDEX_NAME).get("weight_map")
    path = files.join(directory, INDEX_NAME)
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ConfigError(f"{path} has no weight_map; get the file again")
    elsewhere = next((file for file in index.values() if "/" in file), None)
    if elsewhere is not None:
        raise ConfigError(f"{path} names {elsewhere}, which is not beside it; get the file again")
    return index


def identity(entries: Sequence[BaseFile], config: Mapping[str, Any]) -> str:
    """Hex sha256 of a base: over its files' names, sizes and hashes, and its config."""
    content = {
        "files": sorted([entry.file, entry.num_bytes, entry.sha256] for entry in entries),
        "config": config,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_tensors(source: HuggingFaceWeights) -> None:
    """Check that the files have every tensor of the model once, in the config's shape, and else only known buffers.

    Raises ConfigError that names the first tensor that is missing, unknown to the model, or of a wrong shape or type,
    and CheckpointError for a damaged file.
    """
    import torch

    missing = [name for name in source.parameters if not source.places(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"base {source.path} has no tensor '{missing[0]}'{more}, which its {CONFIG_NAME} asks for; get its files "
            f"again"
        )
    for name, parameter in source.parameters.items():
        places = source.places(name)
        found = [source.slice(*place) for place in places]
        for piece in found:
            shape = tuple(piece.get_shape())
            if shape != parameter.shape:
                raise ConfigError(
                    f"base {source.path}: tensor '{name}' has the shape {_shape(shape)}, and {CONFIG_NAME} asks for "
                    f"{_shape(parameter.shape)}; they do not belong together"
                )
            if piece.get_dtype() not in DTYPES:
                raise ConfigError(
                    f"base {source.path}: tensor '{name}' is {piece.get_dtype()}; only {', '.join(DTYPES)} can be read"
                )
        rows = max(1, COMPARED_BYTES // max(4, 4 * math.prod(parameter.shape[1:])))
        for copy, (_, key) in zip(found[1:], places[1:], strict=True):
            begins = range(0, parameter.shape[0], rows)
            if not all(torch.equal(found[0][at : at + rows], copy[at : at + rows]) for at in begins):
                raise ConfigError(
                    f"base {source.path}: '{name}' and '{key}' differ, and {CONFIG_NAME} says that "
                    f"they are tied; set tie_word_embeddings to false in it"
                )
    _check_no_others(source)


def _check_no_others(source: HuggingFaceWeights) -> None:
    """Raise ConfigError for a tensor that the model does not use, or that is in two files."""
    known = {key for parameter in source.parameters.values() for key in parameter.keys}
    homes: dict[str, str] = {}
    for file in source.weights_files():
        for key in source.opened(file).keys():  # noqa: SIM118  # the opened file is not a mapping
            if key in homes:
                raise ConfigError(
                    f"base {source.path} has tensor '{key}' in {homes[key]} and in {file}; get its files again"
                )
            homes[key] = file
    others = sorted(key for key in homes.keys() - known if not BUFFERS.search(key))
    if not others:
        return
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    if any(".lora_" in key for key in others):
        cure = "merge the adapter into it (peft's merge_and_unload) and name the directory of the result"
    elif all(key.endswith(".bias") for key in others):
        cure = f"set the biases in {CONFIG_NAME} (attention_bias, mlp_bias) as the weights have them"
    else:
        cure = f"weights and {CONFIG_NAME} do not belong together; get both from the same place"
    raise ConfigError(
        f"base {source.path} has tensor '{others[0]}'{more} in {homes[others[0]]}, which its {CONFIG_NAME} does not "
        f"ask for; {cure}"
    )


def check_no_other_files(path: str, names: Sequence[str], weights_files: Sequence[str]) -> None:
    """Raise ConfigError for a directory with further weights beside those of its model, such as an adapter's."""
    for name in sorted(names):
        if name == "adapter_config.json" or name.startswith("adapter_model."):
            raise ConfigError(
                f"base {path} has {name} beside its model, an adapter that would not be used; merge it into the model "
                f"(peft's merge_and_unload) and name the result, or move it elsewhere"
            )
        if name.endswith(".safetensors") and name not in weights_files and not COPIES.fullmatch(name):
            raise ConfigError(
                f"base {path} has {name} beside {weights_files[0]}, and would not use it; move it elsewhere, or get "
                f"the base's files again"
            )


def changed(path: str) -> str:
    """The message about a file that has changed since the base was found."""
    return f"{path}: the base has changed since the job was created; restore the file, or create a new job"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "()"
