"""The model's inventory and the profile of its sections, taken in a child process.

Importing transformers holds the interpreter for seconds; in the coordinator's own process that stalls heartbeats (7
to 19 s were seen). A child also gives back its memory, and cannot take the coordinator down with it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradstream.core import profile
from gradstream.core.config import TrainingConfig
from gradstream.core.errors import ConfigError
from gradstream.core.finetuning import LoraConfig
from gradstream.core.fragments import Tensor
from gradstream.core.profile import SectionProfile, Workload

TIMEOUT_SECONDS = 300.0
MAX_CACHED = 32


@dataclass(frozen=True)
class Inventory:
    """A model's trained tensors in forward order, the name of its transformers class, and how many parameters are
    frozen."""

    tensors: tuple[Tensor, ...]
    architecture: str
    num_frozen_parameters: int


_inventories: dict[str, Inventory] = {}
_profiles: dict[str, list[SectionProfile]] = {}


async def take_inventory(model_config: Mapping[str, Any], lora: LoraConfig | None = None) -> Inventory:
    """The inventory of a config.json's contents, with adapters those are what is trained. Raises ConfigError when
    transformers cannot build it."""
    key = _question(model_config, lora)
    if key not in _inventories:
        answer = await _ask_child("gradstream.core.model", key, "built")
        if "error" in answer:
            raise ConfigError(answer["error"])
        _keep(_inventories, key, _parse(answer))
    return _inventories[key]


async def take_profile(
    model_config: Mapping[str, Any], training: TrainingConfig, lora: LoraConfig | None = None
) -> list[SectionProfile]:
    """What each section of a model costs on this machine; the same again for as long as this process lives. The child
    that measures tells the inventory as well: `take_inventory` needs none of its own after it.

    Raises ConfigError when transformers cannot build the model, or when it cannot be cut into sections.
    """
    key = profile.question(model_config, Workload.of(training), lora)
    if key not in _profiles:
        answer = await _ask_child("gradstream.core.profile", key, "profiled")
        found = profile.parse_answer(answer)
        _keep(_inventories, _question(model_config, lora), _parse(answer["inventory"]))
        _keep(_profiles, key, found)
    return _profiles[key]


def _question(model_config: Mapping[str, Any], lora: LoraConfig | None) -> str:
    """What `python -m gradstream.core.model` reads: the same text for the same inventory."""
    adapters = lora.model_dump(mode="json") if lora is not None else None
    return json.dumps({"config": model_config, "lora": adapters}, sort_keys=True)


def _parse(answer: Mapping[str, Any]) -> Inventory:
    tensors = tuple(Tensor(name, tuple(shape), *rest) for name, shape, *rest in answer["tensors"])
    return Inventory(tensors, answer["architecture"], answer["num_frozen_parameters"])


def _keep(cache: dict[str, Any], key: str, found: Any) -> None:
    while len(cache) >= MAX_CACHED:
        cache.pop(next(iter(cache)))
    cache[key] = found


async def _ask_child(module: str, question: str, done: str) -> dict[str, Any]:
    # subprocess in a thread, not asyncio's: under uvloop that forks, and a fork beside gRPC's threads crashed 7 of 120
    # children (see docs/decisions.md).
    try:
        child = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", module],
            input=question.encode(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"model.config: no model was {done} within {TIMEOUT_SECONDS:.0f} s; is it far too large?"
        ) from None
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        cause = last or f"the process that does it ended with status {child.returncode}"
        raise ConfigError(f"model.config: the model cannot be {done} ({cause})") from None
    return answer
