"""Checks of a model's config before a model is built from it. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradstream.core.recipe.defaults import text_section

if TYPE_CHECKING:
    pass


SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


TEXTS = frozenset(
    {"transformers_version", "id2label", "label2id", "task_specific_params", "_name_or_path", "_commit_hash"}
)
"""Keys of a config.json whose values are not numbers to compute with."""


LIKE_A_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config that cannot be trained: a quantized model, or a text where a number is meant."""
    for section, key in (("", "quantization_config"), ("text_config.", "quantization_config")):
        inner = config if not section else text_section(config)
        if inner.get(key) is not None:
            raise ValueError(
                f"model.config.{section}{key} asks for quantized weights, which cannot be trained; take it out, or set "
                f"model.config.{section}{key}=null"
            )
    for path, value in _numbers_as_text(config, ()):
        raise ValueError(
            f"model.config.{'.'.join(path)} is the text '{value}', and a number is meant; write it without quotes"
        )


def _numbers_as_text(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in TEXTS:
                yield from _numbers_as_text(inner, (*path, str(key)))
    elif isinstance(value, str) and LIKE_A_NUMBER.fullmatch(value):
        yield path, value


def check_special_ids(config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming all of them, for end, begin or padding tokens outside of the config's vocabulary."""
    inner = text_section(config)
    size = inner.get("vocab_size")
    prefix = "" if inner is config else "text_config."
    if not isinstance(size, int):
        return
    outside = [
        f"model.config.{prefix}{key} {token}"
        for key in SPECIAL_IDS
        for token in _ids(inner.get(key))
        if not 0 <= token < size
    ]
    if outside:
        raise ValueError(_outside(outside, size))


def _outside(tokens: Sequence[str], size: int) -> str:
    verb, each = ("are", "each") if len(tokens) > 1 else ("is", "it")
    return f"{' and '.join(tokens)} {verb} outside of the vocabulary of {size}; set {each} to null or to a token's id"


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]
