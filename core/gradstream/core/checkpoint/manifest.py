"""The manifest of a checkpoint: a consistent version of weights and optimizer state on any fsspec path.

A checkpoint is a directory `step-00000100/` with one safetensors file for each server and a manifest, which is written
last, by rename. Without a manifest there is no checkpoint. Files and manifest name tensors and slices, not servers, so
a checkpoint loads onto any number of servers, bit for bit. The keys in a file are `KIND/TENSOR[BEGIN:END]`, where KIND
is "weight" or a name of optimizer state.

Writing and reading are in core because servers, coordinator and tools share the format (docs/decisions.md, 1).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradstream.core.data.manifest import Count, Digest, FileName
from gradstream.core.errors import CheckpointError, ConfigError, DataError, one_line
from gradstream.core.plan.fragments import Fragment, Tensor, cut, num_fragments
from gradstream.core.recipe.fine_tuning import FineTuning, with_new_key
from gradstream.core.recipe.local import LocalConfig
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import bytes_of
from gradstream.proto.v1 import coordinator_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

    from gradstream.core.plan.plan import Plan

State: TypeAlias = "dict[str, npt.NDArray[Any]]"
"""A fragment's arrays by kind: fp32, or the bits of bf16 as 16-bit numbers."""

_Section = TypeVar("_Section", bound=BaseModel)

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHT = "weight"
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
    """The file of one slot's residual (gradstream.core.checkpoint.residual_files)."""

    slot: Count


class CheckpointManifest(BaseModel):
    """The contents of a checkpoint. `placement[fragment]` is the index of the file with the fragment."""

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
        """Size in bytes of all files except the manifest."""
        return sum(entry.num_bytes for entry in (*self.files, *self.residuals))

    def fragments(self) -> list[Fragment]:
        """The fragments as they were cut when the checkpoint was written."""
        return cut([entry.tensor() for entry in self.tensors], self.fragment_elements)

    @property
    def fine_tuning(self) -> FineTuning | None:
        """The recipe's section for fine-tuning, if it has one. Raises CheckpointError when the section is not valid."""
        return self._section(FineTuning, with_new_key(self.recipe).get("fine_tuning"), "fine-tuning")

    @property
    def local(self) -> LocalConfig | None:
        """The recipe's section for local steps, if it has one. Raises CheckpointError when the section is not valid."""
        return self._section(LocalConfig, self.recipe.get("local"), "section for local steps")

    def _section(self, kind: type[_Section], tree: Any, name: str) -> _Section | None:
        try:
            return kind.model_validate(tree) if tree else None
        except ValidationError as error:
            raise CheckpointError(
                f"the checkpoint of job {self.job_id} has a recipe with an invalid {name} "
                f"({error.errors()[0]['msg']}); take another checkpoint"
            ) from None


def directory_of(root: str, version: int) -> str:
    """The directory of a version's checkpoint under `root`."""
    return files.join(root, f"step-{version:08d}")


def shard_file_name(epoch: int, server: int, num_servers: int) -> str:
    """The name of a server's file. The name has the epoch, so servers of two plans never write to the same path."""
    return f"epoch-{epoch:04d}-shard-{server:03d}-of-{num_servers:03d}.safetensors"


def fragment_digest(state: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """sha256 of one fragment's state: the weights, then the optimizer's arrays, sorted by name."""
    digest = hashlib.sha256()
    for kind in [WEIGHT, *sorted(set(state) - {WEIGHT})]:
        digest.update(kind.encode())
        digest.update(bytes_of(state[kind]))
    return digest.digest()


def state_digest(fragment_digests: Sequence[bytes]) -> str:
    """Hex sha256 over all fragments in order: the identity of a version, independent of its servers."""
    return hashlib.sha256(b"".join(fragment_digests)).hexdigest()


def write_checkpoint_file(directory: str, file: str, write: Callable[[BinaryIO], tuple[int, str]]) -> FileEntry:
    """Write a file of a checkpoint atomically; `write` returns its size and hex sha256.

    Makes its directory if missing. Raises OSError.
    """
    files.make_directory(directory)
    written: list[tuple[int, str]] = []
    files.write_atomic(files.join(directory, file), lambda stream: written.append(write(stream)), True, large=True)
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
    """Write a checkpoint's manifest from all servers' reports, which makes the checkpoint exist.

    The tokenizer is copied beside the weights: the checkpoint can then be exported even if the data is gone. Raises
    CheckpointError when the reports do not fit the plan, or when a file does not have its reported size here.
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
        # Remove files of an older plan that never wrote its manifest. Files of a newer plan's servers stay.
        match = _FILE_OF_EPOCH.fullmatch(name)
        if match is not None and int(match[1]) <= plan.epoch and name not in keep:
            files.remove(files.join(directory, name))
    return manifest


def _check_files(directory: str, plan: Plan, entries: Sequence[FileEntry]) -> None:
    """Raise CheckpointError when a server's file here differs from its report: the server may write to its own disk."""
    for server, entry in zip(plan.servers, entries, strict=True):
        found = _not_as_reported(directory, entry)
        if found:
            raise CheckpointError(
                f"parameter server {server.name} reported {found}; let it write to the coordinator's run_root "
                f"({plan.checkpoint_root}), on a file system that both share"
            )


def _check_residuals(directory: str, residuals: Sequence[ResidualEntry]) -> None:
    """Raise CheckpointError when a worker's file here differs from its report."""
    for residual in residuals:
        found = _not_as_reported(directory, residual)
        if found:
            raise CheckpointError(
                f"the worker of slot {residual.slot} reported {found}; a codec that keeps residuals needs workers that "
                f"see the coordinator's run_root"
            )


def _not_as_reported(directory: str, entry: FileEntry) -> str:
    """The difference between a file's report and the file as seen here, as text; empty when they agree."""
    path = files.join(directory, entry.file)
    num_bytes = files.size_of(path)
    if num_bytes == entry.num_bytes:
        return ""
    seen = "does not exist" if num_bytes is None else f"has {num_bytes} bytes"
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


def list_checkpoints(root: str, after: int = -1, limit: int | None = None) -> list[CheckpointManifest]:
    """The checkpoints under `root` of versions above `after`, oldest first, at most `limit`.

    Directories without a manifest do not count.
    """
    found: list[CheckpointManifest] = []
    versions = {int(match[1]): name for name in files.list_names(root) if (match := _DIRECTORY.fullmatch(name))}
    for version in sorted(version for version in versions if version > after):
        if limit is not None and len(found) >= limit:
            break
        directory = files.join(root, versions[version])
        if MANIFEST_NAME in files.list_names(directory):
            try:
                found.append(read_manifest(directory))
            except CheckpointError:
                if MANIFEST_NAME in files.list_names(directory):
                    raise  # without a manifest, the checkpoint was removed meanwhile
    return sorted(found, key=lambda manifest: manifest.version)


def remove_checkpoint(root: str, version: int) -> None:
    """Remove a checkpoint, its manifest first: a partly removed checkpoint then does not count as one."""
    directory = directory_of(root, version)
    files.remove(files.join(directory, MANIFEST_NAME))
    files.remove(directory)
