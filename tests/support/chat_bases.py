"""A base for conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.bases import save_base
from support.tokenizers import CHATML

WORDS = ["<end>", "<s>", "<|im_start|>", "<|im_end|>", "<unk>", *"abcdefghij", "user", "assistant"]


def chat_base(directory: Path, **generation: Any) -> Path:
    """Save a base with bos from the post-processor, special tokens, a chat template and a generation_config.json."""
    save_base(directory)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS[:4]])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", bos_token="<s>", unk_token="<unk>", pad_token="<end>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(generation or {"eos_token_id": [0, 3], "top_k": 7}))
    return directory
