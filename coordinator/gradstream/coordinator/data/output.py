"""Distribute documents over the data shards of a split."""

from __future__ import annotations

import heapq

from gradstream.coordinator.data.tokenization import Document
from gradstream.core.data.manifest import DataShard
from gradstream.core.data.output import Output, ShardWriter, Split


class SplitWriter:
    """Distributes the documents of one split over its data shards: each goes to the shard with the fewest tokens.

    So the sizes of shards differ by at most one document, and a split with fewer documents than `max_shards` has one
    shard for each.
    """

    def __init__(self, output: Output, split: Split, max_shards: int):
        self._output = output
        self._split: Split = split
        self._max_shards = max_shards
        self._shards: list[ShardWriter] = []
        self._fewest: list[tuple[int, int]] = []  # a heap of (tokens, shard); ties go to the lower number
        self.num_documents = 0
        self.num_tokens = 0

    def add(self, document: Document) -> None:
        """Append a document. Raises DataError when it cannot be written."""
        if len(self._shards) < self._max_shards:
            self._shards.append(ShardWriter(self._output, self._split, len(self._shards)))
            heapq.heappush(self._fewest, (0, len(self._shards) - 1))
        num_tokens, number = self._fewest[0]
        with self._output.explained():
            self._shards[number].add(document.tokens, document.num_tokens)
        heapq.heapreplace(self._fewest, (num_tokens + document.num_tokens, number))
        self.num_documents += 1
        self.num_tokens += document.num_tokens

    def close(self) -> list[DataShard]:
        """Finish all files; return their entries for the manifest. Raises DataError."""
        with self._output.explained():
            return [shard.close() for shard in self._shards]
