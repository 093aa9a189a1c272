"""Construction of a model without its weights, but with the values that only its constructors set.

On torch's meta device a constructor's values are lost: rotary frequencies, masks, and trained parameters such as those
of Apertus' activation, which `_init_weights` of transformers does not set. Here memory for weights (torch.empty) is not
allocated, as on the meta device, but every other tensor of a constructor is real. It is kept beside the module that
owns it until the module gets its memory.

torch is imported inside the functions, because its import is slow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

GENERATOR_LOCK = threading.Lock()
"""Guards the process's random generator, from which transformers draws. A shard that was dropped while it loaded may
still draw in its thread when the next one begins."""
MAX_KEPT_ELEMENTS = 1 << 24
"""Largest tensor of a constructor, in elements, that is allocated."""
_KEPT = "_constructed"


def without_weights(construct: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Call `construct`, with all parameters and buffers of the module on the meta device.

    Random values of constructors depend only on `seed`, and the process's generator is not changed.
    """
    import torch

    with GENERATOR_LOCK, torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        try:
            with torch.device("meta"), _real_values():
                module = construct()
        except (RuntimeError, NotImplementedError):  # the constructor computes with weights, which have no values here
            with torch.device("meta"):
                return construct()
    _keep_values(module)
    return module


def seed_generators(seed: int) -> None:
    """Seed the generators from which models draw, as torch.manual_seed does.

    torch.manual_seed also records its caller, which takes ten times as long.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _real_values() -> Iterator[None]:
    """Make tensors that have values on the CPU, inside torch.device("meta")."""
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    valued = {torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.eye, torch.arange}
    valued |= {torch.linspace, torch.logspace, torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
    valued |= {torch.randperm, torch.tril_indices, torch.triu_indices}
    drawn = {torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_}
    drawn |= {init.kaiming_uniform_, init.kaiming_normal_, init.xavier_uniform_, init.xavier_normal_, init.ones_}
    drawn |= {init.zeros_, init.constant_, torch.Tensor.fill_, torch.Tensor.zero_}

    class RealValues(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            target = args[0] if args else kwargs.get("tensor")
            if func in drawn and isinstance(target, torch.Tensor) and target.is_meta:
                return target  # a tensor on the meta device has no values to write, and the call would be slow there
            if func in valued and kwargs.get("device") is None:
                # transformers reads the device of an empty tensor, and initializes nothing on the meta device.
                on_meta = func(*args, **{**kwargs, "device": "meta"})
                if not 0 < on_meta.numel() <= MAX_KEPT_ELEMENTS:
                    return on_meta
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    with RealValues():
        yield


def _keep_values(module: nn.Module) -> None:
    import torch
    from torch import nn

    meta: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        kept: dict[str, torch.Tensor] = {}
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta:
                    continue
                kept[name] = tensor.detach()
                if id(tensor) not in meta:
                    empty = torch.empty_like(tensor, device="meta")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        vars(empty).update(vars(tensor))
                    meta[id(tensor)] = empty
                tensors[name] = meta[id(tensor)]  # type: ignore[assignment]
        if kept:
            vars(owner)[_KEPT] = kept


def restore_values(module: nn.Module, wanted: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
    """Restore the values that the constructor gave to the tensors of `module`, without its children.

    A tensor that `_init_weights` has yet to set becomes NaN, or the smallest integer of its type. Tensors on the meta
    device, and those that are not `wanted`, are not changed.
    """
    import torch

    kept: dict[str, torch.Tensor] = vars(module).get(_KEPT, {})
    with torch.no_grad():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta or not wanted(tensor):
                    continue
                if name in kept and kept[name].shape == tensor.shape:
                    tensor.copy_(kept[name])
                else:
                    tensor.fill_(_unset(tensor.dtype))


def initialize(model: nn.Module, module: nn.Module) -> None:
    """Let transformers set the initial values of `module`, a part of `model`.

    Children come first, as in transformers, because a parent may rescale its children's values. A part that is itself
    a model sets its own values.
    """
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        model = module
    for child in module.children():
        initialize(model, child)
    model._init_weights(module)  # type: ignore[operator]


def check_set(name: str, tensor: torch.Tensor) -> None:
    """Raise ConfigError if an element of a tensor has not been set since `restore_values`."""
    import torch

    if tensor.is_floating_point() or tensor.is_complex():
        unset = bool(tensor.isnan().any())
    elif tensor.dtype == torch.bool:
        unset = False
    else:
        unset = tensor.numel() > 0 and bool((tensor == _unset(tensor.dtype)).all())
    if unset:
        raise ConfigError(
            f"model.config: nothing sets the initial value of '{name}', neither its module's constructor nor "
            f"transformers' _init_weights; this model family is not supported"
        )


def _unset(dtype: torch.dtype) -> Any:
    import torch

    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min
