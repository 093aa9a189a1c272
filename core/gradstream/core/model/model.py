"""Models: inventory, initial weights and forward units of any decoder-only `transformers` model.

torch and transformers are imported inside the functions, because their import is slow.

A forward unit is a part of the model that the forward pass needs at once: the embedding, each decoder layer, the final
norm, the head. Units are found by structure, not by name: the elements of the first nn.ModuleList, and the largest
modules that contain no such list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError, nearest, one_line
from gradstream.core.kernels import preload as kernels_preload
from gradstream.core.model.check import explain_padding
from gradstream.core.model.construction import (
    GENERATOR_LOCK,
    check_set,
    initialize,
    restore_values,
    seed_generators,
    without_weights,
)
from gradstream.core.model.lora import add_adapters, initial_adapter, is_from_base
from gradstream.core.plan.fragments import Tensor, TensorKind
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.model_config import check_fields

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_LAYERS = 1024
_WRONG_KIND = re.compile(r"Field '(?P<key>\w+)' expected (?P<expected>[^,]+), got \w+ \(value: (?P<value>.*)\)")
"""The message with which a config class of transformers refuses a value of another type."""
_KINDS = {
    "int": "a whole number without point or exponent",
    "float": "a number with a point, as 1.0",
    "bool": "true or false",
    "str": "a text",
}


def preload() -> None:
    """Import torch and transformers and compile the codecs' kernels now.

    This holds the interpreter lock for seconds. A node therefore does it before it begins to send heartbeats.
    """

    kernels_preload.preload()
    # masking_utils imports torch's compiler, which every decoder needs.
    from transformers import AutoModelForCausalLM, masking_utils  # noqa: F401


def load_config(model_config: Mapping[str, Any]) -> Any:
    """Make the transformers config object of a config.json. Raises ConfigError when it is not valid."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        check_fields(model_config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    fields = dict(model_config)
    _refuse_foreign_code(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"model.config.model_type {model_type!r} is not known to transformers"
            f"{nearest(str(model_type), CONFIG_MAPPING_NAMES)}"
        )
    try:
        config = AutoConfig.for_model(model_type, **fields)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    except Exception as error:  # transformers' config classes raise errors of many types for wrong values
        if kind := _WRONG_KIND.search(str(error)):
            expected = _KINDS.get(kind["expected"], kind["expected"])
            raise ConfigError(
                f"model.config.{kind['key']} is {kind['value']}, and {model_type} expects {expected}; correct it"
            ) from None
        raise ConfigError(f"model.config is not a valid {model_type} config: {one_line(error)}") from None
    if isinstance(num_layers, int) and not 0 < num_layers <= MAX_LAYERS:
        raise ConfigError(f"model.config has {num_layers} layers; 1 to {MAX_LAYERS} can be built")
    return config


def _refuse_foreign_code(fields: dict[str, Any]) -> None:
    """Raise ConfigError for a config that names code to download.

    Where transformers has a class of its own for the model type, the key that names such code is removed and
    transformers' class is used.
    """
    fields.pop("auto_map", None)
    _refuse_implementations(fields, "model.config")


def _refuse_implementations(value: Any, where: str) -> None:
    """Raise ConfigError if a config, or one within it, names an implementation that would be downloaded."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if str(key).endswith("_implementation") and "/" in str(inner):
            raise ConfigError(f"{where}.{key} names code from elsewhere, which is never run; remove it")
        _refuse_implementations(inner, f"{where}.{key}")


def build(
    model_config: Mapping[str, Any], device: str = "cpu", lora: LoraConfig | None = None, seed: int = 0
) -> nn.Module:
    """Build the causal language model on `device` ("meta" for only its shapes), with the adapters of `lora`, if given.

    With adapters, only these require gradients. Random values of constructors on the meta device depend on `seed`.
    Raises ConfigError when the model cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model_config)

    def construct() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return model

    try:
        if device == "meta":
            model = without_weights(construct, seed)
        else:
            with torch.device(device):
                model = construct()
    except Exception as error:  # as with the config classes
        why = explain_padding(config, model_config) or f"model.config cannot be built: {one_line(error)[:300]}"
        raise ConfigError(why) from None
    if lora is not None:
        add_adapters(model, lora)
    return model


