"""The manifest of a data set.

A data set is a directory with `manifest.json`, `tokenizer.json`, token data shards (`train-00000.tokens`, …,
`validation-00000.tokens`: little-endian uint16 or uint32 token ids, nothing else) and for each an index
(`train-00000.index`: little-endian uint64 offsets, in tokens, of each document's first token, then the total).

A sample is a window of `sequence_length + 1` tokens: the first `sequence_length` are the input, the last
`sequence_length` the targets. Windows of a shard do not overlap in their targets: window w starts at token
w * sequence_length. The rest at a shard's end that does not fill a window is left out.

A data set of examples for fine-tuning has the layout "rows" instead: a sample is a row of fixed length T with one or
more whole examples in it. A row of the file is three arrays of T little-endian uint32: the input tokens; the target
after each token, or NO_TARGET where none counts; and the number of each token's example, from 1, or 0 for padding.
Attention does not cross examples. Every row has at least one target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gradstream.core.errors import DataError, one_line

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# A name, never a path: the name comes from a file and is joined to a directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_SHARDS = 1 << 16
NO_TARGET = 0xFFFFFFFF
"""Stands in a row where a token has no target that counts."""
ROW_PLANES = 3
"""Numbers of a row for each token: input, target, example."""


class DataShard(BaseModel):
    """One token file and its index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    index_file: FileName
    split: Literal["train", "validation"]
    num_tokens: Count
    num_documents: Count
    num_bytes: Count
    sha256: Digest
    index_sha256: Digest

    def num_samples(self, sequence_length: int) -> int:
        """Number of windows of `sequence_length` targets in this shard."""
        return max(0, self.num_tokens - 1) // sequence_length


class Manifest(BaseModel):
    """The contents of a data set: its files, their hashes, and where they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0)]
    end_of_text_id: Count
    end_of_text: str = ""
    """the text of that token; "" in data sets from versions that did not record it"""
    tokenizer_file: FileName = "tokenizer.json"
    tokenizer_sha256: Digest
    shards: Annotated[tuple[DataShard, ...], Field(max_length=MAX_SHARDS)]
    sources: tuple[str, ...] = ()
    read_as: dict[str, Count] = Field(default_factory=dict)
    """number of files read, by the kind that they were read as"""
    left_out: dict[str, Count] = Field(default_factory=dict)
    """number of items that the sources name and the data set leaves out, by reason"""
    num_split_documents: Count = 0
    """number of long documents that were split into pieces of about `piece_bytes`, each a document of the data set"""
    piece_bytes: Count = 0
    layout: Literal["windows", "rows"] = "windows"
    row_length: Count = 0

    @model_validator(mode="after")
    def _whole_rows(self) -> Manifest:
        rows = self.layout == "rows"
        if rows != bool(self.row_length) or (rows and self.token_dtype != "uint32"):
            raise ValueError("layout rows needs a row_length and token_dtype uint32, layout windows has no row_length")
        if rows and any(shard.num_tokens % self.row_length for shard in self.shards):
            raise ValueError(f"a shard's tokens are not whole rows of {self.row_length}")
        names = [name for shard in self.shards for name in (shard.file, shard.index_file)]
        if len(set(names)) < len(names):
            raise ValueError("two data shards have files of the same name")
        return self

    def num_samples(self, shard: DataShard, sequence_length: int) -> int:
        """Number of samples of `sequence_length` in a shard. Raises DataError for rows of another length."""
        if self.layout == "windows":
            return shard.num_samples(sequence_length)
        if sequence_length != self.row_length:
            raise DataError(
                f"the data set's rows have {self.row_length} tokens, training.sequence_length is {sequence_length}; "
                f"prepare the examples again"
            )
        return shard.num_tokens // self.row_length

    def num_bytes(self, num_tokens: int) -> int:
        """Size in bytes of the file of a shard with `num_tokens` tokens."""
        each = {"uint16": 2, "uint32": 4}[self.token_dtype]
        return num_tokens * each * (ROW_PLANES if self.layout == "rows" else 1)

    def split(self, name: str) -> list[DataShard]:
        """The data shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == name]


def parse_manifest(text: str | bytes | Mapping[str, Any], origin: str = MANIFEST_NAME) -> Manifest:
    """Validate a manifest. Raises DataError with one line."""
    try:
        manifest = Manifest.model_validate(json.loads(text) if isinstance(text, str | bytes) else text)
        manifest.model_dump_json()  # raises for half of a surrogate pair: the manifest is sent as JSON
        return manifest
    except (ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else one_line(error)
        raise DataError(f"{origin} is not a valid data manifest ({what}); prepare the data again") from None
