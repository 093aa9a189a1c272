"""The export of a checkpoint as a Hugging Face directory: weights, config and tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradstream.core.checkpoint.weights_files import Buffer, WeightsFile, weights_files, write_weights
from gradstream.core.errors import CheckpointError, one_line
from gradstream.core.model.constants import exported_constants
from gradstream.core.recipe.defaults import longest_sequence, text_section
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import TensorSpec, bytes_of

if TYPE_CHECKING:
    pass

from gradstream.core.checkpoint.manifest import TOKENIZER_NAME, WEIGHT, CheckpointManifest
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.pretrained.added_tokens import added_token

EXPORT_FILE_BYTES = 4 << 30


EXPORT_ELEMENTS = 4 << 20
"""Number of elements of a tensor that an export reads at once."""


DEFAULT_LENGTH = 1024
"""Longest text of the tokenizer, if the model's config does not limit the length of a sequence."""


NOT_EXPORTED = frozenset({"torch_dtype", "auto_map", "quantization_config", "attn_implementation", "_name_or_path"})
"""Keys of a config.json that an export leaves out: they describe the former form of the weights, or name code or files
elsewhere. Exported weights are fp32, and transformers' own class loads them."""


def export_huggingface(directory: str, destination: Path) -> None:
    """Write a checkpoint as a Hugging Face model directory, atomically.

    The files are config.json, model.safetensors (above 4 GiB several, with an index), tokenizer.json and
    tokenizer_config.json. Raises CheckpointError for a damaged checkpoint, and when `destination` is not empty.
    """
    with files.whole_directory(destination) as temporary:
        write_huggingface(directory, temporary)


def write_huggingface(directory: str, destination: Path, weights: bool = True, chat: bool = False) -> CheckpointReader:
    """Write a checkpoint's weights (only with `weights`), config and tokenizer into an existing directory.

    Returns the checkpoint's reader. Files that a fine-tuning does not change come from its base. `chat` has the same
    meaning as in `write_generation_config`. Raises CheckpointError, and ConfigError for the base's files.
    """
    from gradstream.core.pretrained import files as base_files  # imported here: that module reads checkpoints too
    from gradstream.core.pretrained import tokenizer as base_tokenizer

    reader = CheckpointReader(directory)
    fine_tuning = reader.manifest.fine_tuning
    if fine_tuning is not None and fine_tuning.method == "lora":
        raise CheckpointError(
            f"{directory} holds adapters, not a whole model; export it with `gradstream finetune export`"
        )
    if weights:
        write_weights(huggingface_weights(reader), destination)
    write_config(reader, destination)
    if fine_tuning is None:
        write_tokenizer(reader.manifest, _tokenizer_of(reader), destination)
    else:
        # If the base is gone, the checkpoint's own tokenizer is used. If the base exists, it must be unchanged.
        tokenizer = fine_tuning.base.tokenizer
        if tokenizer is not None and base_files.is_there(tokenizer.directory):
            base_tokenizer.record_tokenizer(fine_tuning.base)
        base = Base(kind="checkpoint", path=directory, title=directory, files=(), sha256="0" * 64)
        base_tokenizer.write_tokenizer(base, destination)
        base_tokenizer.write_generation_config(base, destination, chat)
    return reader


def huggingface_weights(reader: CheckpointReader) -> list[WeightsFile]:
    """A checkpoint's weights as the files of a Hugging Face directory, generated while they are read.

    Reading them raises CheckpointError when the checkpoint is damaged.
    """
    constants = exported_constants(reader.manifest.architecture)

    def read(name: str) -> Iterator[Buffer]:
        if name in constants:
            yield bytes_of(constants[name])
            return
        num_elements = math.prod(reader.shape(name))
        for begin in range(0, num_elements, EXPORT_ELEMENTS):
            yield bytes_of(reader.read(WEIGHT, name, begin, min(begin + EXPORT_ELEMENTS, num_elements)))

    specs = [TensorSpec(entry.name, "F32", tuple(entry.shape)) for entry in reader.manifest.tensors]
    specs += [TensorSpec(name, "F32", values.shape) for name, values in constants.items()]
    return weights_files(specs, read, EXPORT_FILE_BYTES)


def write_config(reader: CheckpointReader, destination: Path) -> None:
    """Write a checkpoint's config.json for a Hugging Face directory."""
    config = {key: value for key, value in reader.manifest.architecture.items() if key not in NOT_EXPORTED}
    (destination / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))


def _tokenizer_of(reader: CheckpointReader) -> bytes:
    path = files.join(reader.directory, TOKENIZER_NAME)
    try:
        return files.read_bytes(path)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint's tokenizer {path} cannot be read ({one_line(error)}); restore the file"
        ) from None


def write_tokenizer(manifest: CheckpointManifest, tokenizer: bytes, destination: Path) -> None:
    """Write tokenizer.json, with the contents `tokenizer`, and tokenizer_config.json for a Hugging Face directory.

    Raises CheckpointError when the tokenizer is not JSON.
    """
    try:
        vocabulary = json.loads(tokenizer)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the tokenizer of the checkpoint of job {manifest.job_id} cannot be read ({one_line(error)}); restore its "
            f"{TOKENIZER_NAME}"
        ) from None
    (destination / TOKENIZER_NAME).write_bytes(tokenizer)
    end_of_text = added_token(vocabulary, manifest.end_of_text_id)
    padding = text_section(manifest.architecture).get("pad_token_id")
    padding_text = added_token(vocabulary, padding) if isinstance(padding, int) else None
    longest = longest_sequence(manifest.architecture)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        **({"pad_token": padding_text} if padding_text is not None else {}),
        "model_max_length": longest[1] if longest is not None else DEFAULT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (destination / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
