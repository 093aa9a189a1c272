"""Added tokens of a tokenizer, as the files beside its tokenizer.json name them."""

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
    """The special tokens without a name, each as its text or as an object with its text."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return [value for value in values if isinstance(value, str) or (isinstance(value, dict) and "content" in value)]


def as_added(value: Any) -> Any:
    """A special token in transformers' form: a text, or a token with flags, such as for the blanks around it."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return value
    options = {key: bool(value[key]) for key in ADDED_TOKEN_FIELDS if key in value}
    return AddedToken(str(value["content"]), **{"normalized": False, **options, "special": True})


def named_special_tokens(
    settings: Mapping[str, Any], is_known: Callable[[str], bool], template: str, directory: str
) -> dict[str, str]:
    """The texts of the named special tokens, by name: those that all tokenizers have, and a model's own.

    A chat template may refer to the names. Raises ConfigError when bos, or a token to which `template` refers, is not
    in the vocabulary.
    """
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
            # The token would get an id that the model does not know. No example contains the token.
            get_logger().warning("a special token is not in the vocabulary", base=directory, kind=kind, token=text)
    return found


def added_tokens(added: Any, settings: Mapping[str, Any], directory: str) -> dict[int, Any]:
    """The added tokens by their ids. Raises ConfigError when an entry is not a token."""
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
                f"the added token {str(number)[:40]!r} of {directory} is malformed; get its files again"
            ) from None
    return found


def added_token(vocabulary: Any, token_id: int) -> str | None:
    """The text of a token in the contents of a tokenizer.json; None if there is none.

    Searches its added tokens, then its model's vocabulary, because an end of text may be only in the vocabulary.
    """
    tree = vocabulary if isinstance(vocabulary, dict) else {}
    tokens, model = tree.get("added_tokens"), tree.get("model")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and token.get("id") == token_id and isinstance(token.get("content"), str):
            return str(token["content"])
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict):
        return next((str(text) for text, number in words.items() if number == token_id), None)
    if isinstance(words, list) and 0 <= token_id < len(words):  # a Unigram model has (text, score)
        entry = words[token_id]
        return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
    return None
