"""A pipeline stage as a module: a model of transformers without the segments of other stages.

The model's own forward pass runs on every stage, so masks, rotary embeddings and other values of a family are computed
by the family's code. Layers of other stages return their input. At the beginning of a stage the received activations
replace those that the model has computed so far.

Shape legend: B samples, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, forward_units, initialize_buffers
from gradstream.core.recipe.fine_tuning import LoraConfig


@dataclass(frozen=True)
class Segment:
    """A part of a model that is never cut: the embedding, one layer, or the final norm and head.

    `units` are indices of forward units.
    """

    name: str
    units: tuple[int, ...]


def segments_of(model: nn.Module) -> list[Segment]:
    """The segments of a decoder, in forward order. Raises ConfigError for a model that cannot be cut into segments."""
    units = forward_units(model)
    names = [name for name, _ in units]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = [
        index for index, name in enumerate(names) if any(name == f"{path}.{name.rsplit('.', 1)[-1]}" for path in lists)
    ]
    # A list inside a layer belongs to that layer.
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise ConfigError("model.config: the model's layers are not one list, so it cannot be cut into pipeline stages")
    before, after = tuple(range(layers[0])), tuple(range(layers[-1] + 1, len(names)))
    for name, unit in units[: layers[0]]:
        # Some families define their final norm before the layers. Its place does not show when it is used.
        if _has_parameters(unit) and not isinstance(unit, nn.Embedding):
            raise ConfigError(
                f"model.config: '{name}' lies before the layers and is no embedding, so the model cannot be cut into "
                f"pipeline stages; use stages: 1"
            )
    return [
        Segment("embedding", before),
        *(Segment(names[index], (index,)) for index in layers),
        Segment("head", after),
    ]


class StageModule(nn.Module):
    """The segments in the range `segments` (over `segments_of`) of a model, on a device, without weights.

    With adapters, frozen parameters stay on the meta device. Parameters of the other segments do not exist. Parameters
    have the names of the whole model.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        segments: range,
        device: torch.device | str = "cpu",
        lora: LoraConfig | None = None,
    ):
        super().__init__()
        self.model = build(model_config, "meta", lora)
        every = segments_of(self.model)
        if not segments or segments.start < 0 or segments.stop > len(every) or segments.step != 1:
            raise ConfigError(
                f"stage of segments {segments.start} to {segments.stop - 1}: "
                f"the model has segments 0 to {len(every) - 1}"
            )
        self.first, self.last = segments.start == 0, segments.stop == len(every)
        self._received: torch.Tensor | None = None
        units = [unit for _, unit in forward_units(self.model)]
        places = _places(self.model)

        def replace(unit: int, new: nn.Module) -> None:
            for module, name in places[id(units[unit])]:
                setattr(module, name, new)

        for number, segment in enumerate(every):
            for unit in segment.units:
                if number in segments:
                    continue
                if 0 < number < len(every) - 1:
                    replace(unit, self._placeholder(number, segments, units[unit]))
                elif _has_parameters(
                    units[unit]
                ):  # units without parameters, such as rotary embeddings, are needed by each stage
                    replace(unit, _Nothing() if number == 0 else _PassedOn(units[unit]))
        if not self.first and segments.start < len(every) - 1:
            entry = units[every[segments.start].units[0]]
            entry.register_forward_pre_hook(self._take, with_kwargs=True)
        if segments.stop == len(every) - 1:
            units[every[segments.stop - 1].units[-1]].register_forward_hook(_end)
        initialize_buffers(self.model, device)

    def forward(self, received: torch.Tensor, **layout: torch.Tensor) -> torch.Tensor:
        """Run the stage's forward pass.

        The first stage takes token ids, (B, T), the others activations, (B, T, D). The last stage returns logits,
        (B, T, V), the others activations. `layout` has further arguments of the model's forward pass: position_ids.
        Raises ConfigError for a family that cannot be cut into stages.
        """
        model: Any = self.model if self.last else self.model.base_model
        result: torch.Tensor
        try:
            if self.first:
                output = model(input_ids=received, use_cache=False, **layout)
            else:
                self._received = received
                output = model(inputs_embeds=received, use_cache=False, **layout)
            result = output.logits if self.last else output.last_hidden_state
        except _StageEndError as end:
            result = end.hidden_states
        finally:
            unused, self._received = self._received is not None, None
        if result.shape[:2] != received.shape[:2] or unused:
            # The model's loop expects something else from a layer than the hidden states that `_PassedOn` returns.
            raise ConfigError(
                f"model.config: {type(self.model).__name__} cannot be cut into pipeline stages: a stage turned "
                f"{tuple(received.shape[:2])} tokens into {tuple(result.shape[:2])}; use stages: 1"
            )
        return result

    def _take(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if "hidden_states" in keywords:
            return arguments, {**keywords, "hidden_states": self._taken()}
        return (self._taken(), *arguments[1:]), keywords

    def _taken(self) -> torch.Tensor:
        received, self._received = self._received, None
        assert received is not None
        return received

    def _placeholder(self, number: int, segments: range, layer: nn.Module) -> nn.Module:
        """The module that replaces layer `number`, which belongs to another stage."""
        if number == segments.stop:
            return _End(layer)
        # The stage is only the head: the received activations replace the output of the last layer.
        is_entry = number == segments.start - 1 and self.last and len(segments) == 1
        return _PassedOn(layer, self._taken if is_entry else None)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The parents of each module and its names in them, by the module's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _StageEndError(Exception):
    """Ends the model's forward pass once the stage has computed its segments."""

    def __init__(self, hidden_states: torch.Tensor):
        super().__init__()
        self.hidden_states = hidden_states


def _end(module: nn.Module, arguments: object, result: Any) -> None:
    raise _StageEndError(result[0] if isinstance(result, tuple) else result)


class _Nothing(nn.Module):
    """Replaces an embedding, with any output: the received activations replace the sum of embeddings afterwards."""

    def forward(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros((1, 1, 1), device=ids.device)


class _PassedOn(nn.Module):
    """Replaces a layer or norm of another stage. Returns its input, or the result of `take`.

    It keeps the plain attributes of the original, which a model's loop may read.
    """

    def __init__(self, original: nn.Module, take: Callable[[], torch.Tensor] | None = None):
        super().__init__()
        plain = {key: value for key, value in vars(original).items() if isinstance(value, (str, int, float))}
        self.__dict__.update({key: value for key, value in plain.items() if key not in self.__dict__})
        self._take = take

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states if self._take is None else self._take()


class _End(_PassedOn):
    """Replaces the first layer after a stage: the layer's input is the stage's output."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise _StageEndError(hidden_states)


def stage_tensors(module: StageModule, names: Collection[str]) -> dict[tuple[str, int], nn.Parameter]:
    """The stage's trained parameters by (tensor, part). `names` are the whole model's tensors.

    A tied tensor has two parts, its use as an embedding and its use as a head. Their gradients are summed separately,
    so that one stage with both parts gives the same bits as two stages with one part each. A stage with both parts
    therefore has the parameter twice.
    """
    tied: Mapping[str, str] = getattr(module.model, "all_tied_weights_keys", None) or {}
    found: dict[tuple[str, int], nn.Parameter] = {}
    for name, parameter in module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (name, 0) if name in names else (tied[name], 1)
        found[key] = parameter
    return found
