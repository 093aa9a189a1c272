"""What is wrong with a model's config, or does not fit its data, found before a node is asked for anything.

Pure functions of the config, of the transformers config object and the model that are made of it, and of the data's
manifest.

transformers is imported inside the functions, so that importing this module costs nothing.
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
"""Keys of a config.json that transformers reads itself, or that older versions of it wrote."""
SIZES = re.compile(r"must match|invalid for input of size|cannot be multiplied|[Ss]izes of tensors|[Ss]ize mismatch")
"""What torch says of tensors whose shapes do not go together."""
SURELY_MEANT = 0.85
"""Similarity of a key to a known one above which it is a typing error."""
MAX_NAMED = 5


# ---- The config alone ------------------------------------------------------------------------------------------------


# ---- Config and data -------------------------------------------------------------------------------------------------


def with_ends(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with a model whose texts begin and end as those of the data; what the config leaves out is filled in.

    Padding is none unless the config names some: a family's own default may be a word of this vocabulary. A
    fine-tuning's recipe stays, its base says all this. Raises DataError, with both values, where they differ.
    """
    if recipe.fine_tuning is not None:
        return recipe
    config = dict(recipe.model.config)
    nested = text_section(config) is not config
    inner = dict(text_section(config))
    prefix, end = "model.config.text_config." if nested else "model.config.", manifest.end_of_text_id
    wrong = {}
    for key, what in (("eos_token_id", "end with"), ("bos_token_id", "begin after")):
        # A model with several parts may have it in both places.
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
    """Raise DataError for a padding token that the data trains on: embeddings of padding never change.

    `padding_ids` are those of the model's embeddings; `special` are the tokens that no text gives.
    """
    for token in padding_ids:
        if token == manifest.end_of_text_id or (token < manifest.vocab_size and token not in special):
            what = "end of text" if token == manifest.end_of_text_id else "token of ordinary text"
            raise DataError(
                f"model.config.pad_token_id is {token}, which is the data set's {what} {token}: its embedding would "
                f"never be trained; set model.config.pad_token_id=null"
            )


# ---- What is built ---------------------------------------------------------------------------------------------------


def positions(config: Any) -> tuple[str, int] | None:
    """The longest sequence of a transformers config, also where it is the family's default, and the key that says it;
    None when there is no limit."""
    inner = config.get_text_config()
    found = ((key, getattr(inner, key, None)) for key in POSITIONS)
    return next(((key, value) for key, value in found if isinstance(value, int) and value > 0), None)


def check_positions(longest: tuple[str, int] | None, sequence_length: int, model_type: object) -> None:
    """Raise ConfigError for sequences that are longer than the model's positions."""
    if longest is not None and sequence_length > longest[1]:
        raise ConfigError(
            f"training.sequence_length {sequence_length} is longer than the {longest[1]} positions of {model_type} "
            f"({longest[0]}); lower it, or set model.config.{longest[0]} where the model is new"
        )


def padding_ids(model: nn.Module) -> list[int]:
    """The tokens whose embeddings are never trained."""
    from torch import nn

    found = {module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)}
    return sorted(each for each in found if each is not None)


def check_shapes(config: Mapping[str, Any]) -> None:
    """Pass tokens through the model, as shapes without values. Raises ConfigError for sizes that do not go together,
    which many families notice only then. What cannot be known without values is left to the nodes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gradstream.core.model.model import build

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            model = build(config)
        except ConfigError:  # of a constructor that computes with values; `build` itself has made the model before
            return
        try:
            model(input_ids=torch.zeros((2, 2), dtype=torch.long), use_cache=False)
        except Exception as error:
            if SIZES.search(str(error)):
                raise ConfigError(
                    f"model.config: its sizes do not go together ({one_line(error)[:200]}); check the number of heads "
                    f"and the hidden sizes"
                ) from None


def explain_padding(config: Any, given: Mapping[str, Any]) -> str:
    """Why a model cannot be built, when that is its padding token; "" otherwise."""
    inner = config.get_text_config()
    token, size = getattr(inner, "pad_token_id", None), getattr(inner, "vocab_size", None)
    if not isinstance(token, int) or not isinstance(size, int) or -size <= token < size:
        return ""
    own = text_section(given).get("pad_token_id") is None
    default = f" (the default of {inner.model_type})" if own else ""
    return _outside([f"model.config.pad_token_id {token}{default}"], size)


def unknown_keys(given: Mapping[str, Any], config: Any, model: nn.Module) -> tuple[list[str], str]:
    """Keys of a config.json's contents that neither its family's config nor its model's code reads, and what is wrong
    with the first that is surely another one's typing error ("" when none is)."""
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
            return unknown, f"model.config.{key} is no key of {inner.model_type}; did you mean '{near[0]}'?"
    return unknown, ""


def unknown_warning(unknown: Sequence[str], model_type: object) -> list[str]:
    """What is said of keys that change nothing."""
    if not unknown:
        return []
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    verbs = "is not read by {} and changes" if len(unknown) == 1 else "are not read by {} and change"
    return [f"model.config: {', '.join(unknown[:MAX_NAMED])}{more} {verbs.format(model_type)} nothing"]


# ---- The recipe ------------------------------------------------------------------------------------------------------


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What a recipe says that can be meant, and more likely is not."""
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
    """A warm-up or a decay that does not fit into the run, or that the kind of learning-rate schedule does not have."""
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
