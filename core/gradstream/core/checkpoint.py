"""Checkpoints: consistent versions of weights and optimizer state on any fsspec path.

A checkpoint is a directory `step-00000100/` with one safetensors file a server and a manifest, written last by
rename: without a manifest there is no checkpoint. It names tensors and slices, not servers, so it loads onto any
number of servers, bit for bit. A file's keys are `KIND/TENSOR[BEGIN:END]`, KIND being "weight" or a name of optimizer
state.

Writing and reading is in core because servers, coordinator and tools share the format (docs/decisions.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradstream.core import files
from gradstream.core.constants import exported_constants
from gradstream.core.data import Count, Digest, FileName
from gradstream.core.defaults import longest_sequence, text_section
from gradstream.core.errors import CheckpointError, ConfigError, DataError, one_line
from gradstream.core.finetuning import Base, FineTuning
from gradstream.core.foreign import parsing
from gradstream.core.fragments import Fragment, Tensor, cut, num_fragments
from gradstream.core.tensor_files import TensorSpec, bytes_of, write_tensors
from gradstream.core.weights_files import Buffer, WeightsFile, weights_files, write_weights
from gradstream.proto.v1 import coordinator_pb2

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gradstream.core.plan import Plan

State: TypeAlias = "dict[str, npt.NDArray[np.float32]]"

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHT = "weight"
COPY = "copy"  # of the weights as workers hold them, where they pull differences
EXPORT_FILE_BYTES = 4 << 30
EXPORT_ELEMENTS = 4 << 20
"""Of a tensor, read at once for an export."""
DEFAULT_LENGTH = 1024
"""Of a tokenizer's texts, where the model's config does not say how long a sequence may be."""
NOT_EXPORTED = frozenset({"torch_dtype", "auto_map", "quantization_config", "attn_implementation", "_name_or_path"})
"""Keys of a config.json that a model's directory needs no more: they say in which form the weights were, or name what
transformers would look for elsewhere. The weights are fp32, and transformers' own class loads them."""
_DIRECTORY = re.compile(r"step-([0-9]{8,})")
_FILE_OF_EPOCH = re.compile(r"epoch-([0-9]{4,20})-[A-Za-z0-9._-]+\.safetensors")


class TensorEntry(BaseModel):
    """One tensor of the model's inventory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[Count, ...]
    decay: bool
    unit: Count

    def tensor(self) -> Tensor:
        return Tensor(self.name, self.shape, self.decay, self.unit)


class FileEntry(BaseModel):
    """One server's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    num_bytes: Count
    sha256: Digest


class ResidualEntry(FileEntry):
    """One slot's residual (gradstream.core.residual_files)."""

    slot: Count


class CheckpointManifest(BaseModel):
    """What a checkpoint consists of. `placement[fragment]` is the index of the file that holds the fragment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    job_id: str
    epoch: Count
    version: Count
    unix_ms: Count
    recipe: dict[str, Any]
    architecture: dict[str, Any]
    end_of_text_id: Count
    tensors: tuple[TensorEntry, ...]
    fragment_elements: Annotated[Count, Field(gt=0)]
    placement: tuple[int, ...]
    files: tuple[FileEntry, ...]
    state_sha256: Digest
    progress: dict[str, int]
    residuals: tuple[ResidualEntry, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.num_bytes for entry in (*self.files, *self.residuals))

    def fragments(self) -> list[Fragment]:
        """The fragments as they were cut when this was written."""
        return cut([entry.tensor() for entry in self.tensors], self.fragment_elements)

    @property
    def finetuning(self) -> FineTuning | None:
        """What the recipe says of fine-tuning. Raises CheckpointError when that makes no sense."""
        section = self.recipe.get("finetuning")
        try:
            return FineTuning.model_validate(section) if section else None
        except ValidationError as error:
            raise CheckpointError(
                f"the checkpoint of job {self.job_id} has a recipe whose fine-tuning cannot be "
                f"({error.errors()[0]['msg']}); take another checkpoint"
            ) from None


def directory_of(root: str, version: int) -> str:
    """Directory of a version's checkpoint under `root`."""
    return files.join(root, f"step-{version:08d}")


