"""The rival of bench-pipeline: one process of torch.distributed.pipelining on gloo. Not a benchmark by itself.

It trains as gradstream does, with the same stages, initial weights, microbatches, schedule, optimizer, clipping and
learning rates. A tied embedding is on two stages; its gradients are added up once a step, as in Megatron-LM. Each rank
prints one line of JSON a step: {"step": …, "seconds": …, "loss": …, "grad_norm": …, "passes": …}. The passes are a list
of [kind, begin, duration, stage, microbatch] in microseconds. Only the last rank has the loss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain import adamw
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from gradstream.core.data.manifest import parse_manifest
from gradstream.core.model.model import build, initial_weights
from gradstream.core.model.stage_module import StageModule, segments_of, stage_tensors
from gradstream.core.pipeline.schedule import make_schedule
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.worker.samples.data import SlotReader

_ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Pass = tuple[str, int, int, int, int]
"""Kind, begin and duration in microseconds, stage, microbatch."""


class Passes:
    """The passes that a rank has computed since the last `take`. All ranks share the clock of the machine."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []

    @contextmanager
    def timed(self, kind: SpanKind, stage: int, microbatch: int) -> Iterator[None]:
        """Record a pass, or a part of one."""
        begin_ns = time.time_ns()
        yield
        end_ns = time.time_ns()
        begin_us = begin_ns // 1000
        self._passes.append((str(kind), begin_us, end_ns // 1000 - begin_us, stage, microbatch))

    def take(self) -> list[Pass]:
        """Remove and return the recorded passes."""
        taken, self._passes = self._passes, []
        return taken


class TimedStage(PipelineStage):
    """torch's stage, with its passes recorded. Waiting happens in the schedule, outside of the passes."""

    def __init__(self, module: nn.Module, index: int, num_stages: int, passes: Passes):
        super().__init__(module, index, num_stages, torch.device("cpu"))
        self._passes = passes

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        with self._passes.timed(SpanKind.FORWARD, self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        kind = SpanKind.BACKWARD if full_backward else SpanKind.BACKWARD_INPUT
        with self._passes.timed(kind, self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._passes.timed(SpanKind.BACKWARD_WEIGHT, self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class RoundedStage(nn.Module):
    """A stage whose activations and gradients are exchanged in another type."""

    def __init__(self, stage: StageModule, dtype: torch.dtype):
        super().__init__()
        self.stage = stage
        self._dtype = dtype

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """Compute as StageModule does. Token ids and logits keep their type."""
        result: torch.Tensor = self.stage(received if self.stage.first else received.float())
        return result if self.stage.last else result.to(self._dtype)


class Rank:
    """One rank's stages, optimizer and schedule."""

    def __init__(self, recipe: Recipe, rank: int, stage_ends: Sequence[int], use_table: bool):
        training, self._recipe = recipe.training, recipe
        num_stages, num_chunks = len(stage_ends), recipe.pipeline.chunks
        self._num_ranks = num_stages // num_chunks
        self._num_microbatches = training.slot_batch // training.microbatch
        self._num_tokens = training.global_batch * training.sequence_length
        self._own = range(rank, num_stages, self._num_ranks)
        self.last = num_stages - 1 in self._own
        weights = dict(initial_weights(recipe.model.config, recipe.seed))
        segments = stage_segments(recipe, stage_ends)
        stages = [StageModule(recipe.model.config, segments[stage]) for stage in self._own]
        found = {key: (stage, held) for stage in stages for key, held in stage_tensors(stage, weights).items()}
        for (name, _), (_, parameter) in found.items():
            parameter.data.copy_(weights[name])
        tied = set((getattr(stages[0].model, "all_tied_weights_keys", None) or {}).values())
        # Sorted by name, so the order is the same on both ranks.
        self._tied = [found[key][1] for key in sorted(found) if key[0] in tied]
        self._tied_group = dist.new_group([0, self._num_ranks - 1])
        self._modules = nn.ModuleList(stages)
        self._modules.train()
        self._parameters = list(self._modules.parameters())
        # A tied tensor counts once in the norm.
        self._counted = [held for (_, part), (_, held) in found.items() if part == 0]
        self._optimizer = adamw(self._modules, recipe.optimizer, fused=True)
        self._passes = Passes()
        dtype = _ACTIVATIONS[recipe.pipeline.activations]
        modules = stages if dtype == torch.float32 else [RoundedStage(stage, dtype) for stage in stages]
        timed = [
            TimedStage(module, stage, num_stages, self._passes)
            for stage, module in zip(self._own, modules, strict=True)
        ]
        self._schedule = make_torch_schedule(recipe, timed, self._num_microbatches, self._loss, use_table)
        self._num_losses = 0

    def step(self, step: int, tokens_BT: torch.Tensor) -> tuple[float, float]:
        """Train one step on the whole batch; return the loss, which only the last rank has, and the gradient norm."""
        recipe = self._recipe
        losses: list[torch.Tensor] = []
        self._num_losses = 0
        self._schedule.step(
            *([tokens_BT[:, :-1]] if 0 in self._own else []),
            target=tokens_BT[:, 1:] if self.last else None,
            losses=losses,
            return_outputs=False,
        )
        for parameter in self._tied:
            dist.all_reduce(parameter.grad, group=self._tied_group)
        norm = self._total_norm()
        nn.utils.clip_grads_with_norm_(self._parameters, recipe.optimizer.clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.training.num_steps, recipe.optimizer, recipe.schedule)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sum(float(loss.detach()) for loss in losses), float(norm)

    def take_passes(self) -> list[Pass]:
        """Remove and return the passes of the last step."""
        return self._passes.take()

    def _loss(self, logits_BTV: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
        """Compute a microbatch's part of the mean loss over all target tokens of the step."""
        # Losses come in the order of the microbatches.
        with self._passes.timed(SpanKind.FORWARD, len(self._own) * self._num_ranks - 1, self._num_losses):
            self._num_losses += 1
            summed = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
            return summed / self._num_tokens

    def _total_norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self._counted if parameter.grad is not None]
        squared = nn.utils.get_total_norm(gradients) ** 2
        dist.all_reduce(squared)
        return squared.sqrt()


def stage_segments(recipe: Recipe, stage_ends: Sequence[int]) -> list[range]:
    """The segments of each stage. `stage_ends` are in forward units, as in a plan."""
    every = segments_of(build(recipe.model.config, "meta"))
    ends = [sum(all(unit < end for unit in segment.units) for segment in every) for end in stage_ends]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def make_torch_schedule(
    recipe: Recipe,
    stages: list[TimedStage],
    num_microbatches: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    use_table: bool,
) -> Any:
    """Make torch's own schedule by the recipe's name, or with `use_table` torch's runtime with gradstream's table."""
    name, num_chunks = recipe.pipeline.schedule, recipe.pipeline.chunks
    common: dict[str, Any] = {"n_microbatches": num_microbatches, "loss_fn": loss, "scale_grads": False}
    single: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
    several: dict[str, Any] = {
        "interleaved-1f1b": ScheduleInterleaved1F1B,
        "zero-bubble": ScheduleInterleavedZeroBubble,
    }
    if not use_table:
        return single[name](stages[0], **common) if name in single else several[name](stages, **common)
    table = make_schedule(name, stages[0].num_stages // num_chunks, num_microbatches, num_chunks)
    runtime_class: Any = _PipelineScheduleRuntime
    runtime = runtime_class(stages, **common)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(table.to_csv())
        file.flush()
        runtime._load_csv(file.name)
    return runtime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stage-ends", type=int, nargs="+", required=True, help="in forward units, as in a plan")
    parser.add_argument("--table", action="store_true", help="torch's runtime with gradstream's table of the schedule")
    arguments = parser.parse_args()
    recipe = parse_recipe(arguments.recipe.read_text(encoding="utf-8"))
    training = recipe.training
    torch.set_num_threads(training.num_threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{arguments.address}:{arguments.port}",
        rank=arguments.rank,
        world_size=len(arguments.stage_ends) // recipe.pipeline.chunks,
        timeout=timedelta(seconds=300),
    )
    rank = Rank(recipe, arguments.rank, arguments.stage_ends, arguments.table)
    reader = SlotReader(
        manifest=parse_manifest((Path(recipe.data.path) / "manifest.json").read_text(encoding="utf-8")),
        path=recipe.data.path,
        cache_directory="",
        slot=0,
        num_slots=1,
        sequence_length=training.sequence_length,
        seed=recipe.seed,
    )
    asyncio.run(reader.prepare())
    dist.barrier()
    ended = time.perf_counter()
    for step in range(training.num_steps):
        # Steps follow each other at once, so the time from end to end is the whole time of a step.
        began = ended
        loss, norm = rank.step(step, torch.from_numpy(reader.batch(step, training.slot_batch).tokens))
        ended = time.perf_counter()
        line = {"step": step, "seconds": ended - began, "loss": loss, "grad_norm": norm, "passes": rank.take_passes()}
        print(json.dumps(line), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
