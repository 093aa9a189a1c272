"""Reading documents and examples from files, recognized by name and by content; damage of any kind; counts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.tokenizers import byte_level

from gradstream.coordinator.data.sources import Corpus
from gradstream.core.data import rows as source_rows
from gradstream.core.data.sources import list_files
from gradstream.core.errors import DataError
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.services.fine_tuning.examples.dataset import prepare_examples, preview
from gradstream.services.fine_tuning.examples.reading import read_rows

TEXTS = [f"text number {number} é" for number in range(20)]
LINES = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
LIST = json.dumps([{"text": text} for text in TEXTS]).encode()
PRETTY = json.dumps([{"text": text, "inner": [{"text": "no row"}]} for text in TEXTS], indent=2, ensure_ascii=False)
OBJECTS = "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def corpus(path: Path, text_field: str = "text", **more: Any) -> Corpus:
    return Corpus(list_files([str(path)]), text_field, **more)


def documents(path: Path, text_field: str = "text", **more: Any) -> list[str]:
    return list(corpus(path, text_field, **more))


def examples(path: Path, **config: Any) -> list[Any]:
    """The rows that fine-tuning reads, as values of the field "text"."""
    (file,) = list_files([str(path)])
    return [row.reason or row.value("text") for row in read_rows(file, ExamplesConfig(path=str(path), **config))]


def both(path: Path) -> list[str]:
    """The texts of a file's rows, as both readers see them."""
    found = documents(path)
    assert examples(path) == found
    return found


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("name", "content", "read_as"),
    [
        ("a.jsonl", LINES, "JSON lines"),
        ("a.jsonlines", LINES, "JSON lines"),
        ("a.ndjson", b"\xef\xbb\xbf" + LINES, "JSON lines"),
        ("a.json", LINES, "JSON lines by their content"),
        ("a.json", b"\n\r\n" + LINES, "JSON lines by their content"),
        ("a", LINES, "JSON lines by their content"),
        ("a.txt", LINES.replace(b"\n", b"\r\n"), "JSON lines by their content"),
        ("a.json", b"\xef\xbb\xbf" + LIST, "JSON by their content"),
        ("a.json", PRETTY.encode(), "JSON by their content"),
        ("a.txt", PRETTY.encode(), "JSON by their content"),
        ("a.json", OBJECTS, "JSON by their content"),
        ("a.json", OBJECTS.replace(b"\n", b""), "JSON by their content"),
        ("a.json", b" \n" * 100_000 + LINES, "JSON lines by their content"),
        ("a.txt", b"\n" * 100_000 + LIST, "JSON by their content"),
        # Called lines, and none.
        ("a.jsonl", LIST, "JSON by their content"),
        ("a.jsonl", PRETTY.encode(), "JSON by their content"),
        ("a.ndjson", b"\xef\xbb\xbf" + OBJECTS, "JSON by their content"),
    ],
)
def test_json_is_known_by_its_content_too(tmp_path: Path, name: str, content: bytes, read_as: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](content))
    assert both(path) == TEXTS
    read = corpus(path)
    assert list(read) == TEXTS
    assert read.tally.read_as == {read_as: 1}


@pytest.mark.parametrize("packed", list(PACK)[1:])
def test_a_compressed_file_without_its_suffix(tmp_path: Path, packed: str) -> None:
    """As the blobs of a hub's cache."""
    (tmp_path / "blob").write_bytes(PACK[packed](LINES))
    assert both(tmp_path / "blob") == TEXTS
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table")
    assert both(tmp_path / "table") == TEXTS


def test_rows_longer_than_any_look_ahead(tmp_path: Path) -> None:
    texts = ["x" * 300_000 + "é", "y" * 3_000_000, "z"]
    for content in (
        "".join(json.dumps({"text": text}) + "\n" for text in texts),
        json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        "\n\n".join(json.dumps({"text": text}, indent=1) for text in texts),
    ):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert both(tmp_path / "a.json") == texts


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("package.json", '{\n "name": "x",\n "text_": 1\n}\n', "one JSON object without 'text'"),
        ("one.json", '{"name": "x"}\n', "one JSON object without 'text'"),
        ("tsconfig.json", '{\n // a comment\n "a": 1\n}', "not valid JSON"),
        ("numbers.json", "[1, 2, 3]", "JSON without objects"),
        ("code.c", "{\n  int x = 1;\n}\n", ""),
        ("braces.txt", '{"a": 1} is how one writes it\n', ""),
        ("list.md", "[a link](x)\n", ""),
        ("jinja.txt", '{"unclosed": \n' + "text\n" * 50_000, ""),
    ],
)
def test_what_is_text_stays_text(tmp_path: Path, name: str, content: str, note: str) -> None:
    (tmp_path / name).write_text(content)
    read = corpus(tmp_path / name)
    assert list(read) == [content]
    assert read.tally.read_as == {"text": 1}
    assert list(read.tally.notes) == ([f".json files were read as text ({note})"] if note else [])


