"""The model inventory, taken in a child process.

Importing transformers holds the interpreter for seconds; in the coordinator's own process that stalls heartbeats (7
to 19 s were seen). A child also gives back its memory, and cannot take the coordinator down with it.
"""

from __future__ import annotations

import asyncio
import json
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
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gradstream.core.model",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(child.communicate(model_config_json.encode()), TIMEOUT_SECONDS)
    except TimeoutError:
        raise ConfigError(
            f"model.config: no model was built within {TIMEOUT_SECONDS:.0f} s; is it far too large?"
        ) from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        answer = json.loads(out)
    except ValueError:
        last = errors.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise ConfigError(
            f"model.config: the model cannot be built ({last or f'exit status {child.returncode}'})"
        ) from None
    if "error" in answer:
        raise ConfigError(answer["error"])
    tensors = tuple(Tensor(name, tuple(shape), decay, unit) for name, shape, decay, unit in answer["tensors"])
    return Inventory(tensors, answer["architecture"])
