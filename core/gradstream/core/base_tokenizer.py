"""The tokenizer of a base: read from its tokenizer.json and nothing that could run or reach out.

transformers' own from_pretrained may look for a class by name, on the network too. Here the class is always the plain
fast one, on the base's tokenizer.json as it is; a few fields of tokenizer_config.json say the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstream.core import checkpoint, files
from gradstream.core.base_files import read_json, read_small
from gradstream.core.checkpoint import TOKENIZER_NAME, CheckpointReader, added_token, read_manifest
from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.finetuning import Base
from gradstream.core.foreign import panics_caught, parsing
from gradstream.core.log import get_logger
from gradstream.core.paths import AllowedPaths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    TEMPLATE_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAX_BASES = 16
"""Fine-tunings of fine-tunings that are followed to the first one's chat template."""
END_IDS = "end_of_text_ids"
"""The attribute by which a tokenizer of `load_tokenizer` knows more than one token that ends a text."""
PROBE = "a reply as a probe"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(base: Base, depth: int = 0) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with its end-of-text token and its chat template if it has one.

    That of a checkpoint is the tokenizer.json beside it; a checkpoint of a fine-tuning has the chat template of the
    base that it began from, as long as that is there. `depth` counts the checkpoints that led here. Raises ConfigError
    when there is no tokenizer, when it cannot be used, or when nothing says which token ends a text.
    """
    if base.kind == "checkpoint":
        return _of_checkpoint(base.path, depth)
    settings = _settings(base.path)
    return _tokenizer(base.path, settings, _chat_template(base.path, settings))


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text or a reply.

    They are the tokenizer's end of text, what `load_tokenizer` found in config.json and generation_config.json, and
    the special token that the chat template puts after a reply.
    """
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, END_IDS, ()), turn_end_id(tokenizer)}
    return frozenset(int(token) for token in ids if token is not None)


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after a reply; None when it puts none there."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        with panics_caught():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # no template, or one that refuses these messages
        return None
    after = text[text.rfind(PROBE) + len(PROBE) :].lstrip() if PROBE in text else ""
    found = [
        (len(token.content), number)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content and after.startswith(token.content)
    ]
    token = max(found)[1] if found else None
    return token if token is not None and token != tokenizer.bos_token_id else None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id. Raises ConfigError when the vocabulary cannot be read."""
    with parsing(lambda cause: ConfigError(f"the tokenizer's vocabulary cannot be read ({cause}); get the file again")):
        return 1 + max(map(int, tokenizer.get_vocab().values()), default=-1)


def write_tokenizer(base: Base, destination: Path) -> None:
    """Write the base's tokenizer files into a directory. Raises CheckpointError or ConfigError when there are none."""
    if base.kind == "checkpoint":
        checkpoint.write_tokenizer(CheckpointReader(base.path), destination)
        write_chat_template(base.path, destination)
        return
    names = set(files.list_names(base.path))
    if TOKENIZER_NAME not in names:
        raise ConfigError(_no_tokenizer(base.path))
    for name in TOKENIZER_FILES:
        if name in names:
            (destination / name).write_bytes(read_small(base.path, name))


def write_chat_template(checkpoint_directory: str, destination: Path) -> None:
    """Write the chat template of a checkpoint, which it has from the base that it began from, if there is one."""
    template = _of_checkpoint(checkpoint_directory).chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        (destination / TEMPLATE_NAME).write_text(template, encoding="utf-8")


