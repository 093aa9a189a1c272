"""The constants of a model: tensors that are saved but never trained, which an export needs beside a checkpoint.

When a file lacks them, transformers sets most of them itself. In FAMILIES only a constructor sets them, and
transformers loses a constructor's values when it loads a model: without them in the file, the model would compute with
uninitialized memory. A child process finds them, because importing transformers holds the interpreter lock for seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

FAMILIES = frozenset({"apertus"})
"""Model types whose exports need their constants. A test searches for others."""
TIMEOUT_SECONDS = 300.0


def exported_constants(model_config: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """The constants that an export needs, by name. Raises ConfigError when the model cannot be built."""
    import numpy as np

    if model_config.get("model_type") not in FAMILIES:
        return {}
    found: dict[str, Any] = json.loads(_ask_child(json.dumps(model_config, sort_keys=True)))
    if "error" in found:
        raise ConfigError(found["error"])
    return {name: np.array(values, dtype=np.float32).reshape(shape) for name, (shape, values) in found.items()}


@lru_cache(maxsize=4)
def _ask_child(config_json: str) -> str:
    child = subprocess.run(
        [sys.executable, "-m", "gradstream.core.model.constants"],
        input=config_json,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if child.returncode:
        raise ConfigError(f"model.config: the model's constants cannot be found ({child.stderr.strip()[-200:]})")
    return child.stdout


def constants(model_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The constants of a model by name, fp32: the tensors of its state that are not trained parameters."""
    from gradstream.core.model.model import build, initialize_buffers

    model = build(model_config, "meta")
    initialize_buffers(model, "cpu")
    return constants_of(model)


def constants_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The constants of a model after `initialize_buffers`."""
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return {name: tensor.float() for name, tensor in model.state_dict().items() if name not in trained}


def _main() -> None:
    try:
        found = constants(json.load(sys.stdin))
        answer: dict[str, Any] = {
            name: [list(tensor.shape), tensor.flatten().tolist()] for name, tensor in found.items()
        }
    except ConfigError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
