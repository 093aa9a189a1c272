"""Bases, the pretrained models from which fine-tunings start: found, verified and read in slices.

A base is a gradstream checkpoint, or a Hugging Face directory on any fsspec path: config.json, tokenizer.json and
safetensors, in one file or several with an index. Its identity is the hashes of its weights' files and its config. A
later read returns the same bytes, or raises an error that names the changed file.

torch and transformers are imported inside the functions, because their import is slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from gradstream.core.checkpoint.manifest import MANIFEST_NAME, WEIGHT, directory_of, list_checkpoints, read_manifest
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError, one_line
from gradstream.core.model.model import load_config
from gradstream.core.pretrained import files as base_files
from gradstream.core.pretrained.files import read_json
from gradstream.core.pretrained.tokenizer import load_tokenizer, record_tokenizer, vocabulary_size
from gradstream.core.pretrained.weights import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    HuggingFaceWeights,
    changed,
    check_no_other_files,
    check_tensors,
    identity,
    model_parameters,
)
from gradstream.core.recipe.files import absolute_path
from gradstream.core.recipe.fine_tuning import Base, BaseFile
from gradstream.core.storage import files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["MODEL_TYPES", "BaseReader", "check_base", "find_base", "load_tokenizer"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Model families whose Hugging Face directories can be read."""


def find_base(path: str, title: str = "") -> tuple[Base, dict[str, Any]]:
    """Find a base and verify it: its tensors against its config, its tokenizer, the hashes of a checkpoint.

    Returns the base and the contents of its config.json. Raises ConfigError when there is no usable base, and
    CheckpointError when the base is damaged, with one line that says what to do.
    """
    return _find_base(path, title, hashed=True)


def check_base(path: str) -> dict[str, Any]:
    """Verify a base as `find_base`, but without the hashes of its weights; return the contents of its config.json.

    Hashing the weights takes as long as reading them. Raises as `find_base`.
    """
    return _find_base(path, path, hashed=False)[1]


def _find_base(path: str, title: str, hashed: bool) -> tuple[Base, dict[str, Any]]:
    path = absolute_path(path)
    names = _names_in(path)
    if CONFIG_NAME in names:
        base, config = _find_huggingface(path, title or path, names, hashed)
    elif MANIFEST_NAME in names and "tensors" in read_json(path, MANIFEST_NAME):
        base, config = _find_checkpoint(path, title or path, hashed)
    else:
        raise ConfigError(_no_base(path, names))
    # The files that were hashed are checked here, and are the only ones used from now on.
    base = base.model_copy(update={"tokenizer": record_tokenizer(base)})
    tokenizer = load_tokenizer(base)
    vocabulary = vocabulary_size(tokenizer)
    num_ids = int(load_config(config).vocab_size)
    if vocabulary > num_ids:
        raise ConfigError(
            f"the tokenizer of base {path} has ids up to {vocabulary - 1}, and its model has {num_ids} of them, so it "
            f"does not know {tokenizer.convert_ids_to_tokens(vocabulary - 1)!r}: they do not belong together; get both "
            f"from the same place"
        )
    return base, config


