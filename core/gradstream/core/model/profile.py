"""The profile of a model: time, memory and output of each segment, for one microbatch on this machine.

Segments are measured one at a time, and layers of equal shapes once. A model with any number of layers therefore takes
seconds, and no more memory than its largest segment. A segment too large to be measured here is estimated from its
matrices.

The profile has these limits. Work that a stage does once for all its segments (masks, positions) is part of each
segment's time. Memory that zero-bubble keeps between the parts of a backward pass is left out. The times are those of
this machine's processor.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError, one_line
from gradstream.core.machine import memory
from gradstream.core.machine.speed import matrix_flops
from gradstream.core.model.model import hidden_size
from gradstream.core.model.trial import PLAIN_USE, ModelUse, describe
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.recipe import TrainingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradstream.core.model.stage_module import Segment, StageModule

# A segment that exceeds one of these limits is estimated.
MAX_PARAMETERS = 300_000_000
MAX_BYTES = 4 << 30
MAX_SECONDS = 5.0
# A segment's passes are repeated for this time, within these bounds on the number of repetitions.
REPEAT_SECONDS = 2.0
MIN_REPEATS, MAX_REPEATS = 2, 10
_MATRIX = 1024


@dataclass(frozen=True)
class Workload:
    """The keys of a recipe on which a segment's cost depends: the size of a microbatch, and how it is computed."""

    microbatch: int
    sequence_length: int
    precision: str = "fp32"
    recompute: bool = False
    num_threads: int = 1

    @classmethod
    def of(cls, training: TrainingConfig) -> Workload:
        """The workload of a recipe."""
        return cls(
            training.microbatch,
            training.sequence_length,
            training.precision,
            training.recompute,
            training.num_threads,
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a microbatch."""
        return self.microbatch * self.sequence_length


@dataclass(frozen=True)
class SegmentProfile:
    """The costs of a segment for one microbatch. `units` are indices of forward units.

    `num_parameters` counts a tied tensor in each segment that uses it. A backward pass takes `backward_seconds`; its
    two parts take `backward_input_seconds` and `backward_weight_seconds`. `activation_bytes`, with the segment's input,
    are kept from the forward to the backward pass. `working_bytes` more are needed while the backward pass recomputes
    activations, if it does. The segment's output has `output_elements`. `measured` is false for an estimate.
    """

    name: str
    units: tuple[int, ...]
    num_parameters: int
    forward_seconds: float
    backward_seconds: float
    backward_input_seconds: float
    backward_weight_seconds: float
    activation_bytes: int
    working_bytes: int
    output_elements: int
    measured: bool


def profile_segments(
    model_config: Mapping[str, Any], workload: Workload, lora: LoraConfig | None = None
) -> list[SegmentProfile]:
    """Profile every segment, in forward order, with torch's current number of threads.

    With adapters, gradients of the frozen parameters are not computed. Raises ConfigError for a model that cannot be
    built, or that cannot be cut into pipeline stages.
    """
    from gradstream.core.model.model import build, forward_units
    from gradstream.core.model.stage_module import segments_of

    model = build(model_config, "meta", lora)
    units = [unit for _, unit in forward_units(model)]
    segments = segments_of(model)
    rate = _flops_per_second(workload)
    known: dict[object, SegmentProfile] = {}
    profiles = []
    for index, segment in enumerate(segments):
        modules = [units[unit] for unit in segment.units]
        inner = 0 < index < len(segments) - 1
        shapes = tuple(tuple(parameter.shape) for module in modules for parameter in module.parameters())
        key = shapes if inner else index
        if key not in known:
            found = _estimate(model, segment, modules, workload, rate, inner)
            if _is_measurable(found):
                try:
                    found = _measure(model_config, index, found, workload, lora)
                except ConfigError:
                    raise
                except Exception as error:  # the family's code is used in a way that it was not made for
                    cause = one_line(error)[:200]
                    raise ConfigError(
                        f"model.config: {type(model).__name__} cannot be cut into pipeline stages: '{segment.name}' "
                        f"alone fails ({cause}); use stages: 1"
                    ) from None
            known[key] = found
        profiles.append(replace(known[key], name=segment.name, units=segment.units))
    return profiles


# --- estimates --------------------------------------------------------------------------------------------------------


def _flops_per_second(workload: Workload) -> float:
    """Operations a second of a matrix product of medium size on this machine."""
    with _autocast(workload):
        return matrix_flops("cpu", _MATRIX, 3)


def _estimate(
    model: nn.Module,
    segment: Segment,
    modules: list[nn.Module],
    workload: Workload,
    flops_per_second: float,
    inner: bool,
) -> SegmentProfile:
    """Estimate a segment's profile from its shapes.

    A matrix takes 2 operations for each parameter and token in the forward pass and twice as many in the backward pass,
    and keeps its input and output. An embedding takes no time.
    """
    from torch import nn

    tables = {id(m.weight) for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    # In the head, a tied embedding is a matrix.
    first = 0 in segment.units
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    matrices = [p for p in parameters if p.dim() > 1 and not (first and id(p) in tables)]
    hidden, tokens = hidden_size(model), workload.num_tokens
    operations = 2 * tokens * sum(p.numel() for p in matrices)
    kept = sum(sum(p.shape[-2:]) for p in matrices)
    if inner:
        operations += 2 * tokens * workload.sequence_length * hidden  # attention to earlier tokens
    if matrices:
        kept += 2 * hidden  # the inputs of norms
    forward = operations / flops_per_second
    frozen = not any(p.requires_grad for p in matrices if p.numel() == max(m.numel() for m in matrices))
    activation_bytes, input_bytes = 4 * tokens * kept, (8 if first else 4 * hidden) * tokens
    again = inner and workload.recompute
    columns = _outputs(matrices, hidden, first or inner)
    return SegmentProfile(
        name=segment.name,
        units=segment.units,
        num_parameters=sum(p.numel() for p in parameters),
        forward_seconds=forward,
        backward_seconds=((3 if again else 2) - frozen) * forward,
        backward_input_seconds=0.0 if first else (2 if again else 1) * forward,
        backward_weight_seconds=0.0 if frozen and not first else (2 if first else 1) * forward,
        activation_bytes=input_bytes if again else max(input_bytes, activation_bytes),
        working_bytes=activation_bytes if again else 0,
        output_elements=tokens * columns,
        measured=False,
    )


def _outputs(matrices: list[nn.Parameter], hidden: int, passes_on: bool) -> int:
    """Number of elements for each token in a segment's output: hidden states, or logits in the last segment."""
    return hidden if passes_on or not matrices else max(p.shape[0] for p in matrices)


def _is_measurable(estimate: SegmentProfile) -> bool:
    # Weights and gradients; activations, and the same size again for the activations' gradients.
    num_bytes = 8 * estimate.num_parameters + 2 * (estimate.activation_bytes + estimate.working_bytes)
    seconds = estimate.forward_seconds + estimate.backward_seconds
    return estimate.num_parameters <= MAX_PARAMETERS and num_bytes <= MAX_BYTES and seconds <= MAX_SECONDS


# --- measurements -----------------------------------------------------------------------------------------------------


def _measure(
    model_config: Mapping[str, Any],
    index: int,
    estimate: SegmentProfile,
    workload: Workload,
    lora: LoraConfig | None,
) -> SegmentProfile:
    """Measure a stage of this segment alone, and replace the values of the estimate that can be measured."""
    import torch

    from gradstream.core.model.stage_module import StageModule

    stage = StageModule(model_config, range(index, index + 1), "cpu", lora).train()
    for module in stage.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # frozen: on a worker it comes from the base
                setattr(
                    module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                )
    size = (workload.microbatch, workload.sequence_length)
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            for parameter in stage.parameters():
                # Small values, so that no pass overflows. Never zero, because some processors multiply zeros faster.
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.fill_(1.0)
        config: Any = stage.model.config
        targets_BT = torch.randint(0, config.get_text_config().vocab_size, size)
        received = targets_BT if stage.first else torch.randn(*size, hidden_size(stage.model))

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            given = received if stage.first else received.detach().requires_grad_()
            with _autocast(workload):
                result = stage(given)
            if stage.last:
                logits_NV = result.float().flatten(0, 1)
                result = torch.nn.functional.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")
            return given, result

        activation_bytes, working_bytes = _kept_bytes(stage, forward, workload.recompute and not stage.first)
        seconds = _time_passes(stage, forward)
    return replace(
        estimate,
        forward_seconds=seconds[0],
        backward_seconds=seconds[1],
        backward_input_seconds=seconds[2],
        backward_weight_seconds=seconds[3],
        activation_bytes=activation_bytes,
        working_bytes=working_bytes,
        measured=True,
    )


Forward = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]


