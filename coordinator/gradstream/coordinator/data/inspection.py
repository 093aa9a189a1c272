"""Inspect a prepared data set: summarize its contents, and compare its files with the manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from gradstream.core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gradstream.core.data.sources import open_filesystem, public_text
from gradstream.core.errors import DataError, one_line
from gradstream.core.foreign import parsing

BLOCK_BYTES = 1 << 20
SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Totals of one split; `smallest_shard` and `largest_shard` are in tokens."""

    num_shards: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    smallest_shard: int
    largest_shard: int


@dataclass(frozen=True, slots=True)
class DataSummary:
    """The contents of a data set. `sample` is the text of the first training tokens.

    `verified` tells whether all hashes were checked.
    """

    path: str
    vocab_size: int
    token_dtype: str
    end_of_text_id: int
    end_of_text: str
    sources: tuple[str, ...]
    read_as: dict[str, int]
    left_out: dict[str, int]
    train: SplitSummary
    validation: SplitSummary
    sample: str
    verified: bool


def load_manifest(path: str) -> Manifest:
    """Read the manifest of the data set at `path` (any fsspec path). Raises DataError."""
    filesystem, root = open_filesystem(path)
    try:
        with filesystem.open(f"{root}/{MANIFEST_NAME}", "rb") as handle:
            content: bytes = handle.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} holds no data set (no {MANIFEST_NAME}); make it with `gradstream data prepare`"
        ) from None
    except Exception as error:  # every fsspec backend raises its own kind
        raise DataError(
            f"{path}/{MANIFEST_NAME} cannot be read ({one_line(error)}); check the path and the rights"
        ) from None
    return parse_manifest(content, f"{path}/{MANIFEST_NAME}")


def inspect(path: str, verify_hashes: bool = False) -> DataSummary:
    """Summarize the data set at `path`; with `verify_hashes` read and check all of it. Raises DataError."""
    manifest = verify(path) if verify_hashes else load_manifest(path)
    return DataSummary(
        path=public_text(path),
        vocab_size=manifest.vocab_size,
        token_dtype=manifest.token_dtype,
        end_of_text_id=manifest.end_of_text_id,
        end_of_text=manifest.end_of_text,
        sources=manifest.sources,
        read_as=manifest.read_as,
        left_out=manifest.left_out,
        train=_summarize(manifest, "train"),
        validation=_summarize(manifest, "validation"),
        sample=_first_sample(path, manifest),
        verified=verify_hashes,
    )


def verify(path: str) -> Manifest:
    """Compare size and sha256 of every file with the manifest; return the manifest.

    Raises DataError at the first difference.
    """
    manifest = load_manifest(path)
    filesystem, root = open_filesystem(path)
    _verify_file(filesystem, root, manifest.tokenizer_file, manifest.tokenizer_sha256, None)
    for shard in manifest.shards:
        _verify_file(filesystem, root, shard.file, shard.sha256, shard.num_bytes)
        _verify_file(filesystem, root, shard.index_file, shard.index_sha256, (shard.num_documents + 1) * 8)
    return manifest


def _verify_file(filesystem: Any, root: str, name: str, sha256: str, num_bytes: int | None) -> None:
    digest, size = hashlib.sha256(), 0
    for block in _blocks(filesystem, root, name):
        digest.update(block)
        size += len(block)
    found = f"{size} bytes" if num_bytes not in (None, size) else f"sha256 {digest.hexdigest()[:12]}…"
    stated = f"{num_bytes}" if num_bytes not in (None, size) else f"{sha256[:12]}…"
    if digest.hexdigest() != sha256 or num_bytes not in (None, size):
        raise DataError(
            f"{root}/{name} is corrupt: {found} differs from the manifest's {stated}; "
            f"prepare the data again or restore the file"
        )


def _blocks(filesystem: Any, root: str, name: str) -> Any:
    try:
        with filesystem.open(f"{root}/{name}", "rb") as handle:
            while block := handle.read(BLOCK_BYTES):
                yield block
    except Exception as error:  # every fsspec backend raises its own kind
        raise DataError(
            f"{root}/{name} cannot be read ({one_line(error)}); prepare the data again or restore the file"
        ) from None


def _summarize(manifest: Manifest, split: str) -> SplitSummary:
    shards = manifest.split(split)
    return SplitSummary(
        num_shards=len(shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        smallest_shard=min((shard.num_tokens for shard in shards), default=0),
        largest_shard=max((shard.num_tokens for shard in shards), default=0),
    )


def _first_sample(path: str, manifest: Manifest) -> str:
    import numpy as np
    from tokenizers import Tokenizer

    filesystem, root = open_filesystem(path)
    shard = next((shard for shard in manifest.split("train") if shard.num_tokens), None)
    if shard is None:
        return ""
    content = b"".join(_blocks(filesystem, root, manifest.tokenizer_file))
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    head = next(_blocks(filesystem, root, shard.file), b"")[: SAMPLE_TOKENS * dtype.itemsize]

    def refused(cause: str) -> DataError:
        return DataError(f"{root}/{shard.file} cannot be decoded ({cause}); verify the data set or prepare it again")

    with parsing(refused):
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        tokens = np.frombuffer(head[: len(head) // dtype.itemsize * dtype.itemsize], dtype)
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))
