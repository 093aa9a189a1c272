"""Uploaded files of examples and documents, conversations and chat templates."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from fuzz.atheris_targets import ROWS, base_directory
from hypothesis import example, given
from hypothesis import strategies as st
from support.fuzzing import ODD_TEXTS, ODD_VALUES, allocating_at_most, fuzzed, mutated_tree, taken

from gradstream.coordinator.data.sources import NotTextError, read_documents
from gradstream.core.data.sources import list_files
from gradstream.core.errors import ConfigError, DataError, GradstreamError, ProtocolError
from gradstream.core.pretrained.base import find_base, load_tokenizer
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.services.fine_tuning.examples import reading
from gradstream.services.fine_tuning.examples.chat import chat_prompt_ids, chat_template, render_conversation
from gradstream.services.fine_tuning.examples.conversations import conversation
from gradstream.services.fine_tuning.examples.dataset import preview
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.examples.preparation import Upload
from gradstream.services.fine_tuning.examples.reading import BadRowError, read_rows
from gradstream.services.fine_tuning.store import Store

MIB = 1 << 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find_base(str(base_directory()))[0])


def shown(path: Path, tokenizer: Any, **config: Any) -> Any:
    """What the service shows of a file before it is trained on."""
    return taken(lambda: preview(ExamplesConfig(path=str(path), **config), tokenizer, 16, 5), DataError, ConfigError)


# -- rows --------------------------------------------------------------------------------------------------------------

TREES = [json.loads(line) for text in ROWS for line in text.decode("utf-8-sig").splitlines() if line]


@fuzzed(0.5)
@given(data=st.data(), bad_rows=st.sampled_from(["fail", "skip"]), format=st.sampled_from(["auto", "chat", "text"]))
def test_rows_are_taken_or_refused(tmp_path: Path, tokenizer: Any, data: Any, bad_rows: str, format: str) -> None:
    rows = [data.draw(st.sampled_from(TREES).flatmap(mutated_tree)) for _ in range(data.draw(st.integers(1, 4)))]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = shown(path, tokenizer, bad_rows=bad_rows, format=format)
    if found is not None:
        assert found.report.num_rows <= len(rows)
        assert all(line.isprintable() for line in found.report.bad_rows)


COLUMNS: list[Any] = [
    arrow.array(["a", None]),
    arrow.array([1, 2]),
    arrow.array([b"\xff", b"x"]),
    arrow.array([[{"role": "user", "content": "x"}], None]),
    arrow.array([{"a": 1}, {"a": 2}]),
    arrow.array([1.5, float("nan")]),
    arrow.nulls(2),
    arrow.array(["a", "a"]).dictionary_encode(),
    arrow.array([10**18, 0], arrow.timestamp("ns")),
    arrow.array([2**62, -1], arrow.date64()),
    arrow.array([2**62, 1], arrow.timestamp("us", tz="UTC")),
    arrow.array([2**62, 1], arrow.duration("s")),
    arrow.array([2**62, 1], arrow.time64("ns")),
]


@fuzzed(0.5)
@given(st.lists(st.tuples(st.sampled_from(["prompt", "completion", "messages", "text", "x\n"]), st.integers(0, 12))))
def test_parquet_of_any_types_is_taken_or_refused(tmp_path: Path, columns: list[tuple[str, int]]) -> None:
    names = dict(columns)
    sink = io.BytesIO()
    try:
        parquet.write_table(arrow.table([COLUMNS[number] for number in names.values()], list(names)), sink)
    except arrow.ArrowException:
        return
    (tmp_path / "rows.parquet").write_bytes(sink.getvalue())
    (file,) = list_files([str(tmp_path / "rows.parquet")])
    taken(lambda: list(read_rows(file, ExamplesConfig(path=file.path))), DataError, ConfigError)
    taken(lambda: list(read_documents(file, "text")), DataError)


# -- files that unpack to much more than they are ----------------------------------------------------------------------


def packed(num_bytes: int, begin: bytes = b"", end: bytes = b"") -> bytes:
    """Zeros in a gzip file a thousandth as large."""
    sink = io.BytesIO()
    with gzip.open(sink, "wb", compresslevel=1) as stream:
        stream.write(begin)
        for _ in range(num_bytes >> 20):
            stream.write(b"a" * MIB)
        stream.write(end)
    return sink.getvalue()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the real ones, a thousandth."""
    monkeypatch.setattr("gradstream.core.data.rows.MAX_LINE_BYTES", MIB)
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 4 * MIB)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.txt.gz"])
def test_a_line_or_text_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(packed(64 * MIB, b'{"text": "', b'"}'))
    (file,) = list_files([str(tmp_path / name)])
    with allocating_at_most(16 * MIB):
        rows = taken(lambda: list(read_rows(file, ExamplesConfig(path=file.path))), DataError)
        assert rows is None or [row.reason for row in rows if not row.reason] == []