class BaseReader:
    """Reads a base's tensors, whole or in slices. Each file is verified before its first use.

    A tensor has the name of its parameter in transformers' class for causal language models, even if the files use
    another name. Tied tensors have only their first name. Files are mapped into memory, so reading a slice reads only
    that slice. Raises CheckpointError when the base has changed.
    """

    def __init__(self, base: Base):
        self._source: _Source = _Checkpoint(base) if base.kind == "checkpoint" else HuggingFaceWeights(base)
        self._shapes = self._source.shapes()

    @property
    def config(self) -> dict[str, Any]:
        """The contents of the base's config.json."""
        return self._source.config

    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError when the base has no such tensor."""
        if name not in self._shapes:
            raise CheckpointError(
                f"base {self._source.path} has no tensor '{name}'; it belongs to another model than the recipe's"
            )
        return self._shapes[name]

    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Read elements [begin, end) of the flattened tensor into a new fp32 array."""
        if not 0 <= begin <= end <= math.prod(self.shape(name)):
            raise ValueError(f"[{begin}:{end}] is not within tensor '{name}'")
        return self._source.read(name, begin, end)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        self.shape(name)
        return self._source.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor in its stored dtype (fp32, bf16 or fp16).

        The tensor may be a view of a mapped file: never write to it.
        """
        self.shape(name)
        return self._source.tensor(name)


class _Source(Protocol):
    path: str
    config: dict[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.float32]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> torch.Tensor: ...


class _Checkpoint:
    """A gradstream checkpoint as a base. CheckpointReader verifies its files."""

    def __init__(self, base: Base):
        self.path = base.path
        self._reader = CheckpointReader(base.path)
        self.config = dict(self._reader.manifest.architecture)
        found = [BaseFile(**entry.model_dump()) for entry in self._reader.manifest.files]
        if identity(found, self.config) != base.sha256:
            raise CheckpointError(changed(files.join(base.path, MANIFEST_NAME)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: entry.shape for entry in self._reader.manifest.tensors}

    def read(self, name: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        return self._reader.read(WEIGHT, name, begin, end)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        shape = self._reader.shape(name)
        return torch.from_numpy(self.read(name, 0, math.prod(shape))).reshape(shape)


def _find_huggingface(path: str, title: str, names: Sequence[str], hashed: bool) -> tuple[Base, dict[str, Any]]:
    config = read_json(path, CONFIG_NAME)
    if config.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"base {path} has model_type {config.get('model_type')!r}; those that can be fine-tuned are "
            f"{', '.join(MODEL_TYPES)}"
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(f"base {path} is quantized; take the model that it was made from, in fp32, bf16 or fp16")
    if WEIGHTS_NAME not in names and INDEX_NAME not in names:
        raise ConfigError(_no_safetensors(path, names))
    try:
        source = HuggingFaceWeights(Base(kind="huggingface", path=path, title=title, files=(), sha256="0" * 64))
    except ConfigError as error:
        raise ConfigError(f"base {path}: {error}") from None
    absent = sorted(set(source.weights_files()) - set(names))
    if absent:
        index = files.join(path, INDEX_NAME)
        raise ConfigError(f"{index} names {absent[0]}, which is not beside it; get that file too")
    check_no_other_files(path, names, source.weights_files())
    check_tensors(source)
    found = []
    for file in source.weights_files() if hashed else ():
        content = base_files.digest(files.join(path, file))
        try:
            found.append(BaseFile(file=file, num_bytes=content.num_bytes, sha256=content.sha256))
        except ValidationError:
            raise ConfigError(
                f"{files.join(path, file)}: a weights file's name may have only letters, digits and ._-"
            ) from None
    base = Base(kind="huggingface", path=path, title=title, files=tuple(found), sha256=identity(found, config))
    return base, config


def _find_checkpoint(path: str, title: str, hashed: bool) -> tuple[Base, dict[str, Any]]:
    manifest = read_manifest(path)
    if manifest.fine_tuning is not None and manifest.fine_tuning.method == "lora":
        raise ConfigError(
            f"{path} is an adapter's checkpoint and has no whole model; export it merged and start from that directory"
        )
    config = dict(manifest.architecture)
    expected = {name: parameter.shape for name, parameter in model_parameters(config).items()}
    if expected != {entry.name: entry.shape for entry in manifest.tensors}:
        raise CheckpointError(f"checkpoint {path} has other tensors than its architecture; take another checkpoint")
    for entry in manifest.files if hashed else ():
        file = files.join(path, entry.file)
        if base_files.digest(file) != base_files.Digest(entry.num_bytes, entry.sha256):
            raise CheckpointError(
                f"checkpoint file {file} is not the one that its manifest names (truncated or altered); restore the "
                f"file, or take another checkpoint"
            )
    found = tuple(BaseFile(**entry.model_dump()) for entry in manifest.files)
    return Base(kind="checkpoint", path=path, title=title, files=found, sha256=identity(found, config)), config


def _names_in(path: str) -> list[str]:
    try:
        fs, inner = files.file_system(path)
        if fs.isfile(inner):
            raise ConfigError(f"base {path} is a file; name the directory that it is in")
        names = files.list_names(path)
        if not names and not fs.exists(inner):
            raise ConfigError(
                f"base {path} does not exist; nothing is downloaded, so name a directory that has the model's files"
            )
    except GradstreamError:
        raise
    except Exception as error:  # each fsspec backend raises its own error types, also for a missing driver
        raise ConfigError(f"base {path} cannot be read ({one_line(error)}); check the path") from None
    return names


def _no_base(path: str, names: Sequence[str]) -> str:
    """The reason why a directory is not a base, with the directory that could be meant."""
    for root in (path, files.join(path, "checkpoints")):
        try:
            found = list_checkpoints(root)
        except CheckpointError:
            continue
        if found:
            newest = directory_of(root, found[-1].version)
            return f"{path} is not a base but has checkpoints below it; name one, the newest is {newest}"
    if "adapter_config.json" in names:
        return f"{path} is an adapter; merge it into its base (peft's merge_and_unload) and name that directory"
    if MANIFEST_NAME in names:
        return f"{path} is a data set, not a model; name a directory with {CONFIG_NAME} and safetensors"
    return f"base {path} has no {CONFIG_NAME}, and no {MANIFEST_NAME} of a checkpoint; it is not a model's directory"


def _no_safetensors(path: str, names: Sequence[str]) -> str:
    pickled = next(
        (name for name in names if name.startswith("pytorch_model") and name.endswith((".bin", ".json"))), ""
    )
    if pickled:
        return (
            f"base {path} has {pickled} and no safetensors; pickled weights are not read: convert them with "
            f"transformers' AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    return f"base {path} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; get its weights too"
