"""Errors in sources, options and disks: one line with cause and remedy, and no incomplete file stays."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstream.coordinator.data.prepare import PrepareProgress, inspect, load_manifest, prepare, verify
from gradstream.core.errors import ConfigError, DataError, GradstreamError
from gradstream.core.recipe.loading import validated
from gradstream.core.recipe.recipe import PrepareConfig


def options(*sources: Any, **more: Any) -> PrepareConfig:
    """Options for small data sets."""
    defaults = {"vocab_size": 300, "num_shards": 2, "validation_fraction": 0.25}
    return PrepareConfig(sources=[str(source) for source in sources], **{**defaults, **more})


def rows(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {number} of some text"}) + "\n" for number in range(count)))
    return path


def with_line(tmp_path: Path, line: bytes, after: int = 12) -> Path:
    path = rows(tmp_path / "rows.jsonl", after)
    path.write_bytes(path.read_bytes() + line + b"\n")
    return path


def tokenizer(tmp_path: Path, content: str) -> dict[str, Any]:
    path = tmp_path / "tok.json"
    path.write_text(content)
    return {"tokenizer": str(path)}


def without_config(tmp_path: Path) -> dict[str, Any]:
    """A tokenizer with nothing beside it."""
    prepare(options(rows(tmp_path / "t.jsonl")), str(tmp_path / "t"))
    return tokenizer(tmp_path, (tmp_path / "t" / "tokenizer.json").read_text())


def parquet(tmp_path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def binary(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    return tmp_path / "a.bin"


def broken(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).write_bytes(b"neither gzip nor Parquet")
    return tmp_path / name


CASES: dict[str, tuple[Callable[[Path], PrepareConfig], type[GradstreamError], str]] = {
    "no file": (lambda p: options(p / "no*"), ConfigError, r"source '.*no\*' matches no file; correct the path"),
    "no protocol": (lambda p: options("nope://x"), ConfigError, r"nope://x: this kind of path cannot be opened"),
    "only binary": (
        lambda p: options(binary(p)),
        DataError,
        r"hold no text \(files that are not UTF-8 text: 1\); name files",
    ),
    "blank": (
        lambda p: options(with_line(p, b'{"text": " "}', 0)),
        DataError,
        r"the sources hold no text \(blank documents: 1\); name",
    ),
    "not JSON": (lambda p: options(with_line(p, b"{nope")), DataError, r"rows\.jsonl:13: not JSON \(.*\); correct or"),
    "not an object": (lambda p: options(with_line(p, b"[1]")), DataError, r"rows\.jsonl:13: not a JSON object"),
    "not UTF-8": (lambda p: options(with_line(p, b'{"text": "\xff"}')), DataError, r"rows\.jsonl:13: not UTF-8"),
    "too deep": (lambda p: options(with_line(p, b"[" * 200_000)), DataError, r"rows\.jsonl:13: not JSON"),
    "no field": (
        lambda p: options(with_line(p, b'{"txt": "a"}')),
        DataError,
        r"rows\.jsonl:13: no field 'text'; did you mean 'txt'\? \(fields: txt\); name the one .* --text-field",
    ),
    "not text": (lambda p: options(with_line(p, b'{"text": 5}')), DataError, r":13: field 'text' holds int, not text"),
    "no column": (lambda p: options(parquet(p, body=["a"])), DataError, r"rows\.parquet: no field 'text' \(fields: bo"),
    "numbers": (lambda p: options(parquet(p, text=[1, 2])), DataError, r"rows\.parquet row 1: field 'text' holds int"),
    "no Parquet": (lambda p: options(broken(p, "a.parquet")), DataError, r"a\.parquet cannot be read \(.*\); restore"),
    "no gzip": (
        lambda p: options(broken(p, "a.txt.gz")),
        DataError,
        r"a\.txt\.gz is damaged: no gzip data: .*; restore",
    ),
    "small vocabulary": (
        lambda p: options(rows(p / "rows.jsonl"), vocab_size=256),
        ConfigError,
        r"vocab_size 256 is too small; a byte-level vocabulary has at least 257",
    ),
    "no tokenizer": (
        lambda p: options(rows(p / "rows.jsonl"), tokenizer=str(p / "none.json")),
        ConfigError,
        r"tokenizer .*none\.json cannot be read",
    ),
    "bad tokenizer": (
        lambda p: options(rows(p / "rows.jsonl"), **tokenizer(p, "{}")),
        ConfigError,
        r"tok\.json is not a tokenizer\.json \(.*\); save the tokenizer again",
    ),
    "no end of text": (
        lambda p: options(rows(p / "rows.jsonl"), **without_config(p)),
        ConfigError,
        r"nothing beside .*tok\.json says which token ends a text .*; set data\.prepare\.end_of_text or --end-of-text",
    ),
}


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_stays(tmp_path: Path, case: str, place: str) -> None:
    make, kind, message = CASES[case]
    config = make(tmp_path)
    out = str(tmp_path / "new" / "set") if place == "local" else f"memory://errors-{abs(hash(case))}/set"
    with pytest.raises(kind, match=message) as caught:
        prepare(config, out)
    assert "\n" not in str(caught.value)
    if place == "local":
        assert not (tmp_path / "new").exists() or os.listdir(tmp_path / "new") == []
    else:
        assert not fsspec.filesystem("memory").find(out)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_interrupt_leaves_nothing(tmp_path: Path, num_processes: int) -> None:
    """Ctrl-C while tokenizing, also with processes at work."""

    def interrupt(state: PrepareProgress) -> None:
        if state.phase == "tokenize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            options(rows(tmp_path / "rows.jsonl", 5000)),  # several batches: some are in flight
            str(tmp_path / "new" / "set"),
            interrupt,
            num_processes=num_processes,
        )
    assert os.listdir(tmp_path / "new") == []


def test_a_data_set_is_not_overwritten_and_survives_a_failed_force(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    manifest = prepare(options(rows(tmp_path / "rows.jsonl")), out)
    with pytest.raises(ConfigError, match=r"already holds a data set; choose another path or replace it with --force"):
        prepare(options(tmp_path / "rows.jsonl"), out)
    with pytest.raises(ConfigError, match="too small"):
        prepare(options(tmp_path / "rows.jsonl", vocab_size=256), out, force=True)
    assert verify(out) == manifest


def test_what_is_not_a_data_set_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not a data set; choose another path or remove it"):
        prepare(options(rows(tmp_path / "rows.jsonl")), str(tmp_path / "mine"), force=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    # A file where a directory must be: wrong for root too, whom rights do not stop.
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write the data set to .*file/set \(.*\); choose a path that can be"):
        prepare(options(rows(tmp_path / "rows.jsonl")), str(tmp_path / "file" / "set"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    from gradstream.core.data.output import HashingFile, Output

    with (
        pytest.raises(DataError, match=r"No space left on device.*; free some space or choose another path"),
        Output(str(tmp_path / "set")) as output,
        output.explained(),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        HashingFile(full, sync=True).write(b"x")
    assert os.listdir(tmp_path) == []


def test_inspecting_what_is_missing_or_corrupt(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError, match=r"holds no data set \(no manifest.json\); make it with `gradstream data prep"):
        inspect(str(out))
    manifest = prepare(options(rows(tmp_path / "rows.jsonl")), str(out))
    for name in ("tokenizer.json", *(shard.file for shard in manifest.shards), manifest.shards[0].index_file):
        good = (out / name).read_bytes()
        for bad in (bytes([good[0] ^ 1]) + good[1:], good[:-1], good + b"x", None):
            if bad is None:
                (out / name).unlink()
            else:
                (out / name).write_bytes(bad)
            with pytest.raises(DataError, match=re.escape(name) + r" (is corrupt|cannot be read).*; prepare the data"):
                verify(str(out))
        (out / name).write_bytes(good)
    assert verify(str(out)) == manifest
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json is not a valid data manifest"):
        load_manifest(str(out))


def test_an_empty_source_is_not_the_current_directory() -> None:
    with pytest.raises(ConfigError, match=r"sources"):
        validated(PrepareConfig, {"sources": [""]}, "recipe")
