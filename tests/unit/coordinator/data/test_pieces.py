"""Any text makes a data set: long documents are split, and enough of a small corpus is held out."""

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gradstream.coordinator.data.pieces import Extent, divide, enough_documents, num_pieces_of, split_document
from gradstream.coordinator.data.prepare import PrepareProgress, is_validation, prepare
from gradstream.core.data.manifest import Manifest
from gradstream.core.data.sampler import samples_by_slot
from gradstream.core.recipe.recipe import PrepareConfig

TEXT = st.text(st.sampled_from("ab .\n!。\té\u0301"), max_size=3000)


@given(TEXT, st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_the_pieces_are_the_document(text: str, piece_bytes: int) -> None:
    pieces = list(split_document(text, piece_bytes))
    assert "".join(pieces) == text
    assert len(pieces) <= num_pieces_of(len(text.encode()), piece_bytes)
    assert not text.strip() or all(piece.strip() for piece in pieces)


@pytest.mark.parametrize(
    ("unit", "end"),
    [
        ("A line.\nAnother line.\n\n", "\n\n"),
        ("A line of words, and no paragraph\n", "\n"),
        ("A sentence. ", ". "),
        ("これは文です。", "。"),
        ("words ", " "),
    ],
)
def test_a_document_is_split_at_the_strongest_break_nearby(unit: str, end: str) -> None:
    text = unit * 400
    pieces = list(split_document(text, len(text.encode()) // 10))
    assert len(pieces) == 10
    assert all(piece.endswith(end) for piece in pieces)
    assert max(map(len, pieces)) < 1.6 * min(map(len, pieces))


@given(
    st.lists(st.integers(1, 5_000_000), min_size=1, max_size=60),
    st.integers(1, 16),
    st.none() | st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.5]),
)
def test_a_corpus_is_divided_so_that_every_split_has_documents(
    lengths: list[int], num_shards: int, fraction: float | None
) -> None:
    extent = Extent(tuple(lengths), sum(lengths), max(lengths), whole=True)
    division = divide(extent, num_shards, fraction)
    total = sum(num_pieces_of(length, division.piece_bytes) for length in lengths)
    held_out = sum(is_validation(index, division.validation_fraction) for index in range(total))
    if fraction == 0 or total == 1:
        assert held_out == 0
        return
    assert 1 <= held_out < total
    assert held_out <= math.ceil(max(division.validation_fraction, 1 / total) * total) + 1
    if sum(lengths) > 1 << 20:
        assert total - held_out >= num_shards
        if division.piece_bytes:
            assert max(lengths) < 1.5 * division.piece_bytes or total > len(lengths)


@pytest.mark.parametrize("fraction", [None, 0.05, 0.0])
def test_a_corpus_of_many_documents_is_taken_as_it_is(fraction: float | None) -> None:
    extent = Extent((8000,) * enough_documents(8, fraction), 12_000_000, 150_000, whole=False)
    division = divide(extent, 8, fraction)
    assert (division.piece_bytes, division.validation_fraction) == (0, 0.02 if fraction is None else fraction)


def test_a_document_as_long_as_the_rest_is_split_too() -> None:
    lengths = (9000,) * enough_documents(8, None)
    division = divide(Extent(lengths, 12_000_000, 6_000_000, whole=False), 8, None)
    assert num_pieces_of(6_000_000, division.piece_bytes) >= 8
    assert num_pieces_of(9000, division.piece_bytes) == 1


def words(count: int, seed: int) -> str:
    """Lines and paragraphs of `count` words."""
    choice = random.Random(seed)
    vocabulary = ["".join(choice.choices("abcdefghij", k=choice.randint(2, 7))) for _ in range(300)]
    ends = [" "] * 12 + [".\n", ".\n\n"]
    return "".join(choice.choice(vocabulary) + choice.choice(ends) for _ in range(count))


def made(path: Path, **settings: Any) -> tuple[Manifest, PrepareProgress]:
    states: list[PrepareProgress] = []
    options = PrepareConfig(sources=[str(path)], **{"vocab_size": 512, **settings})
    return prepare(options, str(path.parent / "set"), states.append, num_processes=1), states[-1]


def decoded(root: Path, manifest: Manifest, split: str) -> list[str]:
    """The documents of a split, in the order of its shards."""
    tokenizer = Tokenizer.from_file(str(root / manifest.tokenizer_file))
    texts = []
    for shard in manifest.split(split):
        tokens = np.fromfile(root / shard.file, manifest.token_dtype)
        starts = np.fromfile(root / shard.index_file, "<u8")
        for begin, end in pairwise(starts):
            assert tokens[end - 1] == manifest.end_of_text_id
            texts.append(tokenizer.decode(tokens[begin : end - 1].tolist(), skip_special_tokens=False))
    return texts


def test_one_file_becomes_a_data_set(tmp_path: Path) -> None:
    text = words(40_000, 1)
    (tmp_path / "one.txt").write_text(text)
    manifest, state = made(tmp_path / "one.txt")
    assert len(manifest.split("train")) == 8
    assert manifest.num_split_documents == 1
    for split in ("train", "validation"):
        assert min(samples_by_slot(manifest, split, 8, 64)) >= 1
    pieces = [piece for split in ("train", "validation") for piece in decoded(tmp_path / "set", manifest, split)]
    assert sum(map(len, pieces)) == len(text)
    assert all(piece in text for piece in pieces)
    assert sum(piece.endswith(("\n", text[-1])) for piece in pieces) == len(pieces)
    note = next(note for note in state.notes if "long documents were split" in note)
    assert f"about {-(-manifest.piece_bytes >> 10)} KiB" in note


def test_a_few_hundred_files_hold_some_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(265):
        (tmp_path / "in" / f"{number:03}.txt").write_text(words(400, number))
    manifest, _ = made(tmp_path / "in")
    assert manifest.num_split_documents == 0
    assert len(manifest.split("train")) == 8
    held_out = manifest.split("validation")
    assert 5 <= sum(shard.num_documents for shard in held_out) <= 27
    assert sum(shard.num_bytes for shard in held_out) >= 20_000


@pytest.mark.parametrize(("text", "num_documents", "held_out"), [("tiny", 1, 0), (words(600, 3), 3, 1)])
def test_very_little_text_has_few_shards(tmp_path: Path, text: str, num_documents: int, held_out: int) -> None:
    (tmp_path / "one.txt").write_text(text)
    manifest, state = made(tmp_path / "one.txt")
    assert sum(shard.num_documents for shard in manifest.split("validation")) == held_out
    assert len(manifest.split("train")) == num_documents - held_out
    assert any("held out" in note for note in state.notes) == (held_out == 0)


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(words(20_000, 5))
    first, _ = made(tmp_path / "one.txt")
    again = prepare(
        PrepareConfig(sources=[str(tmp_path / "one.txt")], vocab_size=512), str(tmp_path / "b"), num_processes=2
    )
    assert again == first
