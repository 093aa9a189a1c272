"""Packs whole examples into rows of fixed length, and encodes the rows as bytes.

This is the layout "rows" of gradstream.core.data.manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from gradstream.core.data.manifest import NO_TARGET, ROW_PLANES, DataShard
from gradstream.core.data.output import Output, ShardWriter, Split
from gradstream.core.data.sampler import permute
from gradstream.services.fine_tuning.examples.rendering import Example


def pack(lengths: Sequence[int], row_length: int, min_rows: int = 1) -> list[list[int]]:
    """Assign examples to rows; return for each row the numbers of its examples, each once.

    Best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973): the longest first, each into the
    fullest row that it fits. The result depends on `lengths` and their order alone. Rows are split until there are
    `min_rows`, if there are enough examples. Raises ValueError for a length outside [1, row_length].
    """
    if any(not 1 <= length <= row_length for length in lengths):
        raise ValueError(f"an example has no place in a row of {row_length}")
    rows: list[list[int]] = []
    # Rows by their number of free places; bit n of `free` is set when some row has n free places.
    with_places: list[list[int]] = [[] for _ in range(row_length + 1)]
    free = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        fitting = free >> length
        if fitting:
            places = length + (fitting & -fitting).bit_length() - 1
            row = with_places[places].pop()
            if not with_places[places]:
                free ^= 1 << places
        else:
            places, row = row_length, len(rows)
            rows.append([])
        rows[row].append(number)
        with_places[places - length].append(row)
        free |= 1 << (places - length)
    while len(rows) < min(min_rows, len(lengths)):
        fullest = max(rows, key=len)
        rows.append([fullest.pop() for _ in range(len(fullest) // 2)])
    return rows


def row_bytes(examples: Sequence[Example], row_length: int, padding_id: int) -> tuple[bytes, list[int]]:
    """Encode a row of examples; return its bytes and the place at which each example begins.

    The bytes are (3, row_length) uint32: inputs, targets and the number of the example.
    """
    row = np.empty((ROW_PLANES, row_length), "<u4")
    row[0], row[1], row[2] = padding_id, NO_TARGET, 0
    begins = [0, *accumulate(example.num_places for example in examples)]
    for number, example in enumerate(examples, 1):
        begin, end = begins[number - 1], begins[number]
        row[0, begin:end] = example.ids[:-1]
        row[1, begin:end] = np.where(example.is_target[1:], example.ids[1:], NO_TARGET)
        row[2, begin:end] = number
    return row.tobytes(), begins[:-1]


def write_rows(
    output: Output,
    split: Split,
    rows: Sequence[Sequence[Example]],
    row_length: int,
    padding_id: int,
    num_shards: int,
    seed: int,
) -> list[DataShard]:
    """Write the rows of one split evenly over its data shards, in an order that `seed` determines. Raises DataError."""
    shards = [ShardWriter(output, split, number) for number in range(num_shards)]
    with output.explained():
        for position in range(len(rows)):
            row = rows[permute(position, len(rows), f"{seed}/rows/{split}")]
            data, begins = row_bytes(row, row_length, padding_id)
            shards[position % num_shards].add(data, row_length, begins)
        return [shard.close() for shard in shards]
