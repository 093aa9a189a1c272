"""The token that ends a document comes from the model's files and is never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gradstream.coordinator.data.prepare import PrepareProgress, inspect, load_manifest, prepare
from gradstream.coordinator.data.tokenization import unknown_id
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.pretrained.added_tokens import added_token
from gradstream.core.recipe.loading import validated
from gradstream.core.recipe.recipe import PrepareConfig

SPECIAL = ["<eos>", "<bos>", "<pad>", "</s>", "<|endoftext|>"]
DOCUMENTS = [f"document {number} writes </s> and <eos>" for number in range(12)]


def byte_tokenizer(special: list[str] = SPECIAL, plain: tuple[str, ...] = ("</s>",)) -> Tokenizer:
    """A byte-level tokenizer; `special` are its first ids, those in `plain` added without being marked special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text in special:
        (tokenizer.add_tokens if text in plain else tokenizer.add_special_tokens)([AddedToken(text, normalized=False)])
    return tokenizer


def write_model(directory: Path, **files: Any) -> Path:
    """A tokenizer.json with JSON files beside it."""
    directory.mkdir()
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def options(tmp_path: Path, tokenizer: Path | str, **more: Any) -> PrepareConfig:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    settings = {"num_shards": 2, "validation_fraction": 0.25, "tokenizer": str(tokenizer), **more}
    return PrepareConfig(sources=[str(tmp_path / "in")], **settings)