def _kept_bytes(stage: StageModule, forward: Forward, recompute: bool) -> tuple[int, int]:
    """Measure (bytes kept between the passes, further bytes during recomputation); switch recomputation on if asked."""
    kept = _saved_bytes(stage, forward)
    if not recompute:
        return kept, 0
    model: Any = stage.model
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    kept_now = _saved_bytes(stage, forward)
    return kept_now, max(0, kept - kept_now)


def _saved_bytes(stage: StageModule, forward: Forward) -> int:
    """Bytes that autograd saves in a forward pass, with its input, without parameters. Each storage counts once."""
    import torch

    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    # The storages are kept alive, so that a new one cannot reuse the memory of a freed one.
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        received, _ = forward()
    note(received)
    return sum(storage.nbytes() for storage in storages.values())


def _time_passes(stage: StageModule, forward: Forward) -> tuple[float, float, float, float]:
    """Seconds of a forward pass, a backward pass, and the two parts of a backward pass: each the least of several runs.

    The first stage sends no gradient, so its backward pass has only the part for the weights.
    """
    import torch

    from gradstream.core.model.weight_gradients import WeightGradients

    weight_gradients = WeightGradients(stage, split=False)

    def run() -> tuple[float, float, float, float]:
        weight_gradients.split = False
        begin = time.perf_counter()
        _, result = forward()
        forward_seconds = time.perf_counter() - begin
        if not result.requires_grad:
            return forward_seconds, 0.0, 0.0, 0.0  # a first segment without an adapter
        gradient = None if stage.last else torch.ones_like(result)
        backward_seconds = _seconds(lambda: result.backward(gradient))  # type: ignore[no-untyped-call]
        if stage.first:
            return forward_seconds, backward_seconds, 0.0, backward_seconds
        weight_gradients.split = True
        received, result = forward()
        begin = time.perf_counter()
        _, weight_part = weight_gradients.backward_input(result, gradient, received)
        input_seconds = time.perf_counter() - begin
        weight_seconds = _seconds(weight_part.add)
        return forward_seconds, backward_seconds, input_seconds, weight_seconds

    run()  # warm-up; from here on gradients exist, to which each run adds
    begin = time.perf_counter()
    runs = [run() for _ in range(MIN_REPEATS)]
    while len(runs) < MAX_REPEATS and time.perf_counter() - begin < REPEAT_SECONDS:
        runs.append(run())
    forward_seconds, backward_seconds, input_seconds, weight_seconds = map(min, zip(*runs, strict=True))
    return forward_seconds, backward_seconds, input_seconds, weight_seconds


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _autocast(workload: Workload) -> torch.autocast:
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=workload.precision == "bf16")


# --- the child process ------------------------------------------------------------------------------------------------


def question(
    model_config: Mapping[str, Any], workload: Workload, lora: LoraConfig | None = None, use: ModelUse = PLAIN_USE
) -> str:
    """The input of `python -m gradstream.core.model.profile`, equal for equal profiles."""
    adapters = lora.model_dump(mode="json") if lora is not None else None
    asked = {"model_config": model_config, "workload": asdict(workload), "lora": adapters, "use": asdict(use)}
    return json.dumps(asked, sort_keys=True)


def parse_answer(answer: Mapping[str, Any]) -> list[SegmentProfile]:
    """Decode the child's output. Raises ConfigError with the child's reason if the child reports an error."""
    if "error" in answer:
        raise ConfigError(answer["error"])
    return [SegmentProfile(**{**segment, "units": tuple(segment["units"])}) for segment in answer["segments"]]


def _main() -> None:
    """Run `python -m gradstream.core.model.profile`.

    Reads a model and a workload from stdin, and writes the segments' profiles and the model's inventory to stdout, both
    as JSON.
    """
    memory.use_huge_pages()  # as workers do
    import torch

    asked = json.load(sys.stdin)
    workload = Workload(**asked["workload"])
    torch.set_num_threads(workload.num_threads)
    try:
        lora = LoraConfig.model_validate(asked["lora"]) if asked["lora"] else None
        # First check that the model can be trained at all.
        found = describe(asked["model_config"], lora, ModelUse(**asked["use"]))
        segments = profile_segments(asked["model_config"], workload, lora)
        answer: dict[str, Any] = {"segments": list(map(asdict, segments)), "inventory": found}
    except ConfigError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
