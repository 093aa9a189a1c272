"""The shards of a checkpoint: the servers' files, written tensor by tensor, verified and read in slices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import CheckpointError
from gradstream.core.foreign import parsing
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


from gradstream.core.checkpoint.manifest import FileEntry, State, fragment_digest, read_manifest, write_tensor_file

REFERENCE = "copy"  # the kind's name in files for the weights as workers hold them, if they pull differences


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


class CheckpointReader:
    """Reads slices of a checkpoint from all its files. Verifies the size and hash of each file before its first use.

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
        """The shape of a tensor. Raises CheckpointError when the checkpoint has no such tensor."""
        if tensor not in self._numbers:
            raise CheckpointError(
                f"checkpoint {self.directory} has no tensor '{tensor}'; it belongs to another model than the recipe's"
            )
        return self._tensors[self._numbers[tensor]].shape

    def read(self, kind: str, tensor: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Read elements [begin, end) of a tensor's `kind` into a new fp32 array."""
        import numpy as np

        self.shape(tensor)
        pieces = self._fragments.get(self._numbers[tensor], [])
        first = bisect_right([piece.begin for piece in pieces], begin) - 1
        # Check that the files have all slices before memory is allocated.
        found = [(piece, self._slice(kind, piece, piece.num_elements)) for piece in pieces[first:] if piece.begin < end]
        out = np.empty(end - begin, dtype=np.float32)
        for piece, source in found:
            start, stop = max(begin, piece.begin), min(end, piece.end)
            out[start - begin : stop - begin] = source[start - piece.begin : stop - piece.begin]
        return out

    def scalar(self, kind: str, tensor: str, begin: int) -> npt.NDArray[np.float32]:
        """Read the one-element array `kind` of the fragment that has element `begin` of a tensor."""
        pieces = self._fragments[self._numbers[tensor]]
        piece = pieces[bisect_right([piece.begin for piece in pieces], begin) - 1]
        return self._slice(kind, piece, 1)[:]  # type: ignore[no-any-return]

    def _slice(self, kind: str, piece: Fragment, num_elements: int) -> Any:
        """A fragment's array in its file, fp32 with `num_elements` elements, which can be read in slices."""
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
    """Check that a file has the size and hash of the manifest; return its local path. Raises CheckpointError."""
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

    with tempfile.NamedTemporaryFile(prefix="gradstream-", suffix=".safetensors", delete=False) as local:
        for piece in files.pieces(path):
            local.write(piece)
    return local.name


def slice_name(tensors: Sequence[Tensor], fragment: Fragment) -> str:
    """The name of a slice, which does not depend on the server that holds it."""
    return f"{tensors[fragment.tensor].name}[{fragment.begin}:{fragment.end}]"
