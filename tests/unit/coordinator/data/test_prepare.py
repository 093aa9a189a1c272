"""Preparing a data set: the result is a function of the input alone, and every document is in one place."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from gradstream.coordinator.data.prepare import PrepareProgress, inspect, is_validation, load_manifest, prepare, verify
from gradstream.coordinator.data.tokenization import (
    BATCH_DOCUMENTS,
    BATCHES_PER_PROCESS,
    SAMPLE_BYTES,
    TokenizerFile,
    encode,
)
from gradstream.core.data.manifest import Manifest
from gradstream.core.recipe.recipe import PrepareConfig

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "return",
    "import",
    "naïve",
    "日本語",
    "🙂",
]


def text(number: int, num_words: int = 60) -> str:
    """A document that no other number has."""
    return f"document {number}\n" + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(num_words))


def options(*sources: Any, **more: Any) -> PrepareConfig:
    """Options for small data sets."""
    defaults = {"vocab_size": 300, "num_shards": 2, "validation_fraction": 0.25}
    return PrepareConfig(sources=[str(source) for source in sources], **{**defaults, **more})


def write_texts(directory: Path, count: int, suffix: str = ".txt") -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    texts = [text(number) for number in range(count)]
    for number, content in enumerate(texts):
        (directory / f"{number:03d}{suffix}").write_text(content, encoding="utf-8")
    return texts


def decoded(path: str, split: str) -> list[list[str]]:
    """The documents of each data shard of a split, read by the index and decoded."""
    manifest = load_manifest(path)
    filesystem, root = fsspec.core.url_to_fs(path)
    tokenizer = Tokenizer.from_str(filesystem.cat_file(f"{root}/{manifest.tokenizer_file}").decode())
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    shards = []
    for shard in manifest.split(split):
        tokens = np.frombuffer(filesystem.cat_file(f"{root}/{shard.file}"), dtype)
        index = np.frombuffer(filesystem.cat_file(f"{root}/{shard.index_file}"), "<u8")
        assert index[0] == 0
        assert index[-1] == len(tokens) == shard.num_tokens
        documents = []
        for begin, end in pairwise(index):
            assert tokens[end - 1] == manifest.end_of_text_id
            documents.append(tokenizer.decode(tokens[begin : end - 1].tolist(), skip_special_tokens=False))
        assert len(documents) == shard.num_documents
        shards.append(documents)
    return shards


def all_documents(path: str) -> list[str]:
    return [document for split in ("train", "validation") for shard in decoded(path, split) for document in shard]


def fingerprint(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out" / "set")


def test_directory_of_text_and_code(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "in", 12) + write_texts(tmp_path / "in" / "sub", 3, ".py")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "config").write_text("hidden")
    (tmp_path / "in" / "empty.txt").write_text(" \n")
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (tmp_path / "in" / "latin1.txt").write_bytes("é".encode("latin-1"))
    seen: list[PrepareProgress] = []

    manifest = prepare(options(tmp_path / "in"), out, seen.append)

    assert Counter(all_documents(out)) == Counter(texts)
    assert manifest == load_manifest(out) == verify(out)
    assert manifest.token_dtype == "uint16"
    assert manifest.end_of_text_id == 0
    assert manifest.vocab_size == 300
    assert [shard.file for shard in manifest.split("train")] == ["train-00000.tokens", "train-00001.tokens"]
    assert len(manifest.split("validation")) == 2
    assert seen[-1].phase == "done"
    assert seen[-1].num_skipped_files == 2
    assert seen[-1].num_documents == 15
    assert seen[-1].num_tokens == sum(shard.num_tokens for shard in manifest.shards)
    assert all(state.bytes_done <= state.bytes_total for state in seen)
    assert os.listdir(Path(out).parent) == ["set"]


def test_what_people_should_see(tmp_path: Path, out: str) -> None:
    """The manifest and the last progress say as what files were read, what was left out and why."""
    write_texts(tmp_path / "in", 12)
    (tmp_path / "in" / "rows.json.gz").write_bytes(gzip.compress(b'{"text": "one row"}\n{"text": " "}\n' * 4))
    (tmp_path / "in" / "b.bin").write_bytes(b"\0\1")
    (tmp_path / "in" / ".hidden").write_text("hidden")
    (tmp_path / "in" / "link.txt").symlink_to("001.txt")
    seen: list[PrepareProgress] = []
    manifest = prepare(options(tmp_path / "in"), out, seen.append)
    assert manifest.read_as == {"JSON lines by their content": 1, "text": 13}
    assert manifest.left_out == {
        "blank documents": 4,
        "files that are not UTF-8 text": 1,
        "hidden files and directories": 1,
    }
    assert seen[-1].left_out == manifest.left_out
    assert seen[-1].notes == (
        f"files that are not UTF-8 text were left out (1), the first: {tmp_path}/in/b.bin",
        "files are also read through a link; their text is in the data set twice (1)",
    )
    assert seen[-1].end_of_text == "'<|endoftext|>' (id 0), by the trained tokenizer"
    summary = inspect(out)
    assert (summary.read_as, summary.left_out) == (manifest.read_as, manifest.left_out)


def test_a_data_set_inside_of_its_source(tmp_path: Path) -> None:
    """Made again, it does not hold its own files."""
    texts = write_texts(tmp_path, 12)
    for _ in range(2):
        manifest = prepare(options(tmp_path), str(tmp_path / "set"), force=True)
        assert Counter(all_documents(str(tmp_path / "set"))) == Counter(texts)
    assert manifest.left_out == {"files of the data set itself": 10}


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """A name that is no UTF-8 is read, and written out in the manifest."""
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    texts = write_texts(Path(directory), 12)
    (Path(directory) / "000.txt").rename(f"{directory}/{os.fsdecode(bytes([255]))}.txt")
    for number, source in enumerate((directory, f"{directory}/*")):
        out = f"{directory}-{number}"
        assert prepare(options(source), out).sources == (source.replace("\udce9", "\\xe9"),)
        assert Counter(all_documents(out)) == Counter(texts)
        assert inspect(out).path == out.replace("\udce9", "\\xe9")


def test_glob_single_files_and_duplicates(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "in", 9)
    (tmp_path / "in" / "other.md").write_text("not matched")
    write_texts(tmp_path / "in" / "[odd]", 1)
    prepare(options(tmp_path / "in" / "*.txt", tmp_path / "in" / "000.txt", tmp_path / "in" / "[odd]"), out)
    assert Counter(all_documents(out)) == Counter([*texts, texts[0]])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl(tmp_path: Path, out: str, name: str) -> None:
    texts = [text(number) for number in range(20)]
    lines = "".join(json.dumps({"body": value, "n": 1}) + "\n" for value in texts) + '\n{"body": null}\n{"body": ""}\n'
    opener: Any = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as handle:
        handle.write(lines)
    prepare(options(tmp_path / name, text_field="body"), out)
    assert Counter(all_documents(out)) == Counter(texts)


def test_parquet_and_compressed_text(tmp_path: Path, out: str) -> None:
    texts = [text(number) for number in range(20)]
    pq.write_table(pa.table({"text": [*texts, None], "n": range(21)}), tmp_path / "rows.parquet", row_group_size=6)
    with gzip.open(tmp_path / "more.txt.gz", "wt", encoding="utf-8") as handle:
        handle.write(text(99))
    prepare(options(tmp_path / "rows.parquet", tmp_path / "more.txt.gz"), out)
    assert Counter(all_documents(out)) == Counter([*texts, text(99)])


def test_any_fsspec_path_in_and_out(request: pytest.FixtureRequest) -> None:
    root = f"memory://{request.node.name}"
    filesystem = fsspec.filesystem("memory")
    texts = [text(number) for number in range(12)]
    for number, value in enumerate(texts):
        filesystem.pipe_file(f"{root}/in/{number:02d}.txt", value.encode())
    manifest = prepare(options(f"{root}/in"), f"{root}/out")
    assert Counter(all_documents(f"{root}/out")) == Counter(texts)
    assert verify(f"{root}/out") == manifest
    replaced = prepare(options(f"{root}/in", validation_fraction=0), f"{root}/out", force=True)
    assert verify(f"{root}/out") == replaced
    assert replaced.split("validation") == []


def test_the_result_does_not_depend_on_processes_or_place(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 30)
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps({"text": text(n, 400)}) + "\n" for n in range(600)))
    prepare(options(tmp_path / "in", num_shards=3), str(tmp_path / "a"), num_processes=1)
    prepare(options(tmp_path / "in", num_shards=3), str(tmp_path / "b"), num_processes=2)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "in").rename(tmp_path / "moved")
    prepare(options(tmp_path / "moved", num_shards=3), str(tmp_path / "c"))
    same, moved = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "c")
    del same["manifest.json"], moved["manifest.json"]  # it names its sources
    assert same == moved


def test_validation_is_split_by_document_and_never_in_train(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "in", 40)
    prepare(options(tmp_path / "in", validation_fraction=0.2), out)
    held_out = {document for shard in decoded(out, "validation") for document in shard}
    train = {document for shard in decoded(out, "train") for document in shard}
    assert held_out == {document for index, document in enumerate(texts) if is_validation(index, 0.2)}
    assert len(held_out) == 8
    assert not held_out & train


@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_the_held_out_share_is_exact_to_one_document(fraction: float) -> None:
    for count in (10, 99, 731):
        held_out = sum(is_validation(index, fraction) for index in range(count))
        assert abs(held_out - count * fraction) <= 1
    assert not any(is_validation(index, 0) for index in range(10))


def test_shards_are_balanced_by_tokens(tmp_path: Path, out: str) -> None:
    rows = [text(number, 2000 if number % 4 == 0 else 20) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    manifest = prepare(options(tmp_path / "rows.jsonl", num_shards=4, validation_fraction=0.1), out)
    largest = max(len(tokens) for tokens in rows)
    for split in ("train", "validation"):
        counts = [shard.num_tokens for shard in manifest.split(split)]
        assert min(counts) > 0
        assert max(counts) - min(counts) <= largest


def test_an_existing_tokenizer_is_copied_and_its_ids_kept(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 12)
    first = prepare(options(tmp_path / "in"), str(tmp_path / "a"))
    tokenizer = tmp_path / "mine.json"
    tree = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    # Settings that would spoil whole documents, and an end of text with another name and id.
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    vocabulary = tree["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["</s>"], vocabulary[last] = vocabulary[last], vocabulary.pop("<|endoftext|>")
    tree["added_tokens"] = [dict(tree["added_tokens"][0], id=vocabulary["</s>"], content="</s>")]
    tokenizer.write_text(json.dumps(tree))
    second = prepare(options(tmp_path / "in", tokenizer=str(tokenizer), end_of_text="</s>"), str(tmp_path / "b"))
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert second.end_of_text_id == second.vocab_size - 1
    assert [s.num_tokens for s in second.shards] == [s.num_tokens for s in first.shards]


def test_wide_ids_are_uint32() -> None:
    assert TokenizerFile(b"", 65536, 0).token_dtype == "uint16"
    assert TokenizerFile(b"", 65537, 0).token_dtype == "uint32"


def test_a_document_cannot_end_itself(tmp_path: Path, out: str) -> None:
    forged = "before <|endoftext|> after"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{forged} {n}"}) + "\n" for n in range(8)))
    manifest = prepare(options(tmp_path / "rows.jsonl"), out)
    assert all(document.startswith(forged) for document in all_documents(out))
    for shard in manifest.shards:
        tokens = np.fromfile(Path(out) / shard.file, "<u2")
        assert (tokens == manifest.end_of_text_id).sum() == shard.num_documents


def test_lone_surrogates_are_replaced(tmp_path: Path, out: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud800b"}\n' * 8)
    seen: list[PrepareProgress] = []
    prepare(options(tmp_path / "rows.jsonl"), out, seen.append)
    assert set(all_documents(out)) == {"a?b"}
    assert seen[-1].notes == ("documents hold half of a surrogate pair, which became '?' (8)",)


def test_max_bytes_stops_early_and_cuts_the_last_document(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "in", 30)
    sizes = [len(value.encode()) for value in texts]
    limit = sum(sizes[:10]) + 101
    prepare(options(tmp_path / "in", max_bytes=limit), out)
    documents = all_documents(out)
    assert len(documents) == 11
    assert limit - 4 < sum(len(document.encode()) for document in documents) <= limit
    assert set(texts[:10]) < set(documents)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_memory_is_bounded_by_batches_in_flight(tmp_path: Path, num_processes: int) -> None:
    """The input is not read ahead of the output by more than the batches in flight."""
    prepare(options(_rows(tmp_path, 8), validation_fraction=0), str(tmp_path / "set"))
    content = (tmp_path / "set" / "tokenizer.json").read_bytes()
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _ in range(40 * BATCH_DOCUMENTS):
            read += 1
            yield "x"

    stream = encode(documents(), TokenizerFile(content, 300, 0), num_processes)
    next(stream)
    assert read <= BATCHES_PER_PROCESS * num_processes * BATCH_DOCUMENTS
    stream.close()


def _rows(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text(number)}) + "\n" for number in range(count)))
    return path


def test_the_tokenizer_sample_is_bounded(tmp_path: Path) -> None:
    from gradstream.coordinator.data.tokenization import _sample
    from gradstream.core.data.sources import list_files

    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / name).write_text("some text " * (SAMPLE_BYTES // 15))
    (tmp_path / "in" / "small").write_text("small")
    sample = list(_sample(list_files([str(tmp_path / "in")]), "text", None, lambda _: None))
    assert len(sample) == 4
    assert "small" in sample
    assert 0.9 * SAMPLE_BYTES < sum(map(len, sample)) <= SAMPLE_BYTES


def test_inspect_decodes_the_first_sample(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "in", 12)
    prepare(options(tmp_path / "in"), out)
    summary = inspect(out, verify_hashes=True)
    first = next(value for index, value in enumerate(texts) if not is_validation(index, 0.25))
    assert first.startswith(summary.sample[:30])
    assert summary.verified
    assert summary.train.num_documents + summary.validation.num_documents == 12
    assert summary.train.smallest_shard <= summary.train.largest_shard


def test_force_replaces_a_data_set(tmp_path: Path, out: str) -> None:
    write_texts(tmp_path / "in", 12)
    prepare(options(tmp_path / "in"), out)
    manifest = prepare(options(tmp_path / "in", num_shards=1), out, force=True)
    assert verify(out) == manifest
    assert len(list(Path(out).iterdir())) == 6  # nothing of the old one is left
    assert os.listdir(Path(out).parent) == ["set"]


def test_cli_prepares_and_inspects(tmp_path: Path) -> None:
    """JSON alone on stdout; the second time an error with exit code 2."""
    write_texts(tmp_path / "in", 12)
    command = [sys.executable, "-m", "gradstream.coordinator.cli", "data"]
    arguments = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "set"), "--num-shards", "2"]
    arguments += ["--vocab-size", "300", "--validation-fraction", "0.25", "-o", "json"]
    made = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["train"]["num_shards"] == 2
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stdout == ""
    assert "already holds a data set" in again.stderr
    (tmp_path / "set" / "train-00001.tokens").write_bytes(b"")
    looked = subprocess.run(
        [*command, "inspect", str(tmp_path / "set"), "--verify"], capture_output=True, text=True, check=False
    )
    assert looked.returncode == 3
    assert "train-00001.tokens is corrupt" in looked.stderr


def test_manifest_survives_json(tmp_path: Path, out: str) -> None:
    manifest = prepare(options(_rows(tmp_path, 12)), out)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
