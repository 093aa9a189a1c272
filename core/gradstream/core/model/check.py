"""Checks of a model's config, alone and against its data, made before any node takes part.

Pure functions of the config, of the transformers config object and the model that are made from it, and of the data's
manifest.

transformers is imported inside the functions, because its import is slow.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError, DataError, one_line
from gradstream.core.recipe.defaults import POSITIONS, text_section

if TYPE_CHECKING:
    from torch import nn

    from gradstream.core.data.manifest import Manifest
    from gradstream.core.recipe.recipe import LearningRateScheduleConfig, Recipe
from gradstream.core.recipe.model_config import TEXTS, _ids, _outside

METADATA = frozenset(
    {
        "model_type",
        "architectures",
        "auto_map",
        "torch_dtype",
        "attn_implementation",
        "rope_theta",
        "rope_scaling",
        "gradient_checkpointing",
        "task_specific_params",
        "quantization_config",
    }
)
"""Keys of a config.json that transformers itself reads, or that its older versions wrote."""
SIZES = re.compile(r"must match|invalid for input of size|cannot be multiplied|[Ss]izes of tensors|[Ss]ize mismatch")
"""Parts of torch's messages about tensors whose shapes do not match."""
SURELY_MEANT = 0.85
"""Similarity to a known key from which an unknown key counts as a typing error."""
MAX_NAMED = 5


# ---- Config and data -------------------------------------------------------------------------------------------------


def with_ends(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the begin and end tokens of the data filled in where the model's config leaves them out.

    There is no padding token unless the config names one, because a family's default may be an ordinary token of this
    vocabulary. A fine-tuning's recipe is returned unchanged, because its base has these tokens. Raises DataError, with
    both values, where config and data differ.
    """
    if recipe.fine_tuning is not None:
        return recipe
    config = dict(recipe.model.config)
    nested = text_section(config) is not config
    inner = dict(text_section(config))
    prefix, end = "model.config.text_config." if nested else "model.config.", manifest.end_of_text_id
    wrong = {}
    for key, what in (("eos_token_id", "end with"), ("bos_token_id", "begin after")):
        # A model with several parts may have the key in both places.
        given = inner[key] if inner.get(key) is not None else config.get(key)
        if given is None:
            inner[key] = end
        elif end not in _ids(given) or (key == "bos_token_id" and len(_ids(given)) > 1):
            wrong[f"{prefix}{key}"] = (given, what)
    if wrong:
        raise DataError(
            f"{' and '.join(f'{key} is {given}' for key, (given, _) in wrong.items())}, and the documents of the data "
            f"set {recipe.data.path} {' and '.join(what for _, what in wrong.values())} token {end}; set "
            f"{' and '.join(f'{key}={end}' for key in wrong)}, or leave {'them' if len(wrong) > 1 else 'it'} out"
        )
    inner.setdefault("pad_token_id", config.get("pad_token_id"))
    config = {**config, "text_config": inner} if nested else inner
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})


def check_padding(padding_ids: Sequence[int], manifest: Manifest, special: Collection[int]) -> None:
    """Raise DataError for a padding token that occurs in the data, because embeddings of padding are never trained.

    `padding_ids` are the padding tokens of the model's embeddings. `special` are the tokens that no text contains.
    """
    for token in padding_ids:
        if token == manifest.end_of_text_id or (token < manifest.vocab_size and token not in special):
            what = "end of text" if token == manifest.end_of_text_id else "token of ordinary text"
            raise DataError(
                f"model.config.pad_token_id is {token}, which is the data set's {what} {token}: its embedding would "
                f"never be trained; set model.config.pad_token_id=null"
            )


# ---- The model that is built -----------------------------------------------------------------------------------------


def positions(config: Any) -> tuple[str, int] | None:
    """The longest sequence of a transformers config, as (key, length); None when there is no limit.

    The length may come from the family's default.
    """
    inner = config.get_text_config()
    found = ((key, getattr(inner, key, None)) for key in POSITIONS)
    return next(((key, value) for key, value in found if isinstance(value, int) and value > 0), None)


def check_positions(longest: tuple[str, int] | None, sequence_length: int, model_type: object) -> None:
    """Raise ConfigError if sequences are longer than the model's positions."""
    if longest is not None and sequence_length > longest[1]:
        raise ConfigError(
            f"training.sequence_length {sequence_length} is longer than the {longest[1]} positions of {model_type} "
            f"({longest[0]}); lower it, or set model.config.{longest[0]} where the model is new"
        )


def padding_ids(model: nn.Module) -> list[int]:
    """The padding tokens of the model's embeddings, whose rows are never trained."""
    from torch import nn

    found = {module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)}
    return sorted(each for each in found if each is not None)


