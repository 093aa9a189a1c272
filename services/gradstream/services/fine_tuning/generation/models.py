"""Keeps the models that can generate, and loads them into memory.

A model is a base, or an adapter on a base; models of one base share it. Bases and adapters are loaded when they are
first requested. The least recently requested ones are unloaded to make room.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError, nearest, one_line
from gradstream.core.foreign import panics_caught
from gradstream.core.model.model import load_config
from gradstream.core.pretrained.tokenizer import end_ids, end_ids_in
from gradstream.core.recipe.fine_tuning import Base, LoraConfig
from gradstream.services.fine_tuning.generation.resident import (
    NO_ADAPTER,
    BaseTensors,
    ResidentBase,
    base_bytes,
    check_fits,
    max_positions,
    position_bytes,
)

MAX_KNOWN_BASES = 16
_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class Served:
    """A model that can generate."""

    name: str
    base: Base
    lora: LoraConfig | None
    weights: Mapping[str, torch.Tensor]
    adapter: str  # its name within the base; unique, so a model that replaces another gets a name of its own


@dataclass(frozen=True)
class BaseFacts:
    """Facts of a base that are needed before and after the computation."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    max_positions: int | None  # None: no bound
    vocab_size: int
    end_ids: frozenset[int]  # tokens that end a text
    position_bytes: int  # of the keys and values of one token of one row


@dataclass(frozen=True)
class ResidentLimits:
    """Limits of the models in memory."""

    bases_bytes: int = 8 << 30
    max_adapters: int = 8
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable


class ServedModels:
    """The models, by name. Any thread may add, remove and look up; one thread acquires and releases."""

    def __init__(
        self,
        open_base: Callable[[Base], BaseTensors],
        load_tokenizer: Callable[[Base], Any],
        limits: ResidentLimits | None = None,
    ):
        """`open_base` and `load_tokenizer` are gradstream.core.pretrained.base's BaseReader and load_tokenizer."""
        self.limits = limits or ResidentLimits()
        self._open_base = open_base
        self._load_tokenizer = load_tokenizer
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self._facts_lock = threading.Lock()
        self._known_facts: OrderedDict[str, BaseFacts] = OrderedDict()
        self._num_bytes: dict[str, int] = {}
        # Both are ordered by their last request, oldest first.
        self._bases: OrderedDict[str, ResidentBase] = OrderedDict()
        self._adapters: OrderedDict[str, ResidentBase] = OrderedDict()

    def add_base(self, name: str, base: Base) -> None:
        """Serve a base, or the whole model of a full fine-tuning, under `name`. Replaces a model of that name."""
        self._add(Served(name, base, None, {}, NO_ADAPTER))

    def add_adapter(self, name: str, base: Base, lora: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """Serve an adapter on a base under `name`. Replaces a model of that name.

        The compute thread reads `weights` when it loads the adapter, possibly more than once. So a mapping that reads
        from a checkpoint holds no memory until then.
        """
        self._add(Served(name, base, lora, weights, f"adapter_{next(_NUMBERS)}"))

    def _add(self, served: Served) -> None:
        with self._lock:
            self._served[served.name] = served

    def remove(self, name: str) -> None:
        """Remove a model. Generations with it that are under way go on."""
        with self._lock:
            self._served.pop(name, None)

    def names(self) -> list[str]:
        """The names of the models that can generate."""
        with self._lock:
            return sorted(self._served)

    def find(self, name: str) -> Served:
        """Find a model by its name. Raises ConfigError when there is none."""
        with self._lock:
            served = self._served.get(name)
            if served is not None:
                return served
            known = sorted(self._served)
        listed = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
        raise ConfigError(f"no model '{name}' can generate{nearest(name, known)}; there are: {listed or 'none yet'}")

    def facts(self, served: Served) -> BaseFacts:
        """Return a model's tokenizer and bounds, without loading its weights. Blocking: it reads files."""
        key = f"{served.base.sha256} {served.base.tokenizer_key}"
        with self._facts_lock:
            facts = self._known_facts.get(key)
        if facts is None:
            # Without the lock: a slow or hanging storage must not delay callers for other bases.
            config = self._open_base(served.base).config
            facts = _facts_of(config, self._load_tokenizer(served.base), self.limits.dtype)
        with self._facts_lock:
            self._known_facts[key] = facts
            self._known_facts.move_to_end(key)
            if len(self._known_facts) > MAX_KNOWN_BASES:
                self._known_facts.popitem(last=False)
        return facts

    def acquire(self, served: Served) -> ResidentBase | None:
        """Load a model, and keep it in memory until each `acquire` was followed by a `release`.

        Returns None while models in use leave no room for it. Raises ConfigError or CheckpointError when the model
        cannot be loaded.
        """
        try:
            with panics_caught():
                resident = self._resident(served)
                if resident is None or not self._adapter_resident(served, resident):
                    return None
        except GradstreamError:
            raise
        except Exception as error:  # any error of its files ends this request, not the compute thread
            raise CheckpointError(f"model '{served.name}' cannot be loaded ({one_line(error)})") from error
        resident.num_users += 1
        if served.lora is not None:
            resident.adapter_users[served.adapter] += 1
        return resident

    def release(self, served: Served, resident: ResidentBase) -> None:
        """Release a model that `acquire` returned."""
        resident.num_users -= 1
        if served.lora is not None:
            resident.adapter_users[served.adapter] -= 1

    def resident_bases(self) -> list[ResidentBase]:
        """The bases in memory, the least recently requested first."""
        return list(self._bases.values())

    def resident_adapters(self) -> list[str]:
        """The adapters in memory by their own names, the least recently requested first."""
        return list(self._adapters)

    def _resident(self, served: Served) -> ResidentBase | None:
        key = served.base.sha256
        if key not in self._bases:
            # While there is no room this is called between any two tokens, so the files are opened only once.
            if key not in self._num_bytes:
                self._num_bytes[key] = base_bytes(self._open_base(served.base).config, self.limits.dtype)
            check_fits(self._num_bytes[key], self.limits.bases_bytes, served.base.title or served.base.path)
            if not self._make_room(self._num_bytes[key]):
                return None
            self._bases[key] = ResidentBase(self._open_base(served.base), self.limits.dtype, self.limits.device)
        self._bases.move_to_end(key)
        return self._bases[key]

    def _make_room(self, num_bytes: int) -> bool:
        excess = sum(base.num_bytes for base in self._bases.values()) + num_bytes - self.limits.bases_bytes
        leaving: list[str] = []
        for key, base in self._bases.items():
            if excess > 0 and base.num_users == 0:
                leaving.append(key)
                excess -= base.num_bytes
        if excess > 0:
            return False
        for key in leaving:
            gone = self._bases.pop(key)
            for adapter in gone.adapter_users:
                self._adapters.pop(adapter, None)
        if leaving:
            del base, gone
            gc.collect()  # frees modules in reference cycles at once
        return True

    def _adapter_resident(self, served: Served, resident: ResidentBase) -> bool:
        if served.lora is None:
            return True
        if served.adapter not in self._adapters:
            if len(self._adapters) >= self.limits.max_adapters:
                idle = (name for name, base in self._adapters.items() if base.adapter_users[name] == 0)
                name = next(idle, None)
                if name is None:
                    return False
                self._adapters.pop(name).remove_adapter(name)
            resident.add_adapter(served.adapter, served.lora, served.weights)
            self._adapters[served.adapter] = resident
        self._adapters.move_to_end(served.adapter)
        return True


def _facts_of(config: Mapping[str, Any], tokenizer: Any, dtype: torch.dtype) -> BaseFacts:
    # For a chat model, the tokenizer may name the token that ends a turn, and the config the one that ends a document.
    ends = end_ids(tokenizer) | {*end_ids_in(config)}
    each = position_bytes(load_config(config), dtype)
    return BaseFacts(tokenizer, max_positions(config), int(config["vocab_size"]), ends, each)