def _of_checkpoint(directory: str, depth: int = 0) -> PreTrainedTokenizerBase:
    manifest = read_manifest(directory)
    end_of_text = added_token(read_json(directory, TOKENIZER_NAME), manifest.end_of_text_id)
    settings: dict[str, Any] = {"bos_token": end_of_text, "eos_token": end_of_text}
    template = None
    if manifest.finetuning is not None:
        try:
            # What a file says is followed no further than what a submitter says.
            AllowedPaths.of_environment().check(f"{directory}: its base", manifest.finetuning.base.path)
            if depth >= MAX_BASES:
                raise ConfigError(f"{directory} has more than {MAX_BASES} bases before it; start from an export of it")
            template = load_tokenizer(manifest.finetuning.base, depth + 1).chat_template
        except GradstreamError as error:
            get_logger().warning("the chat template of the base is not there", checkpoint=directory, reason=str(error))
    return _tokenizer(directory, settings, template)


def _settings(directory: str) -> dict[str, Any]:
    """What tokenizer_config.json and its older companion say."""
    names = files.list_names(directory)
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG_NAME):
        if name in names:
            settings.update({key: value for key, value in read_json(directory, name).items() if value is not None})
    if "eos_token" not in settings:
        for name in (CONFIG_NAME, "generation_config.json"):
            ids = read_json(directory, name).get("eos_token_id") if name in names else None
            if ids is not None:
                settings["eos_token_id"] = ids[0] if isinstance(ids, list) and ids else ids
                break
    return settings


def _chat_template(directory: str, settings: dict[str, Any]) -> Any:
    """A template, or several by name, as transformers has them; None when there is none."""
    if TEMPLATE_NAME in files.list_names(directory):
        return read_small(directory, TEMPLATE_NAME).decode("utf-8", errors="replace")
    template = settings.get("chat_template")
    entries = template if isinstance(template, list) else [{"name": "", "template": template}]
    if template is not None and not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise ConfigError(
            f"the chat_template in {files.join(directory, TOKENIZER_CONFIG_NAME)} is neither a text nor a list of "
            f"named ones; get the file again"
        )
    return {entry["name"]: entry["template"] for entry in entries} if isinstance(template, list) else template


def _tokenizer(directory: str, settings: dict[str, Any], chat_template: Any) -> PreTrainedTokenizerBase:
    if TOKENIZER_NAME not in files.list_names(directory):
        raise ConfigError(_no_tokenizer(directory))
    content = read_small(directory, TOKENIZER_NAME)
    with parsing(lambda cause: _unusable(directory, cause)):
        return _assembled(content, settings, chat_template, directory)


def _unusable(directory: str, cause: str) -> ConfigError:
    return ConfigError(
        f"{files.join(directory, TOKENIZER_NAME)} cannot be used ({cause}); get the file again, and "
        f"{TOKENIZER_CONFIG_NAME} too"
    )


def _assembled(content: bytes, settings: dict[str, Any], chat_template: Any, directory: str) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(content.decode())
    special: dict[str, Any] = {}
    for kind in SPECIAL_TOKENS:
        value = settings.get(kind)
        text = value.get("content") if isinstance(value, dict) else value
        # One that the vocabulary lacks would be added to it, under an id that the model does not know.
        if isinstance(text, str) and backend.token_to_id(text) is not None:
            special[kind] = text
    if "eos_token" not in special and isinstance(settings.get("eos_token_id"), int):
        text = backend.id_to_token(settings["eos_token_id"]) if settings["eos_token_id"] >= 0 else None
        if text is not None:
            special["eos_token"] = text
    if "eos_token" not in special:
        raise ConfigError(
            f"nothing in {directory} says which token ends a text; set eos_token in its {TOKENIZER_CONFIG_NAME} to one "
            f"of the vocabulary"
        )
    extra: dict[str, Any] = {key: True for key in ("add_bos_token", "add_eos_token") if settings.get(key) is True}
    length = settings.get("model_max_length")
    if isinstance(length, int):
        extra["model_max_length"] = length
    return PreTrainedTokenizerFast(  # type: ignore[no-any-return]
        tokenizer_object=backend,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
        **extra,
    )


def _no_tokenizer(directory: str) -> str:
    return (
        f"{directory} has no {TOKENIZER_NAME}; write one there with transformers' "
        f"AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )
