"""Builds the modules of a worker's stages, without weights, and checks them against the plan's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, initialize_buffers, router_loss_factor
from gradstream.core.model.stage_module import StageModule, segments_of, stage_tensors
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import TrainingConfig
from gradstream.worker.frozen import STORE

Use = tuple[int, int]
"""(tensor, part): a use of one of the plan's tensors by a stage."""


class Stage(nn.Module):
    """A stage's module, or the whole model, under the recipe's precision.

    Takes activations or token ids; returns activations or logits.
    """

    def __init__(self, module: nn.Module, training: TrainingConfig, device: torch.device):
        super().__init__()
        self.module = module
        self._training = training
        self._device = device
        self._router_factor = 0.0 if isinstance(module, StageModule) else router_loss_factor(module)
        self.router_loss: torch.Tensor | None = None
        """The term that the last forward pass in training adds to the mean loss of its targets."""
        self.layout: Mapping[str, torch.Tensor] = {}
        """Inputs of the current microbatch's passes besides its tokens."""

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        with autocast(self._training, self._device):
            if isinstance(self.module, StageModule):
                result: torch.Tensor = self.module(received, **self.layout)
            else:
                output = self.module(input_ids=received, use_cache=False, **self.layout)
                result = output.logits
                if self._router_factor and self.training:
                    self.router_loss = self._router_factor * output.aux_loss
                else:
                    self.router_loss = None
        return result


@dataclass(frozen=True)
class BuiltStages:
    """The stages of one worker, by their index in the plan, and the plan's tensors in them."""

    stages: dict[int, Stage] = field(default_factory=dict)
    models: list[nn.Module] = field(default_factory=list)
    """The transformers model of each stage, in the order of `stages`."""
    parameters: dict[Use, nn.Parameter] = field(default_factory=dict)
    uses_of_stage: dict[int, list[Use]] = field(default_factory=dict)


def build_stages(plan: Plan, device: torch.device, worker: int) -> BuiltStages:
    """Build the stages of worker number `worker` of a replica.

    Raises ConfigError when their parameters are not the plan's tensors.
    """
    training = plan.recipe.training
    built = BuiltStages()
    held: set[str] = set()  # tensors of the frozen base
    for stage in plan.stages_of_worker(worker):
        uses = [use for use in plan.uses_of_worker(worker) if plan.stage_of(_unit(plan, use)) == stage]
        module, found = _build_module(plan, stage, device)
        model = module.model if isinstance(module, StageModule) else module
        tuning = plan.recipe.fine_tuning
        if tuning is not None and plan.lora is not None:
            held |= STORE.fill(model, tuning.base, tuning.held, device)
        _enter_parameters(plan, uses, found, built.parameters)
        if training.recompute:
            model.activation_checkpointing_enable(  # type: ignore[operator]
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        built.models.append(model)
        built.stages[stage] = Stage(module, training, device)
        built.uses_of_stage[stage] = uses
    STORE.keep(held)
    return built


def pick_device(wanted: str) -> torch.device:
    """Choose the device to compute on: "auto" takes CUDA if present. Raises ConfigError when the device is missing."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"--device {wanted}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


@contextmanager
def autocast(training: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Use bf16 autocast when the recipe requests it."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        yield


def _build_module(
    plan: Plan, stage: int, device: torch.device
) -> tuple[nn.Module, dict[tuple[str, int], nn.Parameter]]:
    """Build the module of a stage; return it and its parameters by (name of the tensor, part)."""
    if plan.has_pipeline:
        module = StageModule(plan.model_config, _segments(plan, stage), device, plan.lora)
        names = {tensor.name for tensor in plan.tensors}
        return module, stage_tensors(module, names)
    model = build(plan.model_config, "meta", plan.lora)
    initialize_buffers(model, device)
    if plan.lora is None:
        model.tie_weights()  # type: ignore[operator]  # the move has separated tied tensors
    return model, {(name, 0): parameter for name, parameter in model.named_parameters()}


def _enter_parameters(
    plan: Plan,
    uses: Sequence[Use],
    found: Mapping[tuple[str, int], nn.Parameter],
    parameters: dict[Use, nn.Parameter],
) -> None:
    """Add a stage's parameters to `parameters` under the plan's tensors. Raises ConfigError when they do not match."""
    for use in uses:
        tensor = plan.tensors[use[0]]
        parameter = found.get((tensor.name, use[1]))
        if parameter is None or tuple(parameter.shape) != tensor.shape:
            raise ConfigError(
                f"the plan's tensor '{tensor.name}' is not in this worker's model; "
                f"install the same transformers version on every machine"
            )
        parameters[use] = parameter
        if use[1] and (use[0], 0) in parameters:
            parameter.data = parameters[use[0], 0].data  # both parts are on this worker: keep one copy of the weights
    own = {id(parameters[use]) for use in uses}
    for (name, _), parameter in found.items():
        if parameter.requires_grad and id(parameter) not in own:
            raise ConfigError(
                f"the plan has no tensor for '{name}' of this worker's model; "
                f"install the same transformers version on every machine"
            )


def _unit(plan: Plan, use: Use) -> int:
    tensor = plan.tensors[use[0]]
    return tensor.last_unit if use[1] else tensor.unit


def _segments(plan: Plan, stage: int) -> range:
    """The segments of a stage. Raises ConfigError when the plan cuts inside a segment."""
    begin, end = (0, *plan.stage_ends)[stage], plan.stage_ends[stage]
    segments = segments_of(build(plan.model_config, "meta", plan.lora))
    own = [number for number, segment in enumerate(segments) if segment.units and begin <= segment.units[0] < end]
    if not own or segments[own[0]].units[0] != begin or segments[own[-1]].units[-1] != end - 1:
        raise ConfigError(
            f"the plan's stage {stage} has units {begin} to {end - 1}, which are not whole segments of this worker's "
            f"model; install the same transformers version on every machine"
        )
    return range(own[0], own[-1] + 1)
