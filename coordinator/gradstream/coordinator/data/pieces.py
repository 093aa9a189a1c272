"""Divide a corpus: split long documents into pieces, and choose the share of documents that is held out.

A corpus of many documents is not changed. If a corpus has few documents, or a document longer than a data shard's share
of the text, its long documents are split at paragraphs, lines, sentences or words. Each piece is a document of the data
set. The result depends only on the text and the options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

VALIDATION_FRACTION = 0.02
MAX_DEFAULT_FRACTION = 0.1
HELD_OUT_BYTES = 64 << 10
"""Bytes of text to hold out of a small corpus if the recipe names no share: some 60 samples of 256 tokens."""
MIN_PIECE_BYTES = 1 << 10
PIECES_PER_SHARD = 4
HELD_OUT_PIECES = 2
BREAKS = (
    re.compile(r"\n[^\S\n]*\n"),  # paragraphs
    re.compile(r"\n"),
    re.compile(r"[.!?…]['\"”’)\]]*\s+|[。！？]"),  # sentences
    re.compile(r"\s+"),
)


@dataclass(frozen=True, slots=True)
class Extent:
    """The amount of text in a corpus. Sizes are in bytes of UTF-8.

    `lengths` are the lengths of the documents that were counted: all documents if `whole`, else a number from which on
    further documents do not change the division. `num_bytes` and `longest` are of the whole corpus; if it was not
    counted whole, they come from the stored sizes of its files.
    """

    lengths: tuple[int, ...]
    num_bytes: int
    longest: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Division:
    """The division of a corpus.

    Documents of at least 1.5 times `piece_bytes` are split; 0 splits none. `validation_fraction` of the documents,
    after the split, is held out.
    """

    piece_bytes: int
    validation_fraction: float


def enough_documents(num_shards: int, fraction: float | None) -> int:
    """The number of documents that suffices without splitting any document."""
    share = VALIDATION_FRACTION if fraction is None else fraction
    return max(math.ceil(num_shards / (1 - share)), math.ceil(1 / share) if share else 1)


def divide(extent: Extent, num_shards: int, fraction: float | None) -> Division:
    """Decide how to divide a corpus. `fraction` is the person's share to hold out, None for the default."""
    share = fraction
    if share is None:
        share = min(MAX_DEFAULT_FRACTION, max(VALIDATION_FRACTION, HELD_OUT_BYTES / max(1, extent.num_bytes)))
    too_few = extent.whole and len(extent.lengths) < enough_documents(num_shards, share)
    piece_bytes = 0
    if too_few or extent.longest * num_shards > extent.num_bytes:
        num_pieces = max(PIECES_PER_SHARD * num_shards, math.ceil(HELD_OUT_PIECES / share) if share else 0)
        piece_bytes = max(MIN_PIECE_BYTES, math.ceil(extent.num_bytes / num_pieces))
    if share and extent.whole:  # hold out at least one document if there are two
        total = sum(num_pieces_of(length, piece_bytes) for length in extent.lengths)
        share = max(share, 1 / total) if total > 1 else 0.0
    return Division(piece_bytes, share)


def num_pieces_of(num_bytes: int, piece_bytes: int) -> int:
    """The number of pieces into which a document is split."""
    return max(1, math.floor(num_bytes / piece_bytes + 0.5)) if piece_bytes else 1


def split_document(text: str, piece_bytes: int) -> Iterator[str]:
    """Split a document into pieces, whose concatenation is the document. No piece is blank unless the document is."""
    count = num_pieces_of(len(text.encode("utf-8")), piece_bytes)
    begin = 0
    for end in _cuts(text, count):
        if text[begin:end].strip() and text[end:].strip():
            yield text[begin:end]
            begin = end
    yield text[begin:]


def _cuts(text: str, count: int) -> Iterable[int]:
    """Choose `count - 1` places in rising order, at nearly equal distances, each after the strongest break nearby."""
    reach = len(text) // count // 4
    for number in range(1, count):
        target = len(text) * number // count
        yield next((place for pattern in BREAKS if (place := _nearest(pattern, text, target, reach))), target)


def _nearest(pattern: re.Pattern[str], text: str, target: int, reach: int) -> int | None:
    places = [found.end() for found in pattern.finditer(text, max(0, target - reach), target + reach)]
    return min(places, key=lambda place: (abs(place - target), place), default=None)
