"""A base in memory with its adapters. One batch may mix adapters.

Shape suffixes: B rows, T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.model.lora import freeze, is_from_base, peft_config
from gradstream.core.model.model import build, initialize_buffers
from gradstream.core.recipe.fine_tuning import LoraConfig

# peft's name for rows without an adapter.
NO_ADAPTER = "__base__"


class BaseTensors(Protocol):
    """The interface by which a base is read (gradstream.core.pretrained.base.BaseReader)."""

    @property
    def config(self) -> dict[str, Any]:
        """The contents of its config.json."""

    def names(self) -> list[str]:
        """The names of its tensors, as in transformers' model class; tied tensors once."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor in its stored dtype."""


class _RowAdapters:
    """The adapter of each row of the batch that is being computed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def hand_over(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of peft's layers: passes the rows' adapters, as peft's own models do in mixed batches."""
        return args, {**kwargs, "adapter_names": self.names}


class ResidentBase:
    """A base in memory. All adapters share its weights, which never change: adapters add to its modules' outputs."""

    def __init__(self, tensors: BaseTensors, dtype: torch.dtype, device: torch.device):
        """Reads the base one tensor at a time. Raises ConfigError or CheckpointError if it does not fit its config."""
        self.model = load_model(tensors, dtype, device)
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        self.num_users = 0
        self.adapter_users: dict[str, int] = {}
        self.position_bytes = position_bytes(self.model.config, dtype)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.attention_width = attention_width(self.model.config)
        self.device = device
        self._config = tensors.config
        self._rows = _RowAdapters()
        self._hooked: set[nn.Module] = set()

    def add_adapter(self, adapter: str, lora: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """Put an adapter on the base, under a name that no adapter has had before.

        `weights` are named like the trained tensors of a job (`….q_proj.lora_A.default.weight`); each is read once.
        Raises ConfigError when a target matches no module, and CheckpointError when the weights are not those of such
        an adapter. After an error the base is as before.
        """
        import peft
        from peft.tuners.lora import LoraLayer

        # From a bare model, because adapters on a model change the names of its modules.
        config = peft_config(lora, build(self._config, "meta"))
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config  # without this peft warns about a second adapter, which is intended
        try:
            peft.inject_adapter_in_model(config, self.model, adapter_name=adapter, low_cpu_mem_usage=True)
            _fill_adapter(self.model, adapter, weights, self.device)
        except BaseException:
            self.remove_adapter(adapter)
            raise
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, LoraLayer) and module not in self._hooked:
                module.register_forward_pre_hook(self._rows.hand_over, with_kwargs=True)
                self._hooked.add(module)
        self.adapter_users[adapter] = 0

    def remove_adapter(self, adapter: str) -> None:
        """Free an adapter's memory. Peft's layers stay and compute the base alone."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter([])  # otherwise peft activates another adapter and warns
                module.delete_adapter(adapter)
        self.adapter_users.pop(adapter, None)

    def logits(
        self,
        ids_BT: torch.Tensor,
        mask_BS: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: Any,
        adapters: Sequence[str],
    ) -> torch.Tensor:
        """Compute the logits after each row's last token, fp32 on the CPU, shape (B, V). `cache` grows by T columns.

        `mask_BS` is over the columns of the cache and the new ones. `adapters` names each row's adapter, or NO_ADAPTER.
        """
        self._rows.names = list(adapters)
        with torch.inference_mode():
            out = self.model(
                input_ids=ids_BT.to(self.device),
                attention_mask=mask_BS.to(self.device),
                position_ids=positions_BT.to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits_BV: torch.Tensor = out.logits[:, -1].float().cpu()
        return logits_BV


def load_model(tensors: BaseTensors, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a base as a model that computes in `dtype`, tensor by tensor. Tied weights stay tied.

    Raises CheckpointError for a tensor that is missing or whose shape differs from the config.
    """
    model = build(tensors.config, "meta")
    freeze(model)
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_from_base(parameter):
            names_of.setdefault(id(parameter), []).append(name)
    initialize_buffers(model, device)
    there = set(tensors.names())
    for names in names_of.values():
        if there.isdisjoint(names):
            raise CheckpointError(f"the base has no tensor '{names[0]}'; its files belong to another config.json")
        name = next(name for name in names if name in there)
        fresh = tensors.tensor(name)
        shape = model.get_parameter(name).shape
        if fresh.shape != shape:
            raise CheckpointError(
                f"the base's tensor '{name}' has shape {tuple(fresh.shape)}, but its config.json says {tuple(shape)}"
            )
        # A copy, because the content of a mapped file changes with the file.
        parameter = nn.Parameter(fresh.to(device=device, dtype=dtype, copy=True), requires_grad=False)
        for alias in names:
            _set_parameter(model, alias, parameter)
    return model.eval()


