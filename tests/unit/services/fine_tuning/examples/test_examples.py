"""Examples: their targets, bad rows and their reasons, the split, and the data set that is made."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from support.tokenizers import CHATML, END_OF_TURN, MARKED, byte_level, sentencepiece_like
from tokenizers import Tokenizer

from gradstream.coordinator.data.prepare import verify
from gradstream.core.data.manifest import NO_TARGET, Manifest, parse_manifest
from gradstream.core.data.sampler import SlotSampler
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.proto.v1 import fine_tuning_pb2
from gradstream.services.fine_tuning.examples import dataset
from gradstream.services.fine_tuning.examples.dataset import (
    Prepared,
    chat_prompt_ids,
    held_out_keys,
    load_prepared,
    prepare_examples,
    preview,
    render_chat,
)
from gradstream.services.fine_tuning.examples.encoding import Encoder

ROW_LENGTH = 64
PAIRS = [{"prompt": f"Q: {n}+1?\nA:", "completion": f" {n + 1}"} for n in range(40)]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "no"},
]


def write(path: Path, rows: list[Any]) -> Path:
    """Rows as JSONL; a text or bytes as the line it is."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def config(path: Path, **settings: Any) -> ExamplesConfig:
    return ExamplesConfig(path=str(path), **settings)


def look(path: Path, tokenizer: Any = None, num: int = 10, row_length: int = ROW_LENGTH, **settings: Any) -> Any:
    return preview(config(path, **settings), tokenizer or byte_level(), row_length, num)


def pieces(example: fine_tuning_pb2.RenderedExample) -> list[tuple[str, bool]]:
    return [(piece.text, piece.is_target) for piece in example.pieces]


def prepare(path: Path, out: Path, tokenizer: Any = None, **settings: Any) -> Prepared:
    row_length, num_shards = settings.pop("row_length", ROW_LENGTH), settings.pop("num_shards", 2)
    seed = settings.pop("seed", 0)
    return prepare_examples(config(path, **settings), tokenizer or byte_level(), row_length, num_shards, str(out), seed)


