"""Writes the model card of an export, for people who did not train the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from gradstream.core.recipe.fine_tuning import Base

UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Score:
    """A model's score on the held-out examples. `loss` in nats a target token; without prompts no exact matches."""

    loss: float
    perplexity: float
    num_prompts: int = 0
    num_exact: int = 0


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The training data: counts of examples, and the hex sha256 of each of their files."""

    num_train: int
    num_validation: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts on a card. None means not measured."""

    name: str
    version: int
    base: Base
    method: Literal["lora", "full"]
    recipe: Mapping[str, Any]
    data: DataFacts
    num_trained_parameters: int | None = None
    num_target_tokens: int | None = None
    before: Score | None = None
    after: Score | None = None
    description: str = ""


def model_card(facts: CardFacts, kind: Literal["adapter", "merged"]) -> str:
    """Write a README.md with the front matter that model hubs read. `kind` is the kind of the export."""
    adapter = kind == "adapter"
    front = {
        "base_model": facts.base.title,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gradstream", "fine-tuning", *(["lora"] if facts.method == "lora" else [])],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {facts.name}",
        _what(facts, adapter),
        facts.description.strip(),
        "## Figures",
        _figures(facts),
        "## Base",
        f"`{facts.base.path}`, sha256 `{facts.base.sha256}` (over its files' hashes and its config). Its license holds "
        f"for what was made of it.",
        "## Data",
        _data(facts.data),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(_plain(facts.recipe), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(facts: CardFacts, adapter: bool) -> str:
    how = "LoRA" if facts.method == "lora" else "full fine-tuning"
    what = f"An adapter for {facts.base.title}" if adapter else f"{facts.base.title}, adapted"
    load = (
        "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)`"
        if adapter
        else "`AutoModelForCausalLM.from_pretrained(directory)`"
    )
    card = f"{what}, by {how} with gradstream: version {facts.version} of the job's weights. Load it with {load}."
    if adapter and facts.base.kind == "checkpoint":
        card += (
            " The base is a checkpoint, which transformers does not read: `base` is what `gradstream ckpt export` "
            "makes of it. Or let `gradstream finetune export --merged` write a whole model."
        )
    return card


def _figures(facts: CardFacts) -> str:
    def exact(score: Score) -> str:
        return f"{score.num_exact} of {score.num_prompts}" if score.num_prompts else "no prompts"

    def column(score: Score | None) -> list[str]:
        return [UNKNOWN] * 3 if score is None else [f"{score.loss:.4f}", f"{score.perplexity:.3f}", exact(score)]

    names = ["loss (nats a target token)", "perplexity", "exact matches"]
    lines = ["| held-out examples | before | after |", "|---|---|---|"]
    rows = zip(names, column(facts.before), column(facts.after), strict=True)
    lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
    lines += ["", f"- parameters trained: {_count(facts.num_trained_parameters)}"]
    lines += [f"- target tokens trained on: {_count(facts.num_target_tokens)}", f"- energy: {UNKNOWN}"]
    return "\n".join(lines)


def _data(data: DataFacts) -> str:
    lines = [f"{data.num_train:,} examples to train on, {data.num_validation:,} held out.", ""]
    return "\n".join([*lines, *(f"- sha256 `{sha256}`" for sha256 in data.sha256)]).rstrip()


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _plain(value: Any) -> Any:
    """Convert a value to types of YAML's safe subset: a dumped model may hold tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