def _fill_adapter(model: nn.Module, adapter: str, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set an adapter's parameters, in fp32 as they were trained.

    Raises CheckpointError unless `weights` has exactly these parameters.
    """
    parameters = {
        name.replace(f".{adapter}.", ".default."): name
        for name, _ in model.named_parameters()
        if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name
    }
    differing = sorted(parameters.keys() ^ set(weights))
    if differing:
        what = "lacks" if differing[0] in parameters else "has, beyond what its recipe says,"
        raise CheckpointError(f"the adapter {what} the tensor '{differing[0]}'; it belongs to another base or recipe")
    for name, fresh in weights.items():  # not by name: a checkpoint's tensors are read together
        own = parameters[name]
        shape = model.get_parameter(own).shape
        if fresh.shape != shape:
            raise CheckpointError(
                f"the adapter's tensor '{name}' has shape {tuple(fresh.shape)}, but its base and recipe say "
                f"{tuple(shape)}"
            )
        # A copy, because the owner of the weights may go on training them.
        copied = fresh.to(device=device, dtype=torch.float32, copy=True)
        _set_parameter(model, own, nn.Parameter(copied, requires_grad=False))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, parameter)


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest context of a config.json, in tokens; None when it names none."""
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return int(longest) if longest else None


def base_bytes(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Compute the memory in bytes of a base with this config. Raises ConfigError if the model cannot be built."""
    model = build(config, "meta")
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def position_bytes(config: Any, dtype: torch.dtype) -> int:
    """Compute the bytes of keys and values of one token of one row."""
    text = config.get_text_config()
    num_heads = int(text.num_attention_heads)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)
    return 2 * int(text.num_hidden_layers) * num_kv_heads * head_dim * dtype.itemsize


def attention_width(config: Any) -> int:
    """Compute the elements of the queries of all layers: twice that many multiplications for a pair of tokens."""
    text = config.get_text_config()
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * int(text.num_attention_heads) * head_dim


def check_request_fits(num_positions: int, position_bytes: int, base_bytes: int, memory_bytes: int) -> None:
    """Raise ConfigError for a request whose keys and values never fit into memory beside its base."""
    if base_bytes + num_positions * position_bytes > memory_bytes:
        room = max(0, (memory_bytes - base_bytes) // position_bytes)
        raise ConfigError(
            f"the prompt and max_new_tokens are {num_positions} tokens, whose keys and values take "
            f"{num_positions * position_bytes / 2**30:.2f} GiB, but the service has memory for {room} beside the base; "
            f"shorten them, or give the service more --memory"
        )


def check_fits(num_bytes: int, budget_bytes: int, title: str) -> None:
    """Raise ConfigError for a base that is larger than the memory for bases."""
    if num_bytes > budget_bytes:
        raise ConfigError(
            f"base {title} takes {num_bytes / 2**30:.2f} GiB of memory, but the service may hold "
            f"{budget_bytes / 2**30:.2f} GiB of bases; give it more memory, or hold bases in bf16"
        )
