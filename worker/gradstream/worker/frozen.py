"""The frozen base of fine-tuning jobs on a worker: read once, held in few bytes, used again by later jobs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Set

import torch
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.model.frozen_modules import Held, HeldMatrix, replace_frozen
from gradstream.core.model.lora import frozen_name
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.recipe.fine_tuning import Base


class BaseStore:
    """Holds tensors of one base: the one that a job requested last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, Held, str] | None = None
        self._matrices: dict[str, HeldMatrix] = {}
        self._vectors: dict[str, torch.Tensor] = {}

    def keep(self, names: Set[str]) -> None:
        """Release all tensors but these: tensors of another base, and of stages that this worker no longer has."""
        with self._lock:
            self._matrices = {name: matrix for name, matrix in self._matrices.items() if name in names}
            self._vectors = {name: vector for name, vector in self._vectors.items() if name in names}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this process holds."""
        matrices = sum(matrix.num_bytes for matrix in self._matrices.values())
        return matrices + sum(vector.nbytes for vector in self._vectors.values())

    def fill(self, model: nn.Module, base: Base, held: Held, device: torch.device) -> set[str]:
        """Fill a model's frozen parameters, which are on the meta device, with the base's values.

        Returns the names of the base's tensors that the model has. Tensors that an earlier job left here are used
        again. Raises CheckpointError when the base cannot be read or is not the one that the job was made with, and
        ConfigError when the model has a tensor that the base lacks.
        """
        with self._lock:
            key = (base.sha256, held, str(device))
            if self._key != key:
                self._matrices, self._vectors, self._key = {}, {}, key
            reader = BaseReader(base)
            tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
            names = set(reader.names())

            def source(name: str, parameter: nn.Parameter) -> str:
                name = frozen_name(name)
                name = name if name in names else tied.get(name, name)
                if name not in names or tuple(reader.shape(name)) != tuple(parameter.shape):
                    raise ConfigError(
                        f"the base {base.title} has no tensor '{name}' of shape {list(parameter.shape)}; install the "
                        f"same transformers version on every machine"
                    )
                return name

            def matrix(name: str) -> HeldMatrix:
                if name not in self._matrices:
                    self._matrices[name] = HeldMatrix.of(reader.tensor(name), held).to(device)
                return self._matrices[name]

            def vector(name: str) -> torch.Tensor:
                if name not in self._vectors:
                    self._vectors[name] = reader.tensor(name).to(device, torch.float32, copy=True)
                return self._vectors[name]

            return replace_frozen(model, source, matrix, vector)


STORE = BaseStore()
"""The store of this process."""
