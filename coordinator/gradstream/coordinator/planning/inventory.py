"""Take a model's inventory, and the profile of its segments, in a child process.

The import of transformers holds the interpreter for seconds. In the coordinator's own process this stalls heartbeats (7
to 19 s were seen). A child process also frees its memory at its end, and its crash does not end the coordinator.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradstream.core.data.manifest import Manifest
from gradstream.core.errors import ConfigError, DataError, one_line
from gradstream.core.model import check as model_check
from gradstream.core.model import profile
from gradstream.core.model.profile import SegmentProfile, Workload
from gradstream.core.model.trial import PLAIN_USE, ModelUse
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.recipe import Recipe, TrainingConfig
from gradstream.core.storage import files

TIMEOUT_SECONDS = 300.0
MAX_CACHED = 32


@dataclass(frozen=True)
class Inventory:
    """A model's trained tensors in forward order, its transformers class, and its number of frozen parameters.

    The other fields are for checks of the recipe (gradstream.core.model.check): the maximum sequence length with the
    config key that sets it, the tokens whose embeddings are never trained, the keys of the config that no code reads,
    and the error for a misspelt key.
    """

    tensors: tuple[Tensor, ...]
    architecture: str
    num_frozen_parameters: int
    positions: tuple[str, int] | None = None
    padding_ids: tuple[int, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    misspelt: str = ""


_inventories: dict[str, Inventory] = {}
_profiles: dict[str, list[SegmentProfile]] = {}
_under_way: dict[str, asyncio.Task[Inventory]] = {}


async def take_inventory(
    model_config: Mapping[str, Any], lora: LoraConfig | None = None, use: ModelUse = PLAIN_USE
) -> Inventory:
    """Take the inventory of the model of a config.json's contents. With `lora`, only the adapters are trained.

    Raises ConfigError when transformers cannot build the model, or when the model cannot be trained as `use` says
    (gradstream.core.model.trial).
    """
    key = _question(model_config, lora, use)
    if key in _inventories:
        return _inventories[key]
    # Simultaneous callers share one child. It goes on if a caller is cancelled, and later callers get its answer.
    task = _under_way.get(key)
    if task is None or task.get_loop() is not asyncio.get_running_loop():
        task = _under_way[key] = asyncio.create_task(_take_inventory(key))
        task.add_done_callback(lambda done: _forget(key, done))
    return await asyncio.shield(task)


def _forget(key: str, done: asyncio.Task[Inventory]) -> None:
    if _under_way.get(key) is done:
        del _under_way[key]
    if not done.cancelled():
        done.exception()  # retrieved, or asyncio logs it when no caller waits any more


async def _take_inventory(key: str) -> Inventory:
    answer = await _ask_child("gradstream.core.model.trial", key, "built")
    if "error" in answer:
        raise ConfigError(answer["error"])
    found = _parse(answer)
    _keep(_inventories, key, found)
    return found


async def take_profile(
    model_config: Mapping[str, Any],
    training: TrainingConfig,
    lora: LoraConfig | None = None,
    use: ModelUse = PLAIN_USE,
) -> list[SegmentProfile]:
    """Measure the cost of each segment of a model on this machine. The result is cached while this process lives.

    The child also returns the inventory. A later `take_inventory` then starts no child.

    Raises ConfigError as `take_inventory` does, or when the model cannot be cut into segments.
    """
    key = profile.question(model_config, Workload.of(training), lora, use)
    if key not in _profiles:
        answer = await _ask_child("gradstream.core.model.profile", key, "profiled")
        found = profile.parse_answer(answer)
        _keep(_inventories, _question(model_config, lora, use), _parse(answer["inventory"]))
        _keep(_profiles, key, found)
    return _profiles[key]


async def check_model(
    recipe: Recipe,
    manifest: Manifest | None,
    read_special: Callable[[], Awaitable[set[int]]],
) -> list[str]:
    """Build a recipe's model and check what would fail on a worker; return warnings on likely mistakes.

    `read_special` returns the data set's tokens that never come from text; it is called only if the model has padding
    tokens.

    Raises ConfigError when the model cannot be built or trained, a key of its config is misspelt, or its maximum length
    is below the recipe's. Raises DataError when its padding token occurs in the data.
    """
    found = await take_inventory(recipe.model.config, recipe.lora, ModelUse.of(recipe))
    model_type = recipe.model.config.get("model_type")
    model_check.check_positions(found.positions, recipe.training.sequence_length, model_type)
    warnings = model_check.recipe_warnings(recipe)
    if recipe.fine_tuning is not None:
        return warnings  # the config of a base is not for the recipe's author to correct
    if found.misspelt:
        raise ConfigError(found.misspelt)
    if manifest is not None and found.padding_ids:
        model_check.check_padding(found.padding_ids, manifest, await read_special())
    return [*model_check.unknown_warning(found.unknown_keys, model_type), *warnings]


def special_tokens(recipe: Recipe, manifest: Manifest) -> set[int]:
    """The ids of the added tokens of the data set's tokenizer, which never come from text. Raises DataError."""
    path = files.join(recipe.data.path, manifest.tokenizer_file)
    try:
        tokenizer = json.loads(files.read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the data set's {path} cannot be read ({one_line(error)}); prepare the data again") from None
    tokens = tokenizer.get("added_tokens") if isinstance(tokenizer, dict) else None
    return {token["id"] for token in tokens or () if isinstance(token, dict) and isinstance(token.get("id"), int)}


def _question(model_config: Mapping[str, Any], lora: LoraConfig | None, use: ModelUse) -> str:
    """The input of `python -m gradstream.core.model.trial`, and the cache key: equal for equal inventories."""
    adapters = lora.model_dump(mode="json") if lora is not None else None
    return json.dumps({"config": model_config, "lora": adapters, "use": asdict(use)}, sort_keys=True)


def _parse(answer: Mapping[str, Any]) -> Inventory:
    tensors = tuple(Tensor(name, tuple(shape), *rest) for name, shape, *rest in answer["tensors"])
    return Inventory(
        tensors,
        answer["architecture"],
        answer["num_frozen_parameters"],
        tuple(answer["positions"]) if answer["positions"] else None,
        tuple(answer["padding_ids"]),
        tuple(answer["unknown_keys"]),
        answer["misspelt"],
    )


def _keep(cache: dict[str, Any], key: str, found: Any) -> None:
    while len(cache) >= MAX_CACHED:
        cache.pop(next(iter(cache)))
    cache[key] = found


async def _ask_child(module: str, question: str, done: str) -> dict[str, Any]:
    # subprocess in a thread instead of asyncio.subprocess: with uvloop the latter forks, and a fork beside gRPC's
    # threads crashed 7 of 120 children (docs/decisions.md, 9).
    try:
        child = await asyncio.to_thread(_run_child, module, question)
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


def _run_child(module: str, question: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", module],
        input=question.encode(),
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
