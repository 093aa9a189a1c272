"""The shards of a checkpoint: the servers' files, written fragment by fragment, verified and read in slices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from gradstream.core.errors import CheckpointError
from gradstream.core.foreign import parsing
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import TensorSpec, TensorStream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


from gradstream.core.checkpoint.manifest import FileEntry, State, fragment_digest, read_manifest, write_checkpoint_file

REFERENCE = "copy"  # the kind's name in files for the weights as workers hold them, if they pull differences
OUTER_MOMENTUM = "outer_momentum"  # the momentum of the outer rule, in jobs with local steps


MAX_COPY_BYTES = 256 << 20
"""The most bytes that a server copies for a checkpoint, unless two bundles are larger: then two bundles."""

Sizes: TypeAlias = "Mapping[str, tuple[str, int]]"
"""The type, as safetensors names it, and the number of elements of each of a fragment's arrays, by kind."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The kinds that may be bf16."""
_DTYPES = {"float32": "F32", "uint16": "BF16"}


def write_shard(
    directory: str,
    file: str,
    tensors: Sequence[Tensor],
    shard: Iterable[tuple[Fragment, State]],
    sizes: Sequence[tuple[Fragment, Sizes]] | None = None,
) -> tuple[FileEntry, list[bytes]]:
    """Write one server's fragments, one after the other; return the file's entry and each fragment's digest.

    `shard` may generate the fragments: an array is in use only until the next fragment is requested. Then `sizes`
    announces all of them in the same order, with the same kinds in the same order. Raises OSError, and ValueError for a
    fragment that was not announced.
    """
    announced = sizes if sizes is not None else [(fragment, sizes_of(state)) for fragment, state in _listed(shard)]
    specs = [
        TensorSpec(f"{kind}/{slice_name(tensors, fragment)}", dtype, (num_elements,))
        for fragment, kinds in announced
        for kind, (dtype, num_elements) in kinds.items()
    ]
    digests: list[bytes] = []

    def write(stream: BinaryIO) -> tuple[int, str]:
        written = TensorStream(stream, specs, {"format": "gradstream"})
        # A thread of its own for the fragments' digests: two digests of each byte take longer than a fast disk.
        with ThreadPoolExecutor(1, "digest") as threads:
            for (fragment, state), (expected, kinds) in zip(shard, announced, strict=True):
                if fragment.index != expected.index or list(state) != list(kinds):
                    raise ValueError(f"fragment {fragment.index} is not the one that was announced")
                digest = threads.submit(fragment_digest, state)
                for array in state.values():
                    written.write(array)
                digests.append(digest.result())
        return written.end()

    return write_checkpoint_file(directory, file, write), digests


def sizes_of(state: State) -> dict[str, tuple[str, int]]:
    """The type and the number of elements of each of a fragment's arrays."""
    return {kind: (_DTYPES[array.dtype.name], array.size) for kind, array in state.items()}


def _listed(shard: Iterable[tuple[Fragment, State]]) -> Sequence[tuple[Fragment, State]]:
    if not isinstance(shard, Sequence):
        raise ValueError("the sizes of fragments that are generated must be announced")
    return shard


class CheckpointReader:
    """Reads slices of a checkpoint from all its files. Verifies the size and hash of each file before its first use.

    Raises CheckpointError that names the damaged file.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._open_files: dict[int, Any] = {}
        self._locals: dict[int, str] = {}
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

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of arrays that the checkpoint has of its first fragment."""
        piece = next(iter(self.manifest.fragments()))
        keys: list[str] = self._opened(piece)[0].keys()
        end = f"/{slice_name(self._tensors, piece)}"
        return frozenset(key.removesuffix(end) for key in keys if key.endswith(end))

    def read(self, kind: str, tensor: str, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Read elements [begin, end) of a tensor's `kind` into a new fp32 array, which bf16 is widened to."""
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
        """A fragment's array in its file, with `num_elements` elements, which can be read in slices of fp32."""
        from safetensors import SafetensorError

        opened, local, path = self._opened(piece)
        key = f"{kind}/{slice_name(self._tensors, piece)}"
        try:
            found = opened.get_slice(key)
        except SafetensorError:
            raise CheckpointError(
                f"checkpoint file {path} has no '{key}'; it was written with another optimizer than the recipe's, "
                f"or by a job with local.inner_state: reset or keep"
            ) from None
        dtype = found.get_dtype()
        expected = _DTYPES.values() if kind in MOMENTS else ("F32",)
        if dtype not in expected or list(found.get_shape()) != [num_elements]:
            raise CheckpointError(
                f"checkpoint file {path}: '{key}' is {dtype} of shape {found.get_shape()}, and the "
                f"manifest says fp32 of [{num_elements}]; they do not belong together"
            )
        return _Widened(local, key) if dtype == "BF16" else found

    def _opened(self, piece: Fragment) -> tuple[Any, str, str]:
        """The open file that has a fragment, its local path, and its path in the checkpoint."""
        from safetensors import safe_open

        number = self.manifest.placement[piece.index]
        entry = self.manifest.files[number]
        path = files.join(self.directory, entry.file)
        if number not in self._open_files:
            local = verified_file(self.directory, entry)
            with parsing(lambda cause: CheckpointError(f"checkpoint file {path} cannot be read ({cause})")):
                self._open_files[number] = safe_open(local, framework="numpy")
            self._locals[number] = local
        return self._open_files[number], self._locals[number], path


class _Widened:
    """A bf16 array in a file, read in slices of fp32. numpy has no bf16, so torch reads it."""

    def __init__(self, path: str, key: str):
        from safetensors import safe_open

        opened: Any = safe_open(path, framework="pt")
        self._found = opened.get_slice(key)

    def __getitem__(self, elements: slice) -> npt.NDArray[np.float32]:
        return self._found[elements].float().numpy()  # type: ignore[no-any-return]


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
