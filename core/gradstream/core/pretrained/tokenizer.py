"""The tokenizer of a base, read without running the base's code and without network access.

transformers' own from_pretrained may run a base's code and look for files on the network. Here the class is the plain
fast one. It reads the base's tokenizer.json, or the tokenizer that transformers' class for the base makes of that file
(`tokenizer_class`), and a few fields of tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstream.core.checkpoint.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    CheckpointManifest,
    parse_manifest,
    read_manifest,
)
from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.foreign import panics_caught, parsing
from gradstream.core.log import get_logger
from gradstream.core.pretrained import export
from gradstream.core.pretrained.added_tokens import (
    NAMED,
    added_token,
    added_tokens,
    as_added,
    extra_special_tokens,
    named_special_tokens,
)
from gradstream.core.pretrained.files import SmallFiles
from gradstream.core.pretrained.tokenizer_class import ADDED_TOKENS, FAMILY, as_its_class
from gradstream.core.recipe.defaults import text_section
from gradstream.core.recipe.fine_tuning import Base, TokenizerFiles
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ADDED_TOKENS_NAME = "added_tokens.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    TEMPLATE_NAME,
    "chat_template.json",
    "special_tokens_map.json",
    ADDED_TOKENS_NAME,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
TEMPLATES_DIRECTORY = "additional_chat_templates"
MAX_BASES = 16
"""Maximum number of fine-tunings of fine-tunings that are followed to the base of the first one."""
END_IDS = "end_of_text_ids"
"""The attribute of a tokenizer of `load_tokenizer` with the ids of all tokens that end a text."""
PROBE = "a reply as a probe"


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with its special and added tokens, and its chat template if it has one.

    For a fine-tuning's checkpoint it is the tokenizer of the base from which the fine-tuning began, if that base still
    exists. For any other checkpoint it is the tokenizer.json beside it. Raises ConfigError when there is no tokenizer,
    when it cannot be used, or when no file names the token that ends a text.
    """
    found = _files_of(base)
    return _of_checkpoint(found) if _is_checkpoint(base, found) else _of_huggingface(found)


def record_tokenizer(base: Base) -> TokenizerFiles:
    """Record the directory and hashes of the files that `load_tokenizer` and the functions below read.

    A base with this record has these files for good: changed files are refused from then on. Raises CheckpointError or
    ConfigError when a file cannot be read.
    """
    found = _files_of(base)
    if _is_checkpoint(base, found):
        wanted = [MANIFEST_NAME, TOKENIZER_NAME]
    else:
        there = found.names()
        wanted = [name for name in (*TOKENIZER_FILES, CONFIG_NAME, GENERATION_CONFIG_NAME) if name in there]
        wanted += [f"{TEMPLATES_DIRECTORY}/{name}" for name in _other_templates(found)]
    return TokenizerFiles(directory=found.directory, sha256=found.hashes(wanted))


def _files_of(base: Base) -> SmallFiles:
    if base.tokenizer is not None:
        return SmallFiles(base.tokenizer.directory, base.tokenizer.sha256)
    origin = _origin(base.path) if base.kind == "checkpoint" else None
    return SmallFiles(base.path) if origin is None else _files_of(origin)