@pytest.mark.usefixtures("small_limits")
def test_rows_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    row = json.dumps({"text": "a" * 10_000}).encode() + b"\n"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(row * 2000, 1))
    (file,) = list_files([str(tmp_path / "rows.jsonl.gz")])
    count = 0

    def read() -> None:
        nonlocal count
        for _ in read_rows(file, ExamplesConfig(path=file.path)):
            count += 1

    assert taken(read, DataError) is None
    assert 0 < count < 500


@pytest.mark.usefixtures("small_limits")
def test_a_long_line_among_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(packed(64 * MIB, b'{"text": "', b'"}'))
    (file,) = list_files([str(tmp_path / "rows.jsonl.gz")])
    with allocating_at_most(16 * MIB):
        assert taken(lambda: list(read_documents(file, "text")), DataError) is None


@fuzzed(0.5)
@given(st.binary(max_size=200), st.sampled_from([".gz", ".bz2", ".xz", ".zst", ""]), st.integers(0, 60))
@example(gzip.compress(b"abc")[:-5], ".gz", 50)
def test_compressed_files_are_taken_or_refused(tmp_path: Path, content: bytes, suffix: str, limit: int) -> None:
    for kind in ("jsonl", "txt"):
        path = tmp_path / f"rows.{kind}{suffix}"
        path.write_bytes(content)
        (file,) = list_files([str(path)])
        taken(lambda file=file: list(read_rows(file, ExamplesConfig(path=file.path))), DataError)
        try:
            taken(lambda file=file: list(read_documents(file, "text", limit)), DataError)
        except NotTextError:
            pass


WHOLE_JSON = [
    b'[{"text": "a"}, {"text": "b", "n": [1, 2]}]',
    b'[\n {"prompt": "a",\n  "completion": "b"}\n]\n',
    b'{"text": "a"}\n{"text": "b"}\n',
    b'{"text":\n "a"}{"text": "\\ud800"}',
    b'\xef\xbb\xbf{"text": "a"}',
]


@fuzzed(0.5)
@given(st.data(), st.sampled_from([".json", ".txt", "", ".json.gz"]))
def test_json_that_was_changed_is_taken_or_refused(tmp_path: Path, data: Any, suffix: str) -> None:
    content = data.draw(st.sampled_from(WHOLE_JSON))
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(len(content), begin + 3)))
    content = content[:begin] + data.draw(st.binary(max_size=3)) + content[end:]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    (file,) = list_files([str(path)])
    for text in taken(lambda: list(read_rows(file, ExamplesConfig(path=file.path))), DataError) or []:
        assert text.reason or text.values
    try:
        for document in taken(lambda: list(read_documents(file, "text")), DataError) or []:
            document.encode()
    except NotTextError:
        pass


# -- conversations -----------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TEMPLATES = st.one_of(
    ODD_TEXTS,
    st.sampled_from(
        [
            "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "{{ messages[0].content.__class__.__mro__ }}",
            "{{ ''.__class__.__subclasses__() }}",
            "{{ raise_exception('no') }}",
            "{{ messages | tojson }}",
            "{{ messages.append(1) }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
            "{{ self._TemplateReference__context }}",
            "{{ (1).__pow__(2) }}",
            "{{ 1 / 0 }}",
            "{{ undefined.field }}",
            "{% for i in range(10**6) %}x{% endfor %}",
            "{{ strftime_now('%Y') }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ '\\ud800' }}",
        ]
    ),
)


@fuzzed()
@given(mutated_tree(MESSAGES) | ODD_VALUES)
def test_messages_are_taken_or_refused(value: Any) -> None:
    try:
        found = conversation(value, value)
    except BadRowError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert found.messages[found.last_trained]["role"] == "assistant"


@fuzzed()
@given(messages=mutated_tree(MESSAGES), template=TEMPLATES)
def test_chat_templates_are_programs_that_may_only_refuse(tokenizer: Any, messages: Any, template: str) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        if taken(lambda: chat_template(tokenizer), ConfigError) is None:
            return
        encoder = Encoder(tokenizer)
        checked = conversation(messages)
        text = encoder.decode(render_conversation(checked, tokenizer, encoder).ids)
        assert "root:" not in text
        taken(lambda: chat_prompt_ids(checked.messages[:-1], tokenizer, encoder), ConfigError)
    except BadRowError:
        pass
    finally:
        tokenizer.chat_template = before


# -- uploads -----------------------------------------------------------------------------------------------------------


@fuzzed(0.5)
@given(st.one_of(ODD_TEXTS, st.sampled_from(["a.jsonl", "a\n", ".", "..", "a/b", "-x", "a" * 129, "a.jsonl\x00"])))
def test_names_of_uploads_stay_below_their_directory(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    try:
        upload = taken(lambda: Upload(store, name), ProtocolError)
        if upload is None:
            assert not list(store.temporary.iterdir())
            return
        upload.write(b"rows")
        path, _ = upload.finish()
        upload.discard()
        assert Path(path).parent == store.uploads
        assert Path(path).name.isprintable()
    except GradstreamError as error:
        raise AssertionError(error) from None
    finally:
        store.close()
