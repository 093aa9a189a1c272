"""Tokens that a tokenizer has beside its vocabulary, as the files beside its tokenizer.json name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError
from gradstream.core.log import get_logger

if TYPE_CHECKING:
    pass

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS = ("lstrip", "rstrip", "single_word", "normalized")


def extra_special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """Special tokens beside the named ones, each its text or an object with it."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return [value for value in values if isinstance(value, str) or (isinstance(value, dict) and "content" in value)]


def as_added(value: Any) -> Any:
    """A special token as transformers takes it: a text, or a token that says what it takes of the blanks around it."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return value
    options = {key: bool(value[key]) for key in ADDED_TOKEN_FIELDS if key in value}
    return AddedToken(str(value["content"]), **{"normalized": False, **options, "special": True})


def named_special_tokens(
    settings: Mapping[str, Any], is_known: Callable[[str], bool], template: str, directory: str
) -> dict[str, str]:
    """The texts of the special tokens that have a name, which a chat template may write them by: those that all
    tokenizers have, and a model's own. Raises ConfigError when bos, or one that `template` writes, is not in the
    vocabulary."""
    extra = settings.get("extra_special_tokens")
    named = {kind: value for kind, value in settings.items() if kind.endswith("_token")}
    found: dict[str, str] = {}
    for kind, value in (named | (extra if isinstance(extra, dict) else {})).items():
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            continue
        if is_known(text):
            found[kind] = text
        elif kind == "bos_token" or (kind != "eos_token" and re.search(rf"\b{re.escape(kind)}\b", template)):
            raise ConfigError(f"the {kind} {text!r} of {directory} is in neither its vocabulary nor its added tokens")
        elif kind != "eos_token":
            # It would get an id that the model does not know; no example has it.
            get_logger().warning("a special token is not in the vocabulary", base=directory, kind=kind, token=text)
    return found


def added_tokens(added: Any, settings: Mapping[str, Any], directory: str) -> dict[int, Any]:
    """Added tokens by their ids. Raises ConfigError when they are no tokens."""
    from tokenizers import AddedToken

    named = [value for key, value in settings.items() if key in NAMED] + extra_special_tokens(settings)
    special = [value.get("content") if isinstance(value, dict) else value for value in named]
    found: dict[int, Any] = {}
    entries: list[tuple[Any, Any]] = list(added.items()) if isinstance(added, dict) else [("", None)]
    for number, fields in entries:
        try:
            options = {key: fields[key] for key in ADDED_TOKEN_FIELDS if key in fields}
            is_special = bool(fields.get("special", fields["content"] in special))
            token = AddedToken(fields["content"], **{"normalized": not is_special, **options, "special": is_special})
            found[int(number)] = token
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ConfigError(
                f"the added token {str(number)[:40]!r} of {directory} is no token; get its files again"
            ) from None
    return found


def added_token(vocabulary: Any, token_id: int) -> str | None:
    """The text that the contents of a tokenizer.json give a token: one of its added tokens, else of its model's
    vocabulary, where an end of text may lie alone; None if there is none."""
    tree = vocabulary if isinstance(vocabulary, dict) else {}
    tokens, model = tree.get("added_tokens"), tree.get("model")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and token.get("id") == token_id and isinstance(token.get("content"), str):
            return str(token["content"])
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict):
        return next((str(text) for text, number in words.items() if number == token_id), None)
    if isinstance(words, list) and 0 <= token_id < len(words):  # of a Unigram model: text and score
        entry = words[token_id]
        return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
    return None