def test_the_format_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert documents(tmp_path / "a.jsonl", fmt="text") == [LINES.decode()]
    (tmp_path / "b.dat").write_bytes(b"not json\n" + LINES)
    with pytest.raises(DataError, match=r"b\.dat:1: not JSON"):
        documents(tmp_path / "b.dat", fmt="jsonl")


def test_rows_without_the_field_are_never_trained_on_raw(tmp_path: Path) -> None:
    for content in ('{"body": "a"}\n{"body": "b"}\n', '[\n{"body": "a"}]'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(
            DataError, match=r"a\.json:\d: no field 'text' \(fields: body\); .*, or take files by --form"
        ):
            documents(tmp_path / "a.json")
        assert documents(tmp_path / "a.json", "body")[0] == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LIST[:-1], r":1: the file ends in the middle of its list; restore it"),
        (LIST[: len(LIST) // 2], r":1: not JSON \(.*\); correct or restore the file"),
        (PRETTY.encode()[:-200], r":\d\d+: not JSON"),
        (LIST + b"\n[]", r":2: more follows after the list; remove it"),
        (b'[{"text": "a"},\n{"text": b}]', r":2: not JSON \(.*\); correct or restore the file"),
        (b'[{"text": "a"},\n\n{"text": "\xff"}]', r":3: not UTF-8; convert the file or leave it out"),
        (b'{"text": "a"}\nnot json\n', r":2: not JSON \(.*\); correct or remove the line"),
    ],
)
def test_json_that_breaks_off_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json" + message):
        documents(tmp_path / "a.json")
    if "line" not in message:  # a bad line alone is for the policy on bad rows
        with pytest.raises(DataError, match=r"a\.json" + message):
            examples(tmp_path / "a.json")


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    """One of its values would be dropped without a word."""
    for content, line in (
        ('{"text": "a"}\n{"text": "b", "id": 1, "text": "c"}\n', 2),
        ('[{"text": "a"},\n\n{"text": "b", "text": "c"}]', 3),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(
            DataError, match=rf"a\.json:{line}: not JSON \(ValueError: the key 'text' comes twice\); corr"
        ):
            documents(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "meta": {"x": 1, "x": 2}}\n')
    assert examples(tmp_path / "a.jsonl") == ["not JSON (ValueError: the key 'x' comes twice)"]


def test_a_row_of_a_list_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n 5, "x", [{"text": "no"}],\n\n {"text": "b"}]')
    assert examples(tmp_path / "a.json") == ["a", *["not a JSON object"] * 3, "b"]
    with pytest.raises(DataError, match=r"a\.json:2: not a JSON object; every row must be an object"):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", list(PACK)[1:])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_a_damaged_compressed_file_names_itself(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    packed = PACK[suffix](LINES)
    for bad in (packed[:-2], packed[: len(packed) // 2], packed + b"garbage", packed + packed[:-3], b"", b"no frame"):
        path.write_bytes(bad)
        for read in (documents, examples):
            with pytest.raises(DataError, match=rf"{name}\{suffix} is damaged: .*; restore the file or leave it out"):
                read(path)
    path.write_bytes(packed * 2)
    assert both(path) == TEXTS * 2


def test_nested_fields(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "a"}}, {"meta": {"text": None}}, {"meta": None}, {"meta": {"text": "b", "x": 1}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"n": range(4), "meta": [row["meta"] for row in rows]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        read = corpus(tmp_path / name, "meta.text")
        assert list(read) == ["a", "b"]
        assert read.tally.left_out == {"blank documents": 2}
        (file,) = list_files([str(tmp_path / name)])
        config = ExamplesConfig(path=file.path, text_field="meta.text")
        assert [row.value("meta.text") for row in read_rows(file, config)] == ["a", None, None, "b"]
    for name, where in (("a.jsonl", r"a\.jsonl:1"), ("a.parquet", r"a\.parquet")):
        with pytest.raises(
            DataError, match=where + r": no field 'meta\.txt'; did you mean 'meta\.text'\? \(fields: .*met"
        ):
            documents(tmp_path / name, "meta.txt")
    # A name with a dot comes first.
    (tmp_path / "a.jsonl").write_text('{"meta.text": "dotted", "meta": {"text": "nested"}}\n')
    assert documents(tmp_path / "a.jsonl", "meta.text") == ["dotted"]
    pq.write_table(pa.table({"meta": [{"x": 1}], "meta.text": ["dotted"]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", "meta.text") == ["dotted"]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    (tmp_path / "d2.txt").write_bytes(b"a" * 100_000 + b"\0")
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n{"text": "b"}\n{"text": null}\n')
    (tmp_path / "f.jsonl").write_text("\n")
    (tmp_path / "g.csv").write_text("a,b\n")
    read = corpus(tmp_path)
    assert list(read) == ["a text", "b", "a,b\n"]
    assert read.tally.left_out == {
        "blank documents": 3,
        "files that are not UTF-8 text": 3,
        "files without any row": 1,
    }
    assert read.tally.read_as == {"text": 3, "JSON lines": 2}
    assert Counter(note.split(" files")[0] for note in read.tally.notes) == {".csv": 1}
    read = corpus(tmp_path, max_bytes=5)
    assert list(read) == ["a tex"]
    assert read.tally.left_out == {"files beyond max_bytes": 7}


def test_what_a_parquet_file_cannot_be(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for bad in (whole[:-10], whole[: len(whole) // 2], b"", whole + b"garbage"):
        (tmp_path / "a.parquet").write_bytes(bad)
        for read in (documents, examples):
            with pytest.raises(DataError, match=r"a\.parquet cannot be read \(.*\); restore the file or leave it out"):
                read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"a\.parquet\.gz: compressed Parquet files are not read; unpack it first"):
        documents(tmp_path / "a.parquet.gz")
    column = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet rows 1 to 2: field 'text' is not UTF-8; write the file again"):
        documents(tmp_path / "b.parquet")


def test_an_object_of_a_list_may_not_be_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_rows, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "' + "x" * (5 << 20))
    with pytest.raises(DataError, match=r"a\.json:1: the object has more than 1 MiB; is every row on a line"):
        documents(tmp_path / "a.json")


def test_a_row_about_the_file_comes_first(tmp_path: Path) -> None:
    """The format is that of the first row that tells it; the one before is a bad row, by its line and fields."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"version": 1}\n{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}\n')
    report = preview(ExamplesConfig(path=str(path), bad_rows="skip"), byte_level(), 64, 10).report
    assert (report.format, report.num_rows, report.num_bad) == ("prompt-completion", 3, 1)
    assert report.bad_rows[0].startswith(f"{path}:1: no field")
    assert report.bad_rows[0].count("(fields: version)") == 1
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field.*; correct the data, or leave bad rows out"):
        prepare_examples(ExamplesConfig(path=str(path)), byte_level(), 64, 1, str(tmp_path / "out"), 0)


def test_examples_behind_links_and_names_of_any_bytes(tmp_path: Path) -> None:
    """What the service tells of a file can travel as protobuf."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")
    (tmp_path / "blob").write_text(json.dumps([{"prompt": "a", "completion": "b"}, {"prompt": "a"}]))
    Path(path).symlink_to("blob")
    response = preview(ExamplesConfig(path=path), byte_level(), 64, 10)
    assert [example.origin for example in response.examples] == [f"{tmp_path}/caf\\xe9.json:1"]
    assert response.report.bad_rows[0].startswith(f"{tmp_path}/caf\\xe9.json:1: no field 'completion'")


def test_examples_say_what_was_left_out(tmp_path: Path) -> None:
    """Of a directory: hidden files, files without rows, blank texts."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "in" / "b.jsonl").write_text("\n")
    (tmp_path / "in" / ".c.jsonl").write_text('{"text": "c"}\n')
    report = preview(ExamplesConfig(path=str(tmp_path / "in")), byte_level(), 64, 10).report
    assert report.num_rows == 2
    assert list(report.notes) == ["1 files without any row left out", "1 hidden files and directories left out"]
