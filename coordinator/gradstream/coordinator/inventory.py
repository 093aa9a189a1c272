"""The model inventory, taken in a child process.

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

from gradstream.core.errors import ConfigError
from gradstream.core.fragments import Tensor

TIMEOUT_SECONDS = 300.0
MAX_CACHED = 32


@dataclass(frozen=True)
class Inventory:
    """A model's tensors in forward order, and the name of its transformers class."""

    tensors: tuple[Tensor, ...]
    architecture: str


_cache: dict[str, Inventory] = {}


async def take_inventory(model_config: Mapping[str, Any]) -> Inventory:
    """The inventory of a config.json's contents. Raises ConfigError when transformers cannot build it."""
    key = json.dumps(model_config, sort_keys=True)
    if key not in _cache:
        found = await _ask_child(key)
        while len(_cache) >= MAX_CACHED:
            _cache.pop(next(iter(_cache)))
        _cache[key] = found
    return _cache[key]


async def _ask_child(model_config_json: str) -> Inventory:
    # subprocess in a thread, not asyncio's: under uvloop that forks, and a fork beside gRPC's threads crashed 7 of 120
    # children (see docs/decisions.md).
    try:
        child = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "gradstream.core.model"],
            input=model_config_json.encode(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"model.config: no model was built within {TIMEOUT_SECONDS:.0f} s; is it far too large?"
        ) from None
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        cause = last or f"the process that builds it ended with status {child.returncode}"
        raise ConfigError(f"model.config: the model cannot be built ({cause})") from None
    if "error" in answer:
        raise ConfigError(answer["error"])
    tensors = tuple(Tensor(name, tuple(shape), *rest) for name, shape, *rest in answer["tensors"])
    return Inventory(tensors, answer["architecture"])