def check_shapes(config: Mapping[str, Any]) -> None:
    """Run a forward pass on shapes without values. Raises ConfigError for sizes that do not match.

    Many families detect mismatched sizes only in a forward pass. Checks that need values are left to the nodes.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gradstream.core.model.model import build

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            model = build(config)
        except ConfigError:  # the constructor computes with values; `build` itself has made the model before
            return
        try:
            model(input_ids=torch.zeros((2, 2), dtype=torch.long), use_cache=False)
        except Exception as error:
            if SIZES.search(str(error)):
                raise ConfigError(
                    f"model.config: its sizes do not match ({one_line(error)[:200]}); check the number of heads "
                    f"and the hidden sizes"
                ) from None


def explain_padding(config: Any, given: Mapping[str, Any]) -> str:
    """The reason why a model cannot be built, if it is the padding token; "" otherwise."""
    inner = config.get_text_config()
    token, size = getattr(inner, "pad_token_id", None), getattr(inner, "vocab_size", None)
    if not isinstance(token, int) or not isinstance(size, int) or -size <= token < size:
        return ""
    own = text_section(given).get("pad_token_id") is None
    default = f" (the default of {inner.model_type})" if own else ""
    return _outside([f"model.config.pad_token_id {token}{default}"], size)


def unknown_keys(given: Mapping[str, Any], config: Any, model: nn.Module) -> tuple[list[str], str]:
    """Find keys of a config.json that neither the family's config nor the model's code reads.

    Returns the keys, and the message for the first one that is surely a typing error ("" when none is).
    """
    from transformers import GenerationConfig

    inner = config.get_text_config()
    kinds = [type(config), type(inner)]
    known = {field for kind in kinds for field in getattr(kind, "__dataclass_fields__", ())}
    known |= {key for kind in kinds for key in getattr(kind, "attribute_map", {})}
    known |= METADATA | TEXTS | GenerationConfig().to_dict().keys()
    modules = {sys.modules[kind.__module__] for kind in (*kinds, type(model))}
    words = {word for module in modules for word in re.findall(r"\w+", inspect.getsource(module))}
    sections = [given] if text_section(given) is given else [given, text_section(given)]
    keys = {key for section in sections for key, value in section.items() if value is not None}
    unknown = sorted(key for key in keys - known - words if not key.startswith("_"))
    for key in unknown:
        near = difflib.get_close_matches(key[:100], known - keys, n=1, cutoff=SURELY_MEANT)
        if near:
            return unknown, f"model.config.{key} is not a key of {inner.model_type}; did you mean '{near[0]}'?"
    return unknown, ""


def unknown_warning(unknown: Sequence[str], model_type: object) -> list[str]:
    """The warning for keys that change nothing, as a list of at most one line."""
    if not unknown:
        return []
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    verbs = "is not read by {} and changes" if len(unknown) == 1 else "are not read by {} and change"
    return [f"model.config: {', '.join(unknown[:MAX_NAMED])}{more} {verbs.format(model_type)} nothing"]


# ---- The recipe ------------------------------------------------------------------------------------------------------


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Warnings about settings of a recipe that are valid but probably not meant."""
    training, pipeline, cluster = recipe.training, recipe.pipeline, recipe.cluster
    found = learning_rate_schedule_warnings(recipe.schedule, training.num_steps)
    if pipeline.stages == 1 and pipeline.schedule != "auto":
        found.append(f"pipeline.schedule {pipeline.schedule} changes nothing with pipeline.stages 1")
    most = training.num_slots * pipeline.min_workers
    if pipeline.stages != "auto" and cluster.min_workers > most:
        found.append(
            f"cluster.min_workers {cluster.min_workers} is more than the {most} that {training.num_slots} slots can "
            f"use; the job waits for workers that have nothing to do"
        )
    return found


def learning_rate_schedule_warnings(schedule: LearningRateScheduleConfig, num_steps: int) -> list[str]:
    """Warnings about a warm-up or decay that does not fit into the run, or that the kind of schedule does not have."""
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    found = []
    if warmup > num_steps:
        found.append(
            f"schedule.warmup_steps {warmup} is longer than the run of {num_steps} steps: the learning rate only "
            f"reaches {num_steps / warmup:.1%} of optimizer.learning_rate"
        )
    if schedule.kind != "wsd" and decay:
        found.append(f"schedule.decay_steps {decay} changes nothing with kind {schedule.kind}; it is wsd's")
    elif decay > num_steps:
        found.append(
            f"schedule.decay_steps {decay} is longer than the run of {num_steps} steps: the learning rate never "
            f"reaches optimizer.learning_rate"
        )
    elif decay and warmup + decay > num_steps >= warmup:
        found.append(
            f"schedule.warmup_steps {warmup} and decay_steps {decay} are together longer than the run of {num_steps} "
            f"steps: the learning rate falls before it has risen"
        )
    elif schedule.kind == "wsd" and not decay:
        found.append("schedule.decay_steps is 0: a wsd learning-rate schedule without a decay is a constant one")
    return found
