"""Low-rank adapters on a model, made by peft: their modules, tensor names and initial values.

With adapters, only the adapters' tensors are trained: `….q_proj.lora_A.default.weight`, of shape (rank, inputs), and
`….q_proj.lora_B.default.weight`, (outputs, rank). A module with an adapter becomes a module of peft, and its frozen
weight is then named `….q_proj.base_layer.weight`.

torch and peft are imported inside the functions, because their import is slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError, one_line
from gradstream.core.recipe.fine_tuning import LoraConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "default"
_IN, _OUT = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
MAX_NAMES = 20
_FROM_BASE = "_gradstream_from_base"


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Add adapters to the model, in place, on its device and without values; freeze all other parameters.

    Raises ConfigError when a target matches no module, or one that cannot have an adapter. The message names those that
    can.
    """
    import peft
    import torch

    freeze(model)
    config = peft_config(lora, model)
    targets = list(config.target_modules)  # before peft changes it
    try:
        with torch.device(next(model.parameters()).device):
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:  # the family's code never calls such a module
        raise ConfigError(
            f"lora.target_modules: peft puts no adapter there ({one_line(error).split('. ')[0][:200]}); name other "
            f"modules, or use method: full"
        ) from None
    wanted, found = set(targets), {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if wanted != found:
        raise ConfigError(
            f"lora.target_modules: peft puts the adapters of {_kinds(sorted(wanted - found))} elsewhere "
            f"({', '.join(sorted(found - wanted)[:3]) or 'nowhere'}), as on fused experts, which is not supported; "
            f"name other modules, or use method: full"
        )


def peft_config(lora: LoraConfig, model: nn.Module) -> Any:
    """peft's LoraConfig for a transformers model on any device, of which only the architecture matters.

    Raises ConfigError as `add_adapters` does.
    """
    import peft

    targets = target_modules(model, lora)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets,
        fan_in_fan_out=any(is_transposed(module) for module in model.modules()),
        # `initial_adapter` draws the initial values instead of peft.
        init_lora_weights=False,
    )


def target_modules(model: nn.Module, lora: LoraConfig) -> list[str]:
    """The full names of the modules that get an adapter, in the order of definition."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    if lora.target_modules == "all-linear":
        return [name for name, module in linear.items() if module is not head]
    every = dict(model.named_modules())
    found: set[str] = set()
    for target in lora.target_modules:
        matched = {name for name in every if name == target or name.endswith(f".{target}")}
        usable = matched & linear.keys()
        if not usable:
            what = "is not a linear module" if matched else "matches no module of the model"
            raise ConfigError(
                f"lora.target_modules: '{target}' {what}; those that can have an adapter are {_kinds(linear)}, or say "
                f"all-linear"
            )
        for name in usable:
            if f"{name}.weight" in tied:
                raise ConfigError(
                    f"lora.target_modules: '{name}' shares its weight with the embedding ({tied[f'{name}.weight']}), "
                    f"so an adapter on it could not be merged; leave it out"
                )
        found |= usable
    return [name for name in linear if name in found]


def freeze(model: nn.Module) -> None:
    """Freeze a model's parameters, and mark them as coming from a base."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            vars(parameter)[_FROM_BASE] = True
    model.requires_grad_(False)


def is_from_base(tensor: torch.Tensor) -> bool:
    """Whether `freeze` froze the tensor, whose values are then the base's.

    A tensor that was frozen before is a constant: the family's code sets it, and no base has it.
    """
    return _FROM_BASE in vars(tensor) and not tensor.requires_grad


def _kinds(names: Iterable[str]) -> str:
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    more = f" and {len(kinds) - MAX_NAMES} more" if len(kinds) > MAX_NAMES else ""
    return ", ".join(kinds[:MAX_NAMES]) + more


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The initial values of an adapter's tensor, fp32, as in peft and Hu et al., 2021.

    A is uniform as in torch's linear layers and B is zero, so the model begins equal to its base.
    """
    import torch

    if name.endswith(_OUT):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[-1])
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def frozen_name(name: str) -> str:
    """A frozen tensor's name in the base: without the part that peft's module adds."""
    return name.replace(".base_layer.", ".")


def adapted_module(name: str) -> str | None:
    """The module whose adapter has a trained tensor; None for a tensor that is not part of an adapter."""
    for suffix in (_IN, _OUT):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def factors(module: str) -> tuple[str, str]:
    """The names of the A and B of a module's adapter."""
    return module + _IN, module + _OUT


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lora: LoraConfig, module: nn.Module) -> Any:
    """W + scaling * B @ A in W's dtype, computed in fp32. The product is transposed if W's module is a Conv1D."""
    product = b @ a
    if is_transposed(module):
        product = product.T
    return (weight.float() + product * lora.scaling).to(weight.dtype)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, as in GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"