def _is_checkpoint(base: Base, found: SmallFiles) -> bool:
    return base.kind == "checkpoint" and found.directory == base.path


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text or a reply.

    They are the tokenizer's end of text, the end tokens that `load_tokenizer` found in config.json and
    generation_config.json, and the special token that the chat template puts after a reply.
    """
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, END_IDS, ()), turn_end_id(tokenizer)}
    return frozenset(int(token) for token in ids if token is not None)


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after a reply; None when there is none."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        with panics_caught():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # there is no template, or the template refuses these messages
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
    """One more than the largest token id. Raises ConfigError when the vocabulary cannot be read."""
    with parsing(lambda cause: ConfigError(f"the tokenizer's vocabulary cannot be read ({cause}); get the file again")):
        return 1 + max(map(int, tokenizer.get_vocab().values()), default=-1)


def write_tokenizer(base: Base, destination: Path) -> None:
    """Copy the base's tokenizer files into a directory. Raises CheckpointError or ConfigError when there are none."""
    found = _files_of(base)
    if _is_checkpoint(base, found):
        export.write_tokenizer(_manifest(found), found.read(TOKENIZER_NAME), destination)
        return
    names = set(found.names())
    if TOKENIZER_NAME not in files.list_names(found.directory):
        raise ConfigError(_no_tokenizer(found.directory))
    for name in TOKENIZER_FILES:
        if name in names:
            (destination / name).write_bytes(found.read(name))
    if _other_templates(found):
        # An export has no subdirectories: the templates go into tokenizer_config.json, where transformers finds them.
        settings = found.read_json(TOKENIZER_CONFIG_NAME) if TOKENIZER_CONFIG_NAME in names else {}
        templates = _chat_template(found, settings)
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (destination / TOKENIZER_CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (destination / TEMPLATE_NAME).unlink(missing_ok=True)


def write_generation_config(base: Base, destination: Path, chat: bool = False) -> None:
    """Copy the base's generation_config.json, if it has one, into a directory.

    If transformers would not stop at the end token that a fine-tuning teaches, this token is added to the file: the
    tokenizer's end of text, and with `chat` the token that the chat template puts after a reply. Raises
    CheckpointError or ConfigError.
    """
    tokenizer = load_tokenizer(base)
    found = _files_of(base)
    content: bytes | None = None
    fields: dict[str, Any] = {}
    if _is_checkpoint(base, found):
        config = _manifest(found).architecture
    else:
        names = found.names()
        config = found.read_json(CONFIG_NAME) if CONFIG_NAME in names else {}
        if GENERATION_CONFIG_NAME in names:
            content = found.read(GENERATION_CONFIG_NAME)
            fields = found.read_json(GENERATION_CONFIG_NAME)
    # transformers uses the end tokens of the model's config if generation_config.json has none.
    known = end_ids_in(fields) or end_ids_in(config)
    taught = {tokenizer.eos_token_id, turn_end_id(tokenizer) if chat else None} - {None}
    missing = sorted(int(token) for token in taught if token not in known)
    if missing:
        ends = [*known, *missing]
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        content = json.dumps(fields, indent=2).encode()
    if content is not None:
        (destination / GENERATION_CONFIG_NAME).write_bytes(content)


def _origin(directory: str) -> Base | None:
    """The Hugging Face base of the first in a chain of fine-tunings, whose last checkpoint is `directory`.

    None when the chain began with a pretrained checkpoint. None, with a warning, when the base is gone or its tokenizer
    has changed.
    """
    try:
        first = directory
        for _ in range(MAX_BASES):
            fine_tuning = read_manifest(first).fine_tuning
            if fine_tuning is None:
                return None
            base = fine_tuning.base
            # A path in a file is checked like a path that a submitter names.
            AllowedPaths.of_environment().check(f"{first}: its base", base.path)
            if base.tokenizer is not None:
                AllowedPaths.of_environment().check(f"{first}: its base's tokenizer", base.tokenizer.directory)
            if base.kind == "huggingface":
                if _vocabulary(_of_huggingface(_files_of(base))) != _vocabulary(_of_checkpoint(SmallFiles(directory))):
                    raise ConfigError(f"the tokenizer of {base.path} is not the one that {directory} was trained with")
                return base
            first = base.path
        raise ConfigError(f"{directory} has more than {MAX_BASES} bases before it; start from an export of it")
    except GradstreamError as error:
        get_logger().warning(
            "the tokenizer files of the base are not used: no chat template, no special token but end of text",
            checkpoint=directory,
            reason=str(error),
        )
        return None


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    with parsing(lambda cause: ConfigError(f"the tokenizer's vocabulary cannot be read ({cause}); get the file again")):
        return dict(tokenizer.get_vocab())


def _of_huggingface(found: SmallFiles) -> PreTrainedTokenizerBase:
    settings = _settings(found)
    return _tokenizer(found, settings, _chat_template(found, settings))


def _of_checkpoint(found: SmallFiles) -> PreTrainedTokenizerBase:
    manifest = _manifest(found)
    end_of_text = added_token(found.read_json(TOKENIZER_NAME), manifest.end_of_text_id)
    ends = [manifest.end_of_text_id, *end_ids_in(manifest.architecture)]
    return _tokenizer(found, {"bos_token": end_of_text, "eos_token": end_of_text, END_IDS: ends}, None)


def _manifest(found: SmallFiles) -> CheckpointManifest:
    return parse_manifest(found.directory, found.read(MANIFEST_NAME))


def _settings(found: SmallFiles) -> dict[str, Any]:
    """The settings of tokenizer_config.json and its older companions, with the same precedence as in transformers.

    END_IDS and ADDED_TOKENS are added, from all files of the directory.
    """
    names = found.names()

    def read(name: str) -> dict[str, Any]:
        values = found.read_json(name) if name in names else {}
        return {key: value for key, value in values.items() if value is not None}

    settings, older = read(TOKENIZER_CONFIG_NAME), read("special_tokens_map.json")
    added = settings.get("added_tokens_decoder")
    settings = {**older, **settings} if added is not None else {**settings, **older}
    if added is None:
        added = {str(token): {"content": text} for text, token in read(ADDED_TOKENS_NAME).items()}
    config = read(CONFIG_NAME)
    ends = [*end_ids_in(config), *end_ids_in(read(GENERATION_CONFIG_NAME))]
    family = {key: config[key] for key in ("model_type", "tokenizer_class") if isinstance(config.get(key), str)}
    return {**settings, END_IDS: ends, ADDED_TOKENS: added, FAMILY: family}


def end_ids_in(config: Mapping[str, Any]) -> list[int]:
    """The ids that a config, or its `text_config`, names as end of text, as a list."""
    found: list[int] = []
    for section in (config, text_section(config)):
        value = section.get("eos_token_id")
        values = value if isinstance(value, list | tuple) else [value]
        found += [end for end in values if isinstance(end, int) and not isinstance(end, bool) and end >= 0]
    return list(dict.fromkeys(found))


def _other_templates(found: SmallFiles) -> list[str]:
    """The files of chat templates beside the default one."""
    if TEMPLATES_DIRECTORY not in found.names():
        return []
    return [name for name in found.names(TEMPLATES_DIRECTORY) if name.endswith(".jinja")]


def _chat_template(found: SmallFiles, settings: dict[str, Any]) -> Any:
    """The chat template, or several by name, in transformers' form; None when there is none."""
    contents = {"default": found.read(TEMPLATE_NAME)} if TEMPLATE_NAME in found.names() else {}
    for name in _other_templates(found):
        contents[name.removesuffix(".jinja")] = found.read(f"{TEMPLATES_DIRECTORY}/{name}")
    if contents:
        texts = {name: content.decode("utf-8", errors="replace") for name, content in contents.items()}
        return texts["default"] if len(texts) == 1 and "default" in texts else texts
    template = settings.get("chat_template")
    entries = template if isinstance(template, list) else [{"name": "", "template": template}]
    if template is not None and not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        path = files.join(found.directory, TOKENIZER_CONFIG_NAME)
        raise ConfigError(f"the chat_template in {path} is neither a text nor a list of named ones; get the file again")
    return {entry["name"]: entry["template"] for entry in entries} if isinstance(template, list) else template


def _tokenizer(found: SmallFiles, settings: dict[str, Any], chat_template: Any) -> PreTrainedTokenizerBase:
    if TOKENIZER_NAME not in files.list_names(found.directory):
        raise ConfigError(_no_tokenizer(found.directory))
    content = found.read(TOKENIZER_NAME)
    with parsing(lambda cause: _unusable(found.directory, cause)):
        return _assembled(content, settings, chat_template, found.directory)


def _unusable(directory: str, cause: str) -> ConfigError:
    return ConfigError(
        f"{files.join(directory, TOKENIZER_NAME)} cannot be used ({cause}); get the file again, and "
        f"{TOKENIZER_CONFIG_NAME} too"
    )


def _assembled(content: bytes, settings: dict[str, Any], chat_template: Any, directory: str) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(content.decode())
    added = added_tokens(settings.get(ADDED_TOKENS) or {}, settings, directory)
    known = {token.content for token in added.values()}
    templates = "\n".join(chat_template.values()) if isinstance(chat_template, dict) else chat_template or ""
    special = named_special_tokens(
        settings, lambda text: text in known or backend.token_to_id(text) is not None, templates, directory
    )
    others = {key: value for key, value in settings.items() if not key.endswith("_token") and key != END_IDS}
    own = as_its_class(content, others | special, directory)
    if own is not None:
        defaults = ((kind, getattr(own, kind)) for kind in NAMED if kind not in settings)
        special |= {kind: text for kind, text in defaults if text is not None and backend.token_to_id(text) is not None}
        backend = own.backend_tokenizer
    first = next(iter(settings.get(END_IDS) or ()), None)
    if "eos_token" not in special and first is not None:
        text = added[first].content if first in added else backend.id_to_token(first)
        if text is not None:
            special["eos_token"] = text
    if "eos_token" not in special:
        raise ConfigError(
            f"nothing in {directory} says which token ends a text; set eos_token in its {TOKENIZER_CONFIG_NAME} to one "
            f"of the vocabulary"
        )
    own_kinds = {kind: text for kind, text in special.items() if kind not in NAMED}
    extra: dict[str, Any] = {"model_specific_special_tokens": own_kinds} if own_kinds else {}
    if unnamed := [as_added(value) for value in extra_special_tokens(settings)]:
        extra["extra_special_tokens"] = unnamed
    if settings.get("split_special_tokens"):
        raise ConfigError(
            f"split_special_tokens in the {TOKENIZER_CONFIG_NAME} of {directory} makes special tokens plain text, "
            f"those of a chat template too; take it out"
        )
    length = settings.get("model_max_length")
    if isinstance(length, int):
        extra["model_max_length"] = length
    # tokenizer.json decides if bos and eos are put around a text. As in transformers, add_bos_token and add_eos_token
    # beside it have no effect.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        added_tokens_decoder=added,
        **{kind: text for kind, text in special.items() if kind in NAMED},
        **extra,
    )
    for number, token in added.items():
        if tokenizer.convert_tokens_to_ids(token.content) != number:
            raise ConfigError(
                f"the added token {token.content!r} of {directory} has id {number} in {TOKENIZER_CONFIG_NAME} or "
                f"{ADDED_TOKENS_NAME}, and its {TOKENIZER_NAME} gives it another; save the tokenizer again"
            )
    setattr(tokenizer, END_IDS, tuple(settings.get(END_IDS) or ()))
    return tokenizer  # type: ignore[no-any-return]


def _no_tokenizer(directory: str) -> str:
    return (
        f"{directory} has no {TOKENIZER_NAME}; write one there with transformers' "
        f"AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )
