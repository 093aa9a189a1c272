"""The tokenizer that transformers' own class makes of a tokenizer.json.

Some classes take vocabulary, merges and post-processor from tokenizer.json, but replace the file's normalizer,
pre-tokenizer and decoder by their own. LlamaTokenizer adds a blank only before the first word, but the file of Llama 2
adds one before every piece between special tokens. A user who loads a base or a result with AutoTokenizer gets the
tokens of the class, so a fine-tuning must train on the same tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradstream.core.errors import one_line
from gradstream.core.foreign import is_panic
from gradstream.core.log import get_logger

ADDED_TOKENS = "added tokens"
FAMILY = "family"
"""Keys beside those of tokenizer_config.json: the added tokens by their ids, and config.json's keys about the class."""
# Keys that would run code of the directory, and keys that gradstream reads by itself.
LEFT_OUT = ("auto_map", "chat_template", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def as_its_class(content: bytes, settings: Mapping[str, Any], base: str) -> Any:
    """The tokenizer of AutoTokenizer for these files, if its class changes tokenizer.json; None if it does not.

    `content` is the tokenizer.json. `settings` are the contents of tokenizer_config.json, with ADDED_TOKENS and FAMILY;
    special tokens in them are in the vocabulary. Nothing is downloaded, and no code of the directory runs. A class for
    another kind of model is not used, because it could not tokenize with this vocabulary. A class that cannot be
    constructed is not used either, with a warning.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    family, added = settings.get(FAMILY) or {}, settings.get(ADDED_TOKENS)
    kept = {key: value for key, value in settings.items() if key not in (*LEFT_OUT, ADDED_TOKENS, FAMILY)}
    if "tokenizer_class" not in kept and not family:
        return None
    written = {"tokenizer_config.json": kept, "config.json": family}
    if added and "added_tokens_decoder" not in kept:
        written["added_tokens.json"] = {fields["content"]: int(number) for number, fields in added.items()}
    try:
        # A temporary directory, because a base may be on another machine and has further files.
        with tempfile.TemporaryDirectory(prefix="gradstream-tokenizer-") as directory:
            (Path(directory) / "tokenizer.json").write_bytes(content)
            for file, value in written.items():
                (Path(directory) / file).write_text(json.dumps(value), encoding="utf-8")
            made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        name = kept.get("tokenizer_class") or family.get("tokenizer_class") or family.get("model_type")
        get_logger().warning(
            "transformers cannot make the tokenizer's class, so tokenizer.json is taken as it is",
            base=base,
            tokenizer_class=name,
            reason=one_line(error),
        )
        return None
    is_plain = type(made) is PreTrainedTokenizerFast or not isinstance(made, PreTrainedTokenizerFast)
    kind = getattr(type(made), "model", None)
    there = json.loads(content).get("model", {}).get("type")
    return None if is_plain or (kind is not None and there not in (None, kind.__name__)) else made