def hidden_size(model: nn.Module) -> int:
    """Number of elements for each token in the activations between layers."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def router_loss_factor(model: nn.Module) -> float:
    """The factor of a model's `aux_loss` in its training loss, as in transformers.

    It is 0 unless the config sets output_router_logits.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def forward_units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The forward units with their names, in order of definition, which in decoders is the order of use."""
    from torch import nn

    def has_list(module: nn.Module) -> bool:
        return any(isinstance(child, nn.ModuleList) for child in module.modules())

    units: list[tuple[str, nn.Module]] = []

    def walk(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.ModuleList):
                units.extend((f"{path}.{index}", layer) for index, layer in enumerate(child))
            elif has_list(child):
                walk(path, child)
            else:
                units.append((path, child))

    walk("", model)
    return units


def check_units(model: nn.Module) -> None:
    """Raise ConfigError when a trained parameter lies outside every forward unit."""
    inside = {id(parameter) for _, unit in forward_units(model) for parameter in unit.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise ConfigError(
                f"model.config: parameter '{name}' lies outside every layer; this model family is not supported"
            )


class UnitDraws:
    """Seeds the generator for dropout before each forward unit, from `key` and the unit's name.

    A unit's random values therefore do not depend on the units that the same process ran before it: a model gives the
    same bits with any cut into stages. Set `key` before each pass, also before a backward pass, which may recompute.
    """

    def __init__(self, model: nn.Module, seed: int):
        self.key: tuple[object, ...] = ()
        self._seed = seed
        for name, unit in forward_units(model):
            unit.register_forward_pre_hook(partial(self._begin, name))

    def _begin(self, name: str, *_: object) -> None:
        seed_generators(derive_seed(self._seed, *self.key, name))


def inventory(model_config: Mapping[str, Any], lora: LoraConfig | None = None) -> list[Tensor]:
    """The model's trained tensors in forward order, found on the meta device: all, or only those of its adapters.

    Tied tensors appear once, under their first name.

    Weight decay applies to tensors of two or more dimensions: not to norms and biases.
    """
    return inventory_of(build(model_config, "meta", lora))


def inventory_of(model: nn.Module) -> list[Tensor]:
    """The inventory of a model that is already built."""
    from torch import nn

    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, (_, unit) in enumerate(forward_units(model)):
        for parameter in unit.parameters():
            first.setdefault(id(parameter), index)
            last[id(parameter)] = index
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }

    head: Any = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)

    def kind(parameter: nn.Parameter) -> TensorKind:
        if parameter.dim() < 2:
            return "vector"
        if id(parameter) in tables:
            return "embedding"
        return "head" if parameter is head else "matrix"

    # A parameter outside all units is needed from the start.
    tensors = [
        Tensor(
            name,
            tuple(parameter.shape),
            parameter.dim() >= 2,
            first.get(id(parameter), 0),
            kind(parameter),
            last.get(id(parameter), 0),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return sorted(tensors, key=lambda tensor: tensor.unit)


def initial_weights(
    model_config: Mapping[str, Any], seed: int, wanted: set[str] | None = None, lora: LoraConfig | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, fp32 tensor) with the initial weights of every wanted trained tensor (all when None).

    Adapters are drawn one tensor at a time, from (seed, tensor). Otherwise the model's own initialization runs one
    forward unit at a time, each with a generator seeded from (seed, unit). The values therefore do not depend on the
    wanted tensors, and a process has at most one unit in memory beside the tensors that it keeps.
    """
    import torch

    if lora is not None:
        for tensor in inventory(model_config, lora):
            if wanted is None or tensor.name in wanted:
                yield tensor.name, initial_adapter(tensor.name, tensor.shape, derive_seed(seed, "init", tensor.name))
        return
    model = build(model_config, "meta", seed=derive_seed(seed, "init"))
    seen: set[str] = set()
    # A tied parameter has several names; named_parameters gives only the first one, as the inventory does.
    first_name = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_units(model)
    units = forward_units(model)
    names = [
        {
            local: first_name[id(parameter)]
            for local, parameter in unit.named_parameters()
            if id(parameter) in first_name
        }
        for _, unit in units
    ]
    for (unit_name, unit), local_names in zip(units, names, strict=True):
        fresh = {local: name for local, name in local_names.items() if name not in seen}
        seen.update(fresh.values())
        if not fresh or (wanted is not None and wanted.isdisjoint(fresh.values())):
            continue
        unit.to_empty(device="cpu")
        for module in unit.modules():
            restore_values(module)
        with GENERATOR_LOCK, torch.random.fork_rng(devices=[]), torch.no_grad():
            seed_generators(derive_seed(seed, "init", unit_name))
            initialize(_model_of(model, unit_name), unit)
        parameters = dict(unit.named_parameters())
        for local, name in fresh.items():
            if wanted is None or name in wanted:
                check_set(name, parameters[local])
                yield name, parameters[local].detach()
        unit.to_empty(device="meta")


def _model_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost transformers model that contains the module `name`. It sets the initial values of the module."""
    from transformers import PreTrainedModel

    owner = part = model
    for step in name.split(".")[:-1]:
        part = part.get_submodule(step)
        owner = part if isinstance(part, PreTrainedModel) else owner
    return owner


def initialize_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Move a model that was built on the meta device to `device`, and set its buffers and constants.

    Values that constructors set or compute from the config (rotary frequencies) are restored. Trained parameters are
    left uninitialized. With adapters, parameters of the base stay where they are. Raises ConfigError for a constant
    that nothing sets.
    """
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    def is_constant(tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, nn.Parameter) or not (tensor.requires_grad or is_from_base(tensor))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if is_from_base(tensor) else torch.empty_like(tensor, device=device)

    def set_buffers(part: nn.Module, module: nn.Module) -> None:
        part = module if isinstance(module, PreTrainedModel) else part
        for child in module.children():
            set_buffers(part, child)
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(is_constant(tensor) for tensor in own):
            restore_values(module, is_constant)
            part._init_weights(module)  # type: ignore[operator]

    model._apply(moved)  # type: ignore[no-untyped-call]  # as nn.Module.to_empty, which cannot leave out tensors
    with GENERATOR_LOCK, torch.random.fork_rng(devices=[]), torch.no_grad():
        seed_generators(0)  # the same constants on every node
        set_buffers(model, model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_constant(tensor):
            check_set(name, tensor)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values with a stable text form."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