EOS_CONFIG = {"eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("files", "expected", "origin"),
    [
        ({"tokenizer_config": EOS_CONFIG, "config": {"eos_token_id": 0}}, 0, "tokenizer_config.json"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, 3, "tokenizer_config.json"),
        ({"special_tokens_map": EOS_CONFIG}, 0, "special_tokens_map.json"),
        # Of the two files transformers takes the older one, unless the other holds the added tokens as well.
        ({"special_tokens_map": {"eos_token": "</s>"}, "tokenizer_config": EOS_CONFIG}, 3, "special_tokens_map.json"),
        (
            {
                "special_tokens_map": {"eos_token": "</s>"},
                "tokenizer_config": {**EOS_CONFIG, "added_tokens_decoder": {}},
            },
            0,
            "tokenizer_config.json",
        ),
        ({"config": {"eos_token_id": 3}}, 3, "config.json"),
        ({"config": {"text_config": {"eos_token_id": 3}}}, 3, "config.json"),
        ({"config": {"eos_token_id": [3]}, "tokenizer_config": {"eos_token": None}}, 3, "config.json"),
        ({"generation_config": {"eos_token_id": 4}, "config": {"model_type": "x"}}, 4, "generation_config.json"),
        # A chat model's list holds more ends than that of a document.
        ({"tokenizer_config": EOS_CONFIG, "generation_config": {"eos_token_id": [4, 0]}}, 0, "tokenizer_config.json"),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [3, 4]}}, 3, "config.json"),
        # Made by gradstream: its manifest says it.
        ({"manifest": {"end_of_text_id": 1}, "config": {"eos_token_id": 3}}, 1, "manifest.json"),
    ],
)
def test_what_the_files_beside_the_tokenizer_say(
    tmp_path: Path, files: dict[str, Any], expected: int, origin: str
) -> None:
    directory = write_model(tmp_path / "model", **files)
    seen: list[PrepareProgress] = []
    for place in (directory, directory / "tokenizer.json"):
        manifest = prepare(options(tmp_path, place), str(tmp_path / "out"), seen.append, force=True)
        assert (manifest.end_of_text_id, manifest.end_of_text) == (expected, SPECIAL[expected])
        assert seen[-1].end_of_text == f"{SPECIAL[expected]!r} (id {expected}), by {origin}"
    assert inspect(str(tmp_path / "out")).end_of_text == SPECIAL[expected]
    for shard in manifest.shards:  # no document ends itself, whether its end is marked special or not
        tokens = np.fromfile(tmp_path / "out" / shard.file, "<u2")
        assert (tokens == expected).sum() == shard.num_documents


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (
        {},
        r"nothing beside .*tokenizer\.json says which token ends a text .*; set .*'<eos>', '<bos>', '<pad>'",
    ),
    "none there": ({"tokenizer_config": {"bos_token": "<bos>"}, "config": {"vocab_size": 3}}, r"nothing beside"),
    "disagree": (
        {"tokenizer_config": EOS_CONFIG, "config": {"eos_token_id": 3}},
        r"the end of text is '<eos>' \(0\) in tokenizer_config\.json and '</s>' \(3\) in config\.json beside .*; co",
    ),
    "configs disagree": (
        {"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": [3, 4]}},
        r"'<eos>' \(0\) in config\.json and '</s>' \(3\), '<\|endoftext\|>' \(4\) in generation_config\.json",
    ),
    "several": (
        {"config": {"eos_token_id": [0, 3]}},
        r"config\.json beside .* names several ends of text, '<eos>' \(0\), '</s>' \(3\); set .*end_of_text",
    ),
    "not in the vocabulary": (
        {"tokenizer_config": {"eos_token": "<end>"}},
        r"tokenizer\.json has no token '<end>', the eos_token of tokenizer_config\.json beside it; correct one",
    ),
    "id too large": ({"config": {"eos_token_id": 900}}, r"has no token 900, the end of text of config\.json; correct"),
    "no id": ({"config": {"eos_token_id": "x"}}, r"eos_token_id 'x' in config\.json beside .* is no token id"),
    "no ids": ({"config": {"eos_token_id": []}}, r"eos_token_id \[\] in config\.json beside .* is no token id"),
    "a boolean": ({"config": {"eos_token_id": True}}, r"eos_token_id True in config\.json beside .* is no token id"),
    "no JSON": ({"tokenizer_config": "{"}, r"tokenizer_config\.json is not JSON \(.*\); restore it or set"),
    "no object": ({"config": "[]"}, r"config\.json is not a JSON object; restore it or set"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_say_it_is_refused(tmp_path: Path, case: str) -> None:
    files, message = BAD[case]
    directory = write_model(tmp_path / "model", **files)
    with pytest.raises(ConfigError, match=message):
        prepare(options(tmp_path, directory), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # Whatever the files say, the recipe decides.
    for asked in ("</s>", 3):
        manifest = prepare(options(tmp_path, directory, end_of_text=asked), str(tmp_path / "out"), force=True)
        assert (manifest.end_of_text_id, manifest.end_of_text) == (3, "</s>")


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", config={"eos_token_id": 0})
    with pytest.raises(ConfigError, match=r"end_of_text '</S>' is not in the vocabulary of .*; did you mean '</s>'\?"):
        prepare(options(tmp_path, directory, end_of_text="</S>"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"end_of_text 1000 is not in the vocabulary of .*; name one of its"):
        prepare(options(tmp_path, directory, end_of_text=1000), str(tmp_path / "out"))


def test_a_trained_tokenizer_ends_texts_as_asked(tmp_path: Path) -> None:
    asked = options(tmp_path, "x").model_copy(update={"tokenizer": None, "vocab_size": 300})
    manifest = prepare(asked, str(tmp_path / "out"))
    assert (manifest.end_of_text_id, manifest.end_of_text) == (0, "<|endoftext|>")
    asked = asked.model_copy(update={"end_of_text": "</s>"})
    manifest = prepare(asked, str(tmp_path / "out"), force=True)
    assert (manifest.end_of_text_id, manifest.end_of_text) == (0, "</s>")
    # And used again, its manifest says it.
    again = prepare(options(tmp_path, tmp_path / "out"), str(tmp_path / "again"))
    assert (again.end_of_text_id, again.end_of_text) == (0, "</s>")
    with pytest.raises(ConfigError, match="end_of_text 7 is an id, which a trained tokenizer gives out itself"):
        prepare(asked.model_copy(update={"end_of_text": 7}), str(tmp_path / "out"), force=True)


def test_beside_is_where_the_link_lies(tmp_path: Path) -> None:
    """In a hub's cache every file is a link to a blob."""
    directory = write_model(tmp_path / "blobs", tokenizer_config=EOS_CONFIG)
    (tmp_path / "snapshot").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).rename(directory / f"{name}-blob")
        (tmp_path / "snapshot" / name).symlink_to(directory / f"{name}-blob")
    assert prepare(options(tmp_path, tmp_path / "snapshot"), str(tmp_path / "out")).end_of_text == "<eos>"


def test_on_any_path(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = write_model(tmp_path / "model", tokenizer_config=EOS_CONFIG)
    root = f"memory://{request.node.name}"
    for path in directory.iterdir():
        fsspec.filesystem("memory").pipe_file(f"{root}/{path.name}", path.read_bytes())
    for place in (root, f"{root}/tokenizer.json"):
        assert prepare(options(tmp_path, place), str(tmp_path / "out"), force=True).end_of_text == "<eos>"


def test_an_end_that_a_text_can_spell_is_refused(tmp_path: Path) -> None:
    """A word of the vocabulary that is no added token: nothing tells it from a document's text."""
    tokenizer = Tokenizer(models.WordLevel({"end": 0, "document": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = options(tmp_path, tmp_path / "tokenizer.json", end_of_text="end")
    assert prepare(asked, str(tmp_path / "out")).end_of_text_id == 0
    (tmp_path / "in" / "more.jsonl").write_text('{"text": "document end"}\n')
    with pytest.raises(
        DataError, match=r"a document holds the end of text \(token 0\) as ordinary text.*; list the tok"
    ):
        prepare(asked, str(tmp_path / "out"), force=True)


def test_the_recipe_takes_a_token_or_an_id() -> None:
    for value in ("<eos>", 7):
        assert PrepareConfig(sources=["x"], end_of_text=value).end_of_text == value
    for wrong in (True, 1.5, ["<eos>"]):
        with pytest.raises(ConfigError, match=r"end_of_text"):
            validated(PrepareConfig, {"sources": ["x"], "end_of_text": wrong}, "recipe")


def test_a_manifest_from_before(tmp_path: Path) -> None:
    """A data set without the text of its end is read as before."""
    directory = write_model(tmp_path / "model", tokenizer_config=EOS_CONFIG)
    prepare(options(tmp_path, directory), str(tmp_path / "out"))
    path = tmp_path / "out" / "manifest.json"
    tree = json.loads(path.read_text())
    for key in ("end_of_text", "read_as", "left_out"):
        del tree[key]
    path.write_text(json.dumps(tree))
    assert load_manifest(str(tmp_path / "out")).end_of_text_id == 0


def test_an_export_names_the_end_wherever_the_vocabulary_has_it() -> None:
    """Also one that is no added token, which a checkpoint's export and its use as a base write out."""
    added = [{"id": 2, "content": "<eos>"}, "odd", {"id": 9}]
    words = {"type": "BPE", "vocab": {"a": 0, "end": 1, "<eos>": 2}}
    unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.0], 5]}
    for tree, number, expected in (
        ({"added_tokens": added, "model": words}, 2, "<eos>"),
        ({"added_tokens": added, "model": words}, 1, "end"),
        ({"added_tokens": None, "model": unigram}, 1, "</s>"),
        ({"model": unigram}, 2, None),
        ({"model": unigram}, 3, None),
        ({"model": unigram}, -1, None),
        ({"added_tokens": added}, 0, None),
        ([], 0, None),
    ):
        assert added_token(tree, number) == expected


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_text_that_the_tokenizer_does_not_know(tmp_path: Path, unknown: str | None) -> None:
    """It is counted where a token stands for it, and said where it is lost."""
    words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token=unknown))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = options(tmp_path, tmp_path / "tokenizer.json", end_of_text="</s>", validation_fraction=0)
    (tmp_path / "in" / "rows.jsonl").write_text('{"text": "abx"}\n{"text": "xxa"}\n')
    seen: list[PrepareProgress] = []
    manifest = prepare(asked, str(tmp_path / "out"), seen.append)
    assert sum(shard.num_tokens for shard in manifest.shards) == (8 if unknown else 5)
    (note,) = seen[-1].notes
    assert note.endswith("each is an unknown token (3)" if unknown else "such characters of the texts are lost")


def test_unknown_tokens_of_every_kind_of_model() -> None:
    for tree, expected in (
        ({"model": {"type": "Unigram", "unk_id": 3, "vocab": [["a", 0.0]]}}, 3),
        ({"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 7}}}, 7),
        ({"model": {"type": "BPE", "unk_token": "<u>", "vocab": {}}, "added_tokens": [{"content": "<u>", "id": 9}]}, 9),
        ({"model": {"type": "BPE", "unk_token": None, "vocab": {"a": 0}}}, None),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, None),
    ):
        assert unknown_id(json.dumps(tree).encode()) == expected