def segments(out: Path, manifest: Manifest, split: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, targets) of every example in the data shards of a split, read as the layout says."""
    found = []
    for shard in manifest.split(split):
        data = np.fromfile(out / shard.file, "<u4").reshape(-1, 3, manifest.row_length)
        index = np.fromfile(out / shard.index_file, "<u8").tolist()
        assert index[-1] == shard.num_tokens == len(data) * manifest.row_length
        begins = []
        for number, (inputs, targets, numbers) in enumerate(data):
            assert (targets != NO_TARGET).any()
            assert ((numbers == 0) <= ((targets == NO_TARGET) & (inputs == manifest.end_of_text_id))).all()
            assert set(numbers.tolist()) - {0} == set(range(1, int(numbers.max()) + 1))
            for one in range(1, int(numbers.max()) + 1):
                (places,) = np.nonzero(numbers == one)
                assert places.tolist() == list(range(places[0], places[-1] + 1))
                begins.append(number * manifest.row_length + int(places[0]))
                found.append((tuple(inputs[places].tolist()), tuple(targets[places].tolist())))
        assert index[:-1] == begins
        assert shard.num_documents == len(begins)
    return found


# Rendering


def test_a_completion_and_its_end_are_the_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "What is the capital?", "completion": " Paris"}])
    (example,) = look(path).examples
    assert pieces(example) == [("What is the capital?", False), (" Paris<|endoftext|>", True)]
    encoder = Encoder(byte_level())
    assert example.num_tokens == len(encoder.ids("What is the capital?")) + example.num_targets
    assert example.num_targets == len(encoder.ids(" Paris")) + 1
    assert example.origin == f"{path}:1"


def test_no_token_spans_the_boundary(tmp_path: Path) -> None:
    """Read as one text, the two halves of a word would be one token."""
    encoder = Encoder(byte_level())
    assert len(encoder.ids("capital")) < len(encoder.ids("capi")) + len(encoder.ids("tal"))
    path = write(tmp_path / "a.jsonl", [{"prompt": "capi", "completion": "tal"}])
    assert pieces(look(path).examples[0]) == [("capi", False), ("tal<|endoftext|>", True)]


def test_an_end_that_is_written_out_is_not_doubled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b<|endoftext|>"}])
    assert pieces(look(path).examples[0]) == [("a", False), ("b<|endoftext|>", True)]


def test_bos_comes_first_and_no_blank_between(tmp_path: Path) -> None:
    """As Llama 2: bos by default, and a blank before every text that is encoded by itself."""
    rows = [{"prompt": "the Q", "completion": completion} for completion in ("A", " A", "\nA", "▁▁é")]
    found = [pieces(example) for example in look(write(tmp_path / "a.jsonl", rows), sentencepiece_like()).examples]
    # That the blank comes off was the tokenizer's own: a literal ▁ is a blank to it.
    assert [found[0], found[1], found[2]] == [
        [("<s> the Q", False), (row["completion"] + "</s>", True)] for row in rows[:3]
    ]
    assert found[3][1] == ("  é</s>", True)


def test_an_empty_prompt_needs_a_bos(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "", "completion": "A"}])
    assert look(path).report.bad_rows == [
        f"{path}:1: the prompt is empty, so nothing comes before the completion; use data.format text"
    ]
    # The decoder takes the first blank off: bos has none.
    assert [mark for _, mark in pieces(look(path, sentencepiece_like()).examples[0])] == [False, True]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", END_OF_TURN])
def test_replies_are_the_targets(tmp_path: Path, template: str, end_of_text: str) -> None:
    tokenizer = byte_level(template, end_of_text)
    conversation = [*CHAT, {"role": "user", "content": "unanswered"}]
    path = write(tmp_path / "a.jsonl", [{"messages": conversation}])
    response = look(path, tokenizer, row_length=200)
    assert response.report.format == "chat"
    (example,) = response.examples
    found = pieces(example)
    # The turn's end is learnt, whatever the tokenizer names as end of text; what follows is there and no target.
    assert [text for text, is_target in found if is_target] == ["hello<|im_end|>", "no<|im_end|>"]
    assert "".join(text for text, _ in found) == render_chat(conversation, tokenizer, False)
    assert found[0][0] == render_chat(CHAT[:2], tokenizer, True)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_reply_is_generated_from_what_it_was_trained_after(tmp_path: Path, template: str) -> None:
    tokenizer = byte_level(template)
    rows = [{"messages": [*CHAT[:-1], {"role": "assistant", "content": f"no {n}"}]} for n in range(8)]
    prepared = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer, row_length=200)
    assert prepared.prompts
    for prompt in prepared.prompts:
        assert list(prompt.ids) == chat_prompt_ids(CHAT[:-1], tokenizer)
        assert prompt.text == render_chat(CHAT[:-1], tokenizer, True)
        assert re.fullmatch(r"no \d", prompt.expected.strip())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_a_conversation_where_a_blank_comes_before_every_text(tmp_path: Path) -> None:
    """As Mistral's: bos from the template and once, replies that begin with a blank, and no prompt for one."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT[1:]}])
    (example,) = look(path, sentencepiece_like(template)).examples
    assert pieces(example) == [
        ("<s> [INST] hi [/INST]", False),
        (" hello</s>", True),
        # The tokenizer's own blank after every special token, as transformers has it.
        (" [INST] bye [/INST]", False),
        (" no</s>", True),
    ]


