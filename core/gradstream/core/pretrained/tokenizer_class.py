"""The tokens that transformers' own class makes of a tokenizer.json.

Some classes take vocabulary, merges and post-processor out of tokenizer.json and put normalizer, pre-tokenizer and
decoder of their own in the place of the file's. LlamaTokenizer writes a blank before the first word alone, where the
file of Llama 2 says: before every piece between special tokens. A user who loads a base or a result with AutoTokenizer
gets those tokens, so they are the ones to train on.
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
"""Keys beside those of tokenizer_config.json: the added tokens by their ids, and what config.json says of the class."""
# What runs code of the directory, and what gradstream reads by itself.
LEFT_OUT = ("auto_map", "chat_template", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def as_its_class(content: bytes, settings: Mapping[str, Any], base: str) -> Any:
    """The tokenizer that AutoTokenizer makes of a directory with these files, where its class is one of transformers'
    that goes its own way; None where it takes tokenizer.json as it is.

    `content`: the tokenizer.json. `settings`: the contents of tokenizer_config.json, with ADDED_TOKENS and FAMILY;
    special tokens in it are in the vocabulary. Nothing is fetched, and no code of the directory runs. A class that is
    made for another kind of model, or that cannot be made, is not used: the first would know no text of this
    vocabulary, the second is warned of.
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
        # Not the base's own directory: a base may lie on another machine, and has files that are of no use here.
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
