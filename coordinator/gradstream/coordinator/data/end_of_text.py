"""Find the token that ends a document, from the model's own files or from the recipe. It is never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradstream.core.data.sources import open_filesystem
from gradstream.core.errors import ConfigError, nearest, one_line

MAX_CONFIG_BYTES = 64 << 20
DATA_MANIFEST = "manifest.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SHOWN_TOKENS = 8
CURE = "set data.prepare.end_of_text or --end-of-text"


@dataclass(frozen=True, slots=True)
class EndOfText:
    """The token that ends a document. `origin` is the file or option that names it."""

    id: int
    text: str
    origin: str


def find_end_of_text(
    tokenizer_path: str, vocabulary: Mapping[str, int], special: list[str], asked: str | int | None
) -> EndOfText:
    """Find the end of text of the tokenizer at `tokenizer_path` (any fsspec path) in the files beside it.

    `special` are its special tokens, for a message. `asked` is a token or its id, which takes precedence. Raises
    ConfigError when no file names the token, when two files name different tokens, and for files that cannot be used.
    """
    names = (DATA_MANIFEST, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CONFIG, GENERATION_CONFIG)
    beside = {} if asked is not None else {name: _read_beside(tokenizer_path, name) for name in names}
    return choose_end_of_text(tokenizer_path, beside, vocabulary, special, asked)


def choose_end_of_text(
    tokenizer_path: str,
    beside: Mapping[str, Mapping[str, Any]],
    vocabulary: Mapping[str, int],
    special: list[str],
    asked: str | int | None = None,
) -> EndOfText:
    """Decide for `find_end_of_text`. `beside` has the files beside the tokenizer. Raises ConfigError."""
    texts = {number: text for text, number in vocabulary.items()}
    if asked is not None:
        return _asked(tokenizer_path, asked, vocabulary, texts)
    manifest = beside.get(DATA_MANIFEST, {})
    if "end_of_text_id" in manifest:  # a data set or a checkpoint of gradstream
        number = _ids(manifest["end_of_text_id"], DATA_MANIFEST, "end_of_text_id")[0]
        return EndOfText(number, _text(number, texts, tokenizer_path, DATA_MANIFEST), DATA_MANIFEST)
    stated = {
        name: _ids(value, name, "eos_token_id")
        for name in (CONFIG, GENERATION_CONFIG)
        if (value := _eos_token_id(beside.get(name, {}))) is not None
    }
    # In transformers' order: the older file first, unless the newer file has the added tokens too.
    settings = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
    if beside.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder") is None:
        settings = (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG)
    for name in settings:
        token = beside.get(name, {}).get("eos_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is None:
            continue
        if not isinstance(text, str) or text not in vocabulary:
            raise ConfigError(
                f"{tokenizer_path} has no token {text!r}, the eos_token of {name} beside it; correct one of them or "
                f"{CURE}"
            )
        _agree(text, vocabulary[text], name, stated, texts)
        return EndOfText(vocabulary[text], text, name)
    for name, ids in stated.items():
        if len(ids) == 1:
            text = _text(ids[0], texts, tokenizer_path, name)
            _agree(text, ids[0], name, stated, texts)
            return EndOfText(ids[0], text, name)
    if stated:
        name, ids = next(iter(stated.items()))
        shown = ", ".join(f"{_text(number, texts, tokenizer_path, name)!r} ({number})" for number in ids)
        raise ConfigError(f"{name} beside {tokenizer_path} names several ends of text, {shown}; {CURE} to one of them")
    shown = ", ".join(repr(text) for text in special[:SHOWN_TOKENS]) or "none"
    raise ConfigError(
        f"nothing beside {tokenizer_path} says which token ends a text (no eos_token in {TOKENIZER_CONFIG}, no "
        f"eos_token_id in {CONFIG} or {GENERATION_CONFIG}); {CURE} to one of its tokens (special ones: {shown})"
    )


def _asked(tokenizer_path: str, asked: str | int, vocabulary: Mapping[str, int], texts: Mapping[int, str]) -> EndOfText:
    if isinstance(asked, str):
        if asked not in vocabulary:
            raise ConfigError(
                f"end_of_text {asked!r} is not in the vocabulary of {tokenizer_path}{nearest(asked, vocabulary)}; name "
                f"one of its tokens"
            )
        return EndOfText(vocabulary[asked], asked, "end_of_text")
    if asked not in texts:
        raise ConfigError(f"end_of_text {asked} is not in the vocabulary of {tokenizer_path}; name one of its tokens")
    return EndOfText(asked, texts[asked], "end_of_text")


def _agree(text: str, number: int, origin: str, stated: Mapping[str, list[int]], texts: Mapping[int, str]) -> None:
    """Raise ConfigError for a file that names another end of text than `origin`."""
    for name, ids in stated.items():
        if number not in ids:
            shown = ", ".join(f"{texts.get(other, 'no token')!r} ({other})" for other in ids)
            raise ConfigError(
                f"the end of text is {text!r} ({number}) in {origin} and {shown} in {name} beside the tokenizer; "
                f"correct one of them or {CURE}"
            )


def _eos_token_id(config: Mapping[str, Any]) -> Any:
    value = config.get("eos_token_id")
    inner = config.get("text_config")  # of models with images or audio
    return inner.get("eos_token_id") if value is None and isinstance(inner, Mapping) else value


def _ids(value: Any, name: str, key: str) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(number) is not int for number in ids):
        raise ConfigError(f"{key} {value!r} in {name} beside the tokenizer is no token id; correct it or {CURE}")
    return ids


def _text(number: int, texts: Mapping[int, str], tokenizer_path: str, origin: str) -> str:
    if number not in texts:
        raise ConfigError(
            f"{tokenizer_path} has no token {number}, the end of text of {origin}; correct one of them or {CURE}"
        )
    return texts[number]


def _read_beside(tokenizer_path: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of the tokenizer's directory; empty when there is no such file."""
    filesystem, inner = open_filesystem(tokenizer_path)
    place = f"{inner.rpartition('/')[0]}/{name}"
    try:
        with filesystem.open(place, "rb") as handle:
            content = handle.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # every fsspec backend raises its own kind
        raise ConfigError(f"{place} cannot be read ({one_line(error)}); check the path and the rights") from None
    try:
        if len(content) > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES >> 20} MiB")
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({one_line(error)}); restore it or {CURE}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{place} is not a JSON object; restore it or {CURE}")
    return found