def test_a_template_that_rewrites_what_came_before(tmp_path: Path) -> None:
    """As those that leave earlier thoughts out. One reply can be told from the rest, two cannot."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' and loop.last %}{{ 'thought ' }}"
        "{% endif %}{{ m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT[:3]}, {"messages": CHAT}])
    response = look(path, tokenizer)
    assert pieces(response.examples[0])[-1] == ("thought hello;<|endoftext|>", True)
    assert len(response.examples) == 1
    assert re.search(r":2: .* up to message 3 differently .* \{% generation %\}", response.report.bad_rows[0])
    # Such a conversation can still be generated from.
    assert Encoder(tokenizer).decode(chat_prompt_ids(CHAT[:-1], tokenizer)).endswith("bye;assistant:")


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = byte_level("{{ raise_exception('roles must\\nalternate') }}")
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (reason,) = look(path, tokenizer).report.bad_rows
    assert reason.endswith("the chat template refuses the conversation (TemplateError: roles must alternate)")
    with pytest.raises(ConfigError, match=r"roles must alternate.*; change the messages"):
        render_chat(CHAT, tokenizer, True)


def test_no_chat_template_or_a_broken_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ConfigError, match=r"no chat template.*put a chat_template.jinja beside.*or write the rows as"):
        look(path)
    with pytest.raises(ConfigError, match="chat template is not valid"):
        look(path, byte_level("{% for %}"))


def test_text_is_all_target_and_never_lost(tmp_path: Path) -> None:
    text = "".join(f"line {n} of the text\n" for n in range(60))
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + text, encoding="utf-8")
    encoder = Encoder(byte_level())
    ids = [*encoder.ids(text), encoder.end_of_text_id]
    assert len(ids) > 5 * ROW_LENGTH
    prepared = prepare(path, tmp_path / "out")
    assert prepared.report.format == "text"
    assert prepared.prompts == ()
    found = [one for split in ("train", "validation") for one in segments(tmp_path / "out", prepared.manifest, split)]
    parts = [ids[begin : begin + ROW_LENGTH + 1] for begin in range(0, len(ids) - 1, ROW_LENGTH)]
    assert sorted(found) == sorted((tuple(part[:-1]), tuple(part[1:])) for part in parts)
    first = look(path, num=1).examples[0]
    assert [mark for _, mark in pieces(first)] == [False, True]
    assert (first.num_tokens, first.num_targets) == (ROW_LENGTH + 1, ROW_LENGTH)


# Reading


def test_parquet_jsonl_and_gzip_say_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", [PAIRS[0], "", PAIRS[1]])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    parquet.write_table(pa.table({name: [row[name] for row in PAIRS[:2]] for name in PAIRS[0]}), tmp_path / "c.parquet")
    shown = {name: look(tmp_path / name).examples for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")}
    assert len({str([pieces(example) for example in examples]) for examples in shown.values()}) == 1
    lines = {name: [example.origin for example in examples] for name, examples in shown.items()}
    assert lines["a.jsonl"] == [f"{plain}:1", f"{plain}:3"]
    assert lines["c.parquet"] == [f"{tmp_path / 'c.parquet'}:1", f"{tmp_path / 'c.parquet'}:2"]


def test_messages_of_a_parquet_file(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"messages": [CHAT], "big": [b"x"]}), tmp_path / "a.parquet")
    response = look(tmp_path / "a.parquet", byte_level(CHATML), row_length=200)
    assert response.report.format == "chat"
    assert "hello" in pieces(response.examples[0])[1][0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "messages": CHAT, "text": "c"}, "prompt-completion"),
        ({"prompt": "a", "messages": CHAT, "text": "c"}, "chat"),
        ({"prompt": "a", "text": "c"}, "text"),
    ],
)
def test_the_first_rows_fields_tell_the_format(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "a.jsonl", ["not json", row])
    assert look(path, byte_level(CHATML)).report.format == expected


def test_fields_that_tell_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ConfigError, match=r"a.jsonl:1: no fields 'prompt' .* \(fields: question, answer\); name those"):
        look(path)
    shown = look(path, prompt_field="question", completion_field="answer").examples
    assert pieces(shown[0]) == [("a", False), ("b<|endoftext|>", True)]


def test_files_that_are_not_what_they_are_taken_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(
        ConfigError, match=r"a.json: it holds neither JSON objects nor a list of them; write one object"
    ):
        look(tmp_path / "a.json")
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ConfigError, match=r"a.md is plain text, which has no rows of data.format chat"):
        look(tmp_path / "a.md", format="chat")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a.parquet cannot be read \(.*\); restore the file"):
        look(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="matches no file"):
        look(tmp_path / "missing.jsonl")


# Bad rows and long ones

BAD: list[tuple[Any, str]] = [
    ("{", "not JSON (JSONDecodeError: "),
    ("[1]", "not a JSON object"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    ({"promt": "a", "completion": "b"}, "no field 'prompt'; did you mean 'promt'? (fields: promt, completion)"),
    ({"prompt": "a"}, "no field 'completion' (fields: prompt)"),
    ({"prompt": 3, "completion": "b"}, "field 'prompt' holds a number, not text"),
    ({"prompt": "a", "completion": None}, "field 'completion' holds null, not text"),
    ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
    (
        {"prompt": "\ud800", "completion": "b"},
        "field 'prompt' holds half of a surrogate pair, which is not a character",
    ),
]
BAD_CHATS: list[tuple[Any, str]] = [
    ("hello", "the messages are text, not a list"),
    (["hello"], "message 1 is text, not an object with role and content"),
    ([{"role": "user"}], "message 1 has no 'content'"),
    ([{"content": "a"}], "message 1 has no 'role'"),
    ([{"role": "user", "content": ["a"]}], "message 1: its content is a list, not text"),
    ([CHAT[1], {"role": "bot", "content": "a"}], "no assistant message, so there is nothing to learn (roles: bot, us"),
    ([CHAT[1], {"role": "bot", "content": "a"}, CHAT[2]], "message 2 has the unknown role 'bot'; roles are system, u"),
    ([CHAT[1], {"role": "assistant", "content": " "}], "message 2, a reply, is empty"),
    ([CHAT[1]], "no assistant message, so there is nothing to learn"),
    ([], "no assistant message, so there is nothing to learn"),
    ([CHAT[2]], "the chat template puts nothing before the first reply"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_a_bad_row_says_why(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", [*PAIRS, row])
    with pytest.raises(DataError, match=re.escape(f"{path}:41: {reason}") + ".*; correct the data, or leave bad rows"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepare(path, tmp_path / "out", bad_rows="skip").report
    assert (report.num_rows, report.num_bad, report.num_train + report.num_validation) == (41, 1, 40)
    assert report.bad_rows[0].startswith(f"{path}:41: {reason}")
    assert "\n" not in report.bad_rows[0]


@pytest.mark.parametrize(
    ("messages", "reason"), BAD_CHATS, ids=[f"{i}-{bad[1][:24]}" for i, bad in enumerate(BAD_CHATS)]
)
def test_a_bad_conversation_says_why(tmp_path: Path, messages: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    template = "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}"
    (found,) = look(path, byte_level(template)).report.bad_rows
    assert found.startswith(f"{path}:1: {reason}")


def test_text_that_is_blank_or_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a text"}, {"text": "  "}])
    assert look(path).report.bad_rows == [f"{path}:2: the text is empty"]
    (tmp_path / "b.txt").write_bytes(b"fine\nb\xffd\n")
    assert look(tmp_path / "b.txt").report.bad_rows == [f"{tmp_path / 'b.txt'}:2: not UTF-8"]


def test_bad_rows_are_all_counted_and_the_first_ones_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*PAIRS, *["x"] * 25])
    with pytest.raises(DataError, match=r":41: not JSON .* \(and 24 more bad rows\); correct"):
        prepare(path, tmp_path / "out")
    report = look(path).report  # a look reports what a job would fail for
    assert (report.num_bad, len(report.bad_rows)) == (25, 20)
    path = write(tmp_path / "a.jsonl", ["x"] * 3)
    with pytest.raises(
        DataError, match=r"no example that can be used \(3 of 3 rows are bad, .*the first: .*:1: not JS"
    ):
        prepare(path, tmp_path / "out", bad_rows="skip")


def test_an_example_that_is_too_long(tmp_path: Path) -> None:
    encoder = Encoder(byte_level())
    long = {"prompt": "a", "completion": "!?" * ROW_LENGTH}
    hopeless = {"prompt": "!?" * ROW_LENGTH, "completion": "b"}
    path = write(tmp_path / "a.jsonl", [*PAIRS, long, hopeless])
    num = len(encoder.ids(long["completion"])) + 1
    message = rf":41: the example takes {num} tokens of a row, training.sequence_length is 64 \(and 1 more example\), "
    with pytest.raises(
        DataError, match=message + r"the longest .*; raise training.sequence_length, or set .* skip or t"
    ):
        prepare(path, tmp_path / "out")
    report = prepare(path, tmp_path / "skip", too_long="skip").report
    assert (report.num_too_long, report.num_truncated, report.num_train + report.num_validation) == (2, 0, 40)
    # Cut at its end; the one of which no target is left is left out.
    prepared = prepare(path, tmp_path / "cut", too_long="truncate")
    report = prepared.report
    assert (report.num_too_long, report.num_truncated, report.num_train + report.num_validation) == (1, 1, 41)
    found = [one for split in ("train", "validation") for one in segments(tmp_path / "cut", prepared.manifest, split)]
    whole = encoder.ids("a") + encoder.ids(long["completion"])
    assert (tuple(whole[:ROW_LENGTH]), tuple(whole[1 : ROW_LENGTH + 1])) in found
    assert all(prompt.expected != long["completion"] for prompt in prepared.prompts)


def test_an_example_may_fill_its_row(tmp_path: Path) -> None:
    """n ids take n - 1 places: 65 ids fit a row of 64, 66 do not."""
    encoder = Encoder(byte_level())
    completion = "!?" * 40
    num_places = len(encoder.ids("a") + encoder.ids(completion))
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": completion}])
    assert preview(config(path), byte_level(), num_places, 1).report.num_too_long == 0
    assert preview(config(path), byte_level(), num_places - 1, 1).report.num_too_long == 1


# The split


def sides(prepared: Prepared, out: Path) -> dict[str, set[tuple[int, ...]]]:
    return {split: {one[0] for one in segments(out, prepared.manifest, split)} for split in ("train", "validation")}


def test_a_rows_side_depends_on_its_content_alone(tmp_path: Path) -> None:
    """Not on its place, on what else there is, on the seed or on copies of it."""
    first = prepare(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "1", validation_fraction=0.3)
    shuffled = [*reversed(PAIRS), *PAIRS[:20], *({"prompt": f"more {n}", "completion": "x"} for n in range(9))]
    second = prepare(write(tmp_path / "b.jsonl", shuffled), tmp_path / "2", validation_fraction=0.3, seed=5)
    before, after = sides(first, tmp_path / "1"), sides(second, tmp_path / "2")
    assert len(before["train"]) + len(before["validation"]) == 40
    assert 4 <= len(before["validation"]) <= 20
    assert before["train"] < after["train"]
    assert before["validation"] < after["validation"]
    assert not after["train"] & after["validation"]


def test_a_validation_file_is_held_out_whole(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", PAIRS[:30]), write(tmp_path / "b.jsonl", PAIRS[30:])
    prepared = prepare(train, tmp_path / "out", validation_path=str(held_out))
    assert (prepared.report.num_train, prepared.report.num_validation) == (30, 10)
    assert {prompt.text for prompt in prepared.prompts} == {row["prompt"] for row in PAIRS[30:]}
    assert list(prepared.report.sha256) == [hashlib.sha256(p.read_bytes()).hexdigest() for p in (train, held_out)]
    assert prepared.manifest.sources == (str(train), str(held_out))


def test_few_rows_still_give_every_slot_one(tmp_path: Path) -> None:
    """A share of 1 % of 8 rows is none; every slot needs one of both splits."""
    prepared = prepare(write(tmp_path / "a.jsonl", PAIRS[:8]), tmp_path / "out", num_shards=4, validation_fraction=0.01)
    assert (prepared.report.num_train, prepared.report.num_validation) == (4, 4)
    for split in ("train", "validation"):
        for slot in range(4):
            assert SlotSampler(prepared.manifest, split, slot, 4, ROW_LENGTH, 0).num_samples == 1
    with pytest.raises(
        DataError, match=r"examples to train on and .* held out are too few for 4 slots.*lower training"
    ):
        prepare(write(tmp_path / "a.jsonl", PAIRS[:7]), tmp_path / "few", num_shards=4, validation_fraction=0.01)
    with pytest.raises(DataError, match="has no rows; give a file with examples"):
        prepare(write(tmp_path / "a.jsonl", []), tmp_path / "few")
    assert not (tmp_path / "few").exists()


def test_the_line_of_the_split() -> None:
    keys = [hashlib.sha256(bytes([n, m])).digest() for n in range(20) for m in range(100)]
    assert 0.08 < len(held_out_keys(keys, 0.1, 1)) / len(keys) < 0.12
    assert held_out_keys(keys, 0.1, 1) < held_out_keys(keys, 0.2, 1)
    assert held_out_keys(keys[:1000], 0.1, 1) == held_out_keys(keys, 0.1, 1) & set(keys[:1000])
    assert len(held_out_keys(keys[:10], 0.999, 4)) == 6


# The data set


@pytest.mark.parametrize("packing", [True, False])
def test_the_data_set_holds_every_example_once(tmp_path: Path, packing: bool) -> None:
    tokenizer = byte_level()
    encoder = Encoder(tokenizer)
    out = tmp_path / "out"
    prepared = prepare(write(tmp_path / "a.jsonl", PAIRS), out, tokenizer, packing=packing)
    expected = []
    for row in PAIRS:
        prompt, completion = encoder.ids(row["prompt"]), [*encoder.ids(row["completion"]), encoder.end_of_text_id]
        expected.append((tuple((prompt + completion)[:-1]), (*[NO_TARGET] * (len(prompt) - 1), *completion)))
    splits = {split: segments(out, prepared.manifest, split) for split in ("train", "validation")}
    assert sorted(splits["train"] + splits["validation"]) == sorted(expected)
    report, manifest = prepared.report, prepared.manifest
    assert (report.num_train, report.num_validation) == (len(splits["train"]), len(splits["validation"]))
    assert report.num_target_tokens == sum(target != NO_TARGET for _, one in splits["train"] for target in one)
    num_rows = {split: sum(shard.num_tokens for shard in manifest.split(split)) // ROW_LENGTH for split in splits}
    assert report.num_packed_rows == num_rows["train"]
    if packing:
        assert num_rows["train"] <= len(splits["train"]) // 2
    else:
        assert num_rows == {split: len(found) for split, found in splits.items()}
    sizes = [shard.num_tokens for shard in manifest.split("train")]
    assert max(sizes) - min(sizes) <= ROW_LENGTH


def test_the_manifest_and_the_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenizer = byte_level()
    prepared = prepare(write(tmp_path / "a.jsonl", PAIRS), out, tokenizer, num_shards=4)
    assert parse_manifest((out / "manifest.json").read_bytes()) == prepared.manifest
    assert verify(str(out)) == prepared.manifest
    assert (prepared.manifest.layout, prepared.manifest.row_length) == ("rows", ROW_LENGTH)
    assert (prepared.manifest.vocab_size, prepared.manifest.end_of_text_id) == (len(tokenizer), tokenizer.eos_token_id)
    for shard in prepared.manifest.shards:
        assert shard.num_bytes == prepared.manifest.num_bytes(shard.num_tokens) == (out / shard.file).stat().st_size
    for split in ("train", "validation"):
        for slot in range(2):
            assert SlotSampler(prepared.manifest, split, slot, 2, ROW_LENGTH, 0).num_samples >= 2
    text = "What is é\n?"
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids == tokenizer(text).input_ids
    assert not (out / "chat_template.jinja").exists()


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    """What a seed may change is the order of the rows alone."""
    contents = []
    for number, (rows, seed) in enumerate([(PAIRS, 0), (PAIRS[::-1], 0), (PAIRS, 1)]):
        out = tmp_path / f"out-{number}"
        prepare(write(tmp_path / "a.jsonl", rows), out, seed=seed)
        contents.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != "examples.json"})
    assert contents[0] == contents[1]
    assert contents[0]["prompts.jsonl"] == contents[2]["prompts.jsonl"]
    assert contents[0]["train-00000.tokens"] != contents[2]["train-00000.tokens"]
    assert len(contents[0]["train-00000.tokens"]) == len(contents[2]["train-00000.tokens"])


def test_prompts_are_the_held_out_ones_each_once(tmp_path: Path) -> None:
    tokenizer = byte_level()
    out = tmp_path / "out"
    prepared = prepare(write(tmp_path / "a.jsonl", PAIRS * 2), out, tokenizer, validation_fraction=0.3)
    assert len(prepared.prompts) * 2 == prepared.report.num_validation
    completions = {row["prompt"]: row["completion"] for row in PAIRS}
    for ids, text, expected in prepared.prompts:
        assert list(ids) == tokenizer(text).input_ids
        assert completions[text] == expected
    assert load_prepared(str(out)) == prepared


def test_a_preparation_that_is_not_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"manifest.json cannot be read .*prepare the examples again"):
        load_prepared(str(out))
    prepare(write(tmp_path / "a.jsonl", PAIRS), out)
    (out / "prompts.jsonl").write_text('["x"]\n')
    with pytest.raises(DataError, match=r"the examples in .* are corrupt \(.*\); prepare them again"):
        load_prepared(str(out))


def test_the_directory_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    seen: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_rows", lambda *_: (seen.append(os.listdir(tmp_path)), full()))
        with pytest.raises(OSError, match="No space"):
            prepare(path, tmp_path / "out")
    assert any(name.startswith("out.tmp") for name in seen[0])
    assert os.listdir(tmp_path) == ["a.jsonl"]
    prepare(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds a data set"):
        prepare(path, tmp_path / "out")


def test_a_look_writes_nothing_and_reports_what_preparing_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    response = preview(config(path), byte_level(), ROW_LENGTH, 3, num_shards=2)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert [example.origin for example in response.examples] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert response.report == prepare(path, tmp_path / "out").report


def test_tokenizers_that_will_not_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS)
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"names no end-of-text token; set eos_token in its tokenizer_config.json"):
        look(path, tokenizer)