def shard_file_name(epoch: int, server: int, num_servers: int) -> str:
    """A server's file; its epoch is in the name, so that servers of two plans never write to one path."""
    return f"epoch-{epoch:04d}-shard-{server:03d}-of-{num_servers:03d}.safetensors"


def fragment_digest(state: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """sha256 of one fragment's state: the weights, then the optimizer's arrays by name."""
    digest = hashlib.sha256()
    for kind in [WEIGHT, *sorted(set(state) - {WEIGHT})]:
        digest.update(kind.encode())
        digest.update(bytes_of(state[kind]))
    return digest.digest()


def state_digest(fragment_digests: Sequence[bytes]) -> str:
    """Hex sha256 over all fragments in order: the identity of a version, whoever held it."""
    return hashlib.sha256(b"".join(fragment_digests)).hexdigest()


def write_shard(
    directory: str, file: str, tensors: Sequence[Tensor], shard: Sequence[tuple[Fragment, State]]
) -> tuple[FileEntry, list[bytes]]:
    """Write one server's fragments; return the file's entry and each fragment's digest."""
    arrays = {
        f"{kind}/{slice_name(tensors, fragment)}": array for fragment, state in shard for kind, array in state.items()
    }
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    entry = write_tensor_file(directory, file, specs, lambda name: arrays[name], {"format": "gradstream"})
    return entry, [fragment_digest(state) for _, state in shard]


def write_tensor_file(
    directory: str,
    file: str,
    specs: Sequence[TensorSpec],
    contents: Callable[[str], npt.NDArray[Any]],
    metadata: Mapping[str, str],
) -> FileEntry:
    """Write a safetensors file of a checkpoint, whole or not at all, and its directory if need be. Raises OSError."""
    files.make_directory(directory)
    written: list[tuple[int, str]] = []
    files.write_atomic(
        files.join(directory, file),
        lambda stream: written.append(write_tensors(stream, specs, contents, metadata)),
        judged=True,
    )
    num_bytes, sha256 = written[-1]
    return FileEntry(file=file, num_bytes=num_bytes, sha256=sha256)


def write_manifest(
    directory: str,
    plan: Plan,
    version: int,
    reports: Sequence[coordinator_pb2.ReportCheckpointRequest],
    progress: Mapping[str, int],
    residuals: Sequence[ResidualEntry] = (),
) -> CheckpointManifest:
    """Make the checkpoint exist, from all servers' reports. Raises CheckpointError when they do not fit the plan, or a
    file is not seen here with the size that was reported.

    The tokenizer is copied beside the weights, so that a checkpoint can be exported where the data is no more.
    """
    by_server = {report.server: report for report in reports}
    digests = {digest.fragment: digest.sha256 for report in reports for digest in report.fragments}
    if sorted(by_server) != list(range(len(plan.servers))) or sorted(digests) != list(range(len(plan.fragments))):
        raise CheckpointError(f"checkpoint of version {version}: the servers' reports do not cover the plan")
    manifest = CheckpointManifest(
        job_id=plan.job_id,
        epoch=plan.epoch,
        version=version,
        unix_ms=int(time.time() * 1000),
        recipe=plan.recipe.model_dump(mode="json"),
        architecture=plan.model_config,
        end_of_text_id=plan.data_manifest.end_of_text_id,
        tensors=tuple(TensorEntry(name=t.name, shape=t.shape, decay=t.decay, unit=t.unit) for t in plan.tensors),
        fragment_elements=plan.fragment_elements,
        placement=plan.placement,
        files=tuple(
            FileEntry(file=report.file, num_bytes=report.num_bytes, sha256=report.sha256)
            for _, report in sorted(by_server.items())
        ),
        state_sha256=state_digest([digests[index] for index in range(len(plan.fragments))]),
        progress=dict(progress),
        residuals=tuple(residuals),
    )
    _check_files(directory, plan, manifest.files)
    _check_residuals(directory, manifest.residuals)
    source = files.join(plan.recipe.data.path, plan.data_manifest.tokenizer_file)
    try:
        tokenizer = files.read_verified(source, plan.data_manifest.tokenizer_sha256)
    except (OSError, DataError, ConfigError) as error:
        raise CheckpointError(f"the tokenizer {source} cannot be copied into the checkpoint ({error})") from None
    files.write_atomic(files.join(directory, TOKENIZER_NAME), lambda stream: stream.write(tokenizer), judged=True)
    text = manifest.model_dump_json(indent=1).encode()
    files.write_atomic(files.join(directory, MANIFEST_NAME), lambda stream: stream.write(text), judged=True)
    keep = {entry.file for entry in (*manifest.files, *manifest.residuals)}
    for name in files.list_names(directory):
        # Of a plan that never got to its manifest. What a newer plan's servers write, or are still writing, stays.
        match = _FILE_OF_EPOCH.fullmatch(name)
        if match is not None and int(match[1]) <= plan.epoch and name not in keep:
            files.remove(files.join(directory, name))
    return manifest


def _check_files(directory: str, plan: Plan, entries: Sequence[FileEntry]) -> None:
    """Raise CheckpointError when a server's file is not seen from here as reported: it may have a disk of its own."""
    for server, entry in zip(plan.servers, entries, strict=True):
        found = _not_as_reported(directory, entry)
        if found:
            raise CheckpointError(
                f"parameter server {server.name} reported {found}; let it write to the coordinator's run_root "
                f"({plan.checkpoint_root}), on a file system that both share"
            )


def _check_residuals(directory: str, residuals: Sequence[ResidualEntry]) -> None:
    """Raise CheckpointError when a worker's file is not seen from here as reported."""
    for residual in residuals:
        found = _not_as_reported(directory, residual)
        if found:
            raise CheckpointError(
                f"the worker of slot {residual.slot} reported {found}; a codec that keeps residuals needs workers that "
                f"see the coordinator's run_root"
            )


def _not_as_reported(directory: str, entry: FileEntry) -> str:
    """What was reported of a file and what is seen of it; empty when they agree."""
    path = files.join(directory, entry.file)
    num_bytes = files.size_of(path)
    if num_bytes == entry.num_bytes:
        return ""
    seen = "is not there" if num_bytes is None else f"has {num_bytes} bytes"
    return f"{path} of {entry.num_bytes} bytes, and seen from the coordinator it {seen}"


def read_manifest(directory: str) -> CheckpointManifest:
    """Read and check a manifest. Raises CheckpointError with one line."""
    path = files.join(directory, MANIFEST_NAME)
    try:
        return parse_manifest(directory, files.read_bytes(path))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise CheckpointError(_damaged_manifest(directory, one_line(error))) from None


def parse_manifest(directory: str, content: bytes) -> CheckpointManifest:
    """Check the contents of a manifest. Raises CheckpointError with one line."""
    path = files.join(directory, MANIFEST_NAME)
    try:
        manifest = CheckpointManifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(_damaged_manifest(directory, error.errors()[0]["msg"])) from None
    tensors = [entry.tensor() for entry in manifest.tensors]
    known = range(len(manifest.files))
    if (
        len(manifest.placement) != num_fragments(tensors, manifest.fragment_elements)
        or not all(file in known for file in manifest.placement)
        or len({tensor.name for tensor in tensors}) < len(tensors)
    ):
        raise CheckpointError(
            f"checkpoint manifest {path} contradicts itself; restore it, "
            f"or remove {directory} to go back to an older one"
        )
    return manifest


def _damaged_manifest(directory: str, detail: str) -> str:
    return (
        f"checkpoint manifest {files.join(directory, MANIFEST_NAME)} is damaged ({detail}); restore it, or remove "
        f"{directory} to go back to an older one"
    )


def list_checkpoints(root: str) -> list[CheckpointManifest]:
    """The checkpoints under `root`, oldest first. Directories without a manifest do not count."""
    found = []
    for name in files.list_names(root):
        directory = files.join(root, name)
        if _DIRECTORY.fullmatch(name) and MANIFEST_NAME in files.list_names(directory):
            try:
                found.append(read_manifest(directory))
            except CheckpointError:
                if MANIFEST_NAME in files.list_names(directory):
                    raise  # else it was removed meanwhile
    return sorted(found, key=lambda manifest: manifest.version)


def remove_checkpoint(root: str, version: int) -> None:
    """Remove a checkpoint, its manifest first, so that no half of it can pass for a whole."""
    directory = directory_of(root, version)
    files.remove(files.join(directory, MANIFEST_NAME))
    files.remove(directory)


class CheckpointReader:
    """Reads slices of a checkpoint, from whatever files hold them. Each file's size and hash are verified before its
    first use.

    Raises CheckpointError that names the damaged file.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._open_files: dict[int, Any] = {}
        self._numbers = {entry.name: number for number, entry in enumerate(self.manifest.tensors)}
        self._tensors = [entry.tensor() for entry in self.manifest.tensors]
        self._fragments: dict[int, list[Fragment]] = {}
        for fragment in self.manifest.fragments():
            self._fragments.setdefault(fragment.tensor, []).append(fragment)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError when the checkpoint has no such tensor."""
        if tensor not in self._numbers:
            raise CheckpointError(
                f"checkpoint {self.directory} has no tensor '{tensor}'; it belongs to another model than the recipe's"
            )
        return self._tensors[self._numbers[tensor]].shape

    def read(self, kind: str, tensor: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Elements [begin, end) of a tensor's `kind`, fp32, freshly allocated."""
        import numpy as np

        self.shape(tensor)
        pieces = self._fragments.get(self._numbers[tensor], [])
        first = bisect_right([piece.begin for piece in pieces], begin) - 1
        # Nothing is allocated before the files are known to have it all.
        found = [(piece, self._slice(kind, piece, piece.num_elements)) for piece in pieces[first:] if piece.begin < end]
        out = np.empty(end - begin, dtype=np.float32)
        for piece, source in found:
            start, stop = max(begin, piece.begin), min(end, piece.end)
            out[start - begin : stop - begin] = source[start - piece.begin : stop - piece.begin]
        return out

    def scalar(self, kind: str, tensor: str, begin: int) -> npt.NDArray[np.float32]:
        """The one-element array that the fragment holding element `begin` keeps under `kind`."""
        pieces = self._fragments[self._numbers[tensor]]
        piece = pieces[bisect_right([piece.begin for piece in pieces], begin) - 1]
        return self._slice(kind, piece, 1)[:]  # type: ignore[no-any-return]

    def _slice(self, kind: str, piece: Fragment, num_elements: int) -> Any:
        """What a file has of a fragment, fp32 and of so many elements, to be read in slices."""
        from safetensors import SafetensorError, safe_open

        number, key = self.manifest.placement[piece.index], f"{kind}/{slice_name(self._tensors, piece)}"
        entry = self.manifest.files[number]
        path = files.join(self.directory, entry.file)
        if number not in self._open_files:
            local = verified_file(self.directory, entry)
            with parsing(lambda cause: CheckpointError(f"checkpoint file {path} cannot be read ({cause})")):
                self._open_files[number] = safe_open(local, framework="numpy")
        try:
            found = self._open_files[number].get_slice(key)
        except SafetensorError:
            raise CheckpointError(
                f"checkpoint file {path} has no '{key}'; it was written with another optimizer than the recipe's"
            ) from None
        if found.get_dtype() != "F32" or list(found.get_shape()) != [num_elements]:
            raise CheckpointError(
                f"checkpoint file {path}: '{key}' is {found.get_dtype()} of shape {found.get_shape()}, and the "
                f"manifest says fp32 of [{num_elements}]; they do not belong together"
            )
        return found


def verified_file(directory: str, entry: FileEntry) -> str:
    """The local path of a file whose size and hash are those of the manifest. Raises CheckpointError."""
    path = files.join(directory, entry.file)
    cure = f"restore the file, or remove {directory} to go back to an older checkpoint"
    try:
        fs, inner = files.file_system(path)
        num_bytes = fs.size(inner)
        if num_bytes != entry.num_bytes:
            raise CheckpointError(
                f"checkpoint file {path} is truncated: {num_bytes} bytes instead of {entry.num_bytes}; {cure}"
            )
        if files.sha256(path) != entry.sha256:
            raise CheckpointError(f"checkpoint file {path} is damaged: its sha256 is not the manifest's; {cure}")
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read ({error}); {cure}") from None
    if files.is_local(path):
        return str(inner)
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="gradstream-", suffix=".safetensors", delete=False) as copy:
        for piece in files.pieces(path):
            copy.write(piece)
    return copy.name


def export_huggingface(directory: str, destination: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face model directory, which is there whole or not at all.

    config.json, model.safetensors (several with an index above 4 GiB), tokenizer.json, tokenizer_config.json. Raises
    CheckpointError for a damaged checkpoint and when `destination` is not empty.
    """
    with files.whole_directory(destination) as temporary:
        write_huggingface(directory, temporary)


def write_huggingface(directory: str, destination: Path, weights: bool = True, chat: bool = False) -> CheckpointReader:
    """Write a checkpoint's weights, config and tokenizer into a directory that is there, without `weights` the others
    alone; return what reads the checkpoint.

    What a fine-tuning does not change comes from its base. `chat`: as for `write_generation_config`. Raises
    CheckpointError, and ConfigError for the base's files.
    """
    from gradstream.core import base_files, base_tokenizer  # which reads checkpoints itself

    reader = CheckpointReader(directory)
    finetuning = reader.manifest.finetuning
    if finetuning is not None and finetuning.method == "lora":
        raise CheckpointError(
            f"{directory} holds adapters, not a whole model; export it with `gradstream finetune export`"
        )
    if weights:
        write_weights(huggingface_weights(reader), destination)
    write_config(reader, destination)
    if finetuning is None:
        write_tokenizer(reader.manifest, _tokenizer_of(reader), destination)
    else:
        # Where the base is gone, the checkpoint's own tokenizer has to do; one that is there must be the one it was.
        tokenizer = finetuning.base.tokenizer
        if tokenizer is not None and base_files.is_there(tokenizer.directory):
            base_tokenizer.record_tokenizer(finetuning.base)
        base = Base(kind="checkpoint", path=directory, title=directory, files=(), sha256="0" * 64)
        base_tokenizer.write_tokenizer(base, destination)
        base_tokenizer.write_generation_config(base, destination, chat)
    return reader


def huggingface_weights(reader: CheckpointReader) -> list[WeightsFile]:
    """A checkpoint's weights as the files of a Hugging Face directory, made as they are read. Reading them raises
    CheckpointError when the checkpoint is damaged."""
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
    """Write a checkpoint's config.json as a Hugging Face directory has it."""
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
    """Write a checkpoint's tokenizer.json, of the contents `tokenizer`, and tokenizer_config.json as a Hugging Face
    directory has them. Raises CheckpointError when the tokenizer is no JSON."""
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


def added_token(vocabulary: Any, token_id: int) -> str | None:
    """The text that the contents of a tokenizer.json give a token: one of its added tokens, else of its model's
    vocabulary, where an end of text may lie alone; None if there is none."""
    tree = vocabulary if isinstance(vocabulary, dict) else {}
    tokens, model = tree.get("added_tokens"), tree.get("model")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and token.get("id") == token_id and isinstance(token.get("content"), str):
            return str(token["content"])
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict):
        return next((str(text) for text, number in words.items() if number == token_id), None)
    if isinstance(words, list) and 0 <= token_id < len(words):  # of a Unigram model: text and score
        entry = words[token_id]
        return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
    return None


def slice_name(tensors: Sequence[Tensor], fragment: Fragment) -> str:
    """The name of a slice, which says nothing of who held it."""
    return f"{tensors[fragment.tensor].name}[{fragment.begin}:{fragment.end}]"
