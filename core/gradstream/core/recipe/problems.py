"""Messages for invalid recipes: all problems on one line, with the key that was probably meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from gradstream.core.errors import nearest
from gradstream.core.recipe.section import Section

MAX_SHOWN = 12
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # Names in Hugging Face's Trainer and PEFT, axolotl, torchtune, nanoGPT and LLaMA-Factory.
    "lr": ("optimizer.learning_rate",),
    "batch_size": ("training.global_batch",),
    "per_device_train_batch_size": ("training.microbatch",),
    "micro_batch_size": ("training.microbatch",),
    "microbatch_size": ("training.microbatch",),
    "global_batch_size": ("training.global_batch",),
    "train_batch_size": ("training.global_batch",),
    "gradient_accumulation_steps": ("training.global_batch",),
    "max_steps": ("training.num_steps",),
    "max_iters": ("training.num_steps",),
    "max_steps_per_epoch": ("training.num_steps",),
    "steps": ("training.num_steps",),
    "epochs": ("training.num_epochs", "training.num_steps"),
    "num_train_epochs": ("training.num_epochs", "training.num_steps"),
    "num_epochs": ("training.num_epochs", "training.num_steps"),
    "seq_len": ("training.sequence_length",),
    "sequence_len": ("training.sequence_length",),
    "max_seq_len": ("training.sequence_length",),
    "max_seq_length": ("training.sequence_length",),
    "max_length": ("training.sequence_length",),
    "cutoff_len": ("training.sequence_length",),
    "block_size": ("training.sequence_length",),
    "context_length": ("training.sequence_length",),
    "bf16": ("training.precision",),
    "fp16": ("training.precision",),
    "dtype": ("training.precision",),
    "torch_dtype": ("training.precision",),
    "mixed_precision": ("training.precision",),
    "gradient_checkpointing": ("training.recompute",),
    "activation_checkpointing": ("training.recompute",),
    "enable_activation_checkpointing": ("training.recompute",),
    "optim": ("optimizer.kind",),
    "muon_momentum": ("optimizer.muon.momentum",),
    "adam_beta1": ("optimizer.betas",),
    "adam_beta2": ("optimizer.betas",),
    "beta1": ("optimizer.betas",),
    "beta2": ("optimizer.betas",),
    "adam_epsilon": ("optimizer.eps",),
    "max_grad_norm": ("optimizer.clip_norm",),
    "grad_clip": ("optimizer.clip_norm",),
    "clip_grad_norm": ("optimizer.clip_norm",),
    "gradient_clipping": ("optimizer.clip_norm",),
    "lr_scheduler": ("schedule.kind",),
    "lr_scheduler_type": ("schedule.kind",),
    "scheduler": ("schedule.kind",),
    "warmup": ("schedule.warmup_steps",),
    "warmup_ratio": ("schedule.warmup_steps",),
    "warmup_iters": ("schedule.warmup_steps",),
    "num_warmup_steps": ("schedule.warmup_steps",),
    "min_lr": ("schedule.min_ratio",),
    "eval_steps": ("validation.interval_steps",),
    "eval_interval": ("validation.interval_steps",),
    "early_stopping_patience": ("validation.patience",),
    "save_steps": ("checkpoint.interval_steps",),
    "save_interval": ("checkpoint.interval_steps",),
    "save_total_limit": ("checkpoint.keep",),
    "output_dir": ("run_root",),
    "out_dir": ("run_root",),
    "dataset": ("data.path",),
    "datasets": ("data.path",),
    "val_set_size": ("data.prepare.validation_fraction", "data.validation_fraction"),
    "sample_packing": ("data.packing",),
    "model_name_or_path": ("base_model",),
    "base_model_name_or_path": ("base_model",),
    "load_in_8bit": ("held",),
    "adapter": ("method",),
    "finetuning_type": ("method",),
    "r": ("lora.rank",),
    "lora_r": ("lora.rank",),
    "lora_rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "lora_target": ("lora.target_modules",),
    "lora_target_modules": ("lora.target_modules",),
    "lora_attn_modules": ("lora.target_modules",),
    "gradient_compression": ("codec.push",),
    "pipeline_parallel_size": ("pipeline.stages",),
}
"""Keys of other tools, with the keys here. The first one that the recipe's kind has is suggested."""


def explain(error: ValidationError, kind: type[Section]) -> str:
    """All problems of a recipe of `kind` on one line, at most MAX_SHOWN of them."""
    keys = set(all_keys(kind))
    by_key: dict[str, str] = {}  # pydantic reports a value that may have several types once for each type
    for problem in error.errors():
        by_key.setdefault(_key(problem["loc"], keys), _explain(problem, kind))
    problems = list(by_key.values())
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - MAX_SHOWN
    shown = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems[:MAX_SHOWN], 1))
    return f"{len(problems)} problems: {shown}{f'; and {more} more' if more > 0 else ''}"


def all_keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """The keys of a recipe of `kind` in dotted form, a section before its keys."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        section = _section(field.annotation)
        if section is not None:
            yield from all_keys(section, f"{prefix}{name}.")


def _explain(problem: Any, kind: type[Section]) -> str:
    location = problem["loc"]
    where = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'{_meant(location, kind)}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return str(message)
    return f"'{where}': {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _key(location: tuple[int | str, ...], keys: set[str]) -> str:
    """The recipe's key that contains a location; an unknown key stays as it is."""
    parts = [str(part) for part in location]
    for length in range(len(parts), 0, -1):
        if (key := ".".join(parts[:length])) in keys and not any(other.startswith(f"{key}.") for other in keys):
            return key
    return ".".join(parts)


def key_meant(name: str, kind: type[Section]) -> str | None:
    """The key, in dotted form, that another tool or a section here calls by a name; None when there is none."""
    keys = list(all_keys(kind))
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    return next((key for key in OTHER_NAMES.get(name, ()) if key in keys), elsewhere[0] if elsewhere else None)


def _meant(location: tuple[int | str, ...], kind: type[Section]) -> str:
    """ "; did you mean '…'?" for an unknown key.

    Suggests the key for another tool's name, the same name in another section, or the nearest key.
    """
    name, prefix = str(location[-1]), "".join(f"{part}." for part in location[:-1])
    found = key_meant(name, kind)
    if found is not None:
        return f"; did you mean '{found}'?"
    beside = [key.removeprefix(prefix) for key in all_keys(kind) if key.startswith(prefix)]
    return nearest(name, [key for key in beside if "." not in key])


def _section(annotation: Any) -> type[Section] | None:
    choices = getattr(annotation, "__args__", (annotation,))
    return next((each for each in choices if isinstance(each, type) and issubclass(each, Section)), None)
