"""bench-pipeline: a step of a pipeline of two workers against torch.distributed.pipelining on gloo, in the same run.

Both sides have the same model, cut, schedule, microbatches, initial weights, samples, optimizer and clipping, one
thread a worker, and the same type of activations between stages. Each machine runs one worker and one parameter server;
the coordinator has a machine of its own. The cut is taken from gradstream's plan. torch runs its own schedule and, as a
second rival, its runtime with gradstream's table of the schedule; the ratio is to the faster one.

All sides are alive at once and take turns of a few steps, every other round in reverse order, so that changes of the
machine's speed affect all sides equally. A step's time is the median over the steps of all turns. The figure after ± is
the standard error of the mean of the rounds' own ratios; ratios closer than twice that cannot be distinguished.

The bubble is the share of the workers' time between the first and the last pass of a step in which they compute no
pass. On both sides it is computed from the begin and end of every pass.

    make bench-pipeline                                          # all cases
    python benchmarks/pipeline.py --only loopback_1f1b_10m       # one; a prefix is enough
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from report import Result, arguments_parser, chosen, named, report, result
from sides import Side, Turn, gradstream_side, torch_side
from step import MODELS, network_of

from gradstream.coordinator.data.prepare import prepare
from gradstream.coordinator.planning.stages import SegmentCost, StageOffer, cut_stages
from gradstream.core.model.model import inventory
from gradstream.core.pipeline.schedule import Op, make_schedule
from gradstream.core.pipeline.simulation import Costs, simulate
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe

GRADSTREAM = "gradstream"
NUM_WORKERS = 2
TARGET = 1.0
MAX_LOSS_DIFFERENCE = 0.01
"""Nats by which the first losses may differ. A larger difference means that the two sides do not train the same."""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    network: str
    schedule: str
    model: str
    activations: str = "fp32"
    num_chunks: int = 1
    num_microbatches: int = 8
    microbatch: int = 2
    sequence_length: int = 128
    num_warm_steps: int = 4
    num_rounds: int = 8
    turn_steps: int = 4

    @property
    def name(self) -> str:
        name = f"{self.network}_{self.schedule}_{self.model}"
        if self.num_microbatches != Case.num_microbatches:
            name += f"_m{self.num_microbatches}"
        return name if self.activations == "fp32" else f"{name}_{self.activations}"

    @property
    def rivals(self) -> dict[str, bool]:
        """The ways in which torch runs the schedule, each with whether it uses gradstream's table.

        torch has no eager-1f1b of its own.
        """
        return {**({"torch": False} if self.schedule != "eager-1f1b" else {}), "torch_table": True}

    @property
    def num_steps(self) -> int:
        """More steps than all turns compute: a turn begins with a step that does not count, and may end in another."""
        return self.num_warm_steps + (self.turn_steps + 2) * (self.num_rounds + 1)

    @property
    def num_tokens(self) -> int:
        """Number of target tokens in a step."""
        return self.num_microbatches * self.microbatch * self.sequence_length


CASES = [
    Case("loopback", "1f1b", "10m"),
    Case("1gbit", "1f1b", "10m"),
    Case("1gbit", "1f1b", "10m", "bf16"),
    # Costs that occur once a version, for commit and pull, weigh less in a longer version.
    Case("loopback", "1f1b", "10m", num_microbatches=32, num_warm_steps=2, num_rounds=6, turn_steps=2),
    Case("loopback", "1f1b", "10m-untied"),
    Case("loopback", "gpipe", "10m"),
    Case("loopback", "interleaved-1f1b", "10m", num_chunks=2),
    Case("loopback", "zero-bubble", "10m"),
    Case("loopback", "1f1b", "124m", microbatch=1, sequence_length=64, num_warm_steps=2, num_rounds=6, turn_steps=2),
    Case("1gbit", "1f1b", "124m", microbatch=1, sequence_length=64, num_warm_steps=2, num_rounds=6, turn_steps=2),
]
SMOKE = Case(
    "loopback", "1f1b", "tiny", num_microbatches=2, microbatch=1, sequence_length=16, num_warm_steps=1, num_rounds=2,
    turn_steps=1,
)  # fmt: skip
# Without a tied embedding torch exchanges only activations, while gradstream still exchanges its gradients.
PIPELINE_MODELS: Mapping[str, dict[str, Any]] = {
    **MODELS,
    "10m-untied": {**MODELS["10m"], "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Timing:
    """The result of one side over all of its turns."""

    step_seconds: float
    bubble: float
    step_bytes: float
    losses: Mapping[int, float]


def together(turns: Sequence[Turn]) -> Timing:
    """Combine a side's turns, the first of which is its warm-up, with their median step."""
    losses = {step: loss for turn in turns for step, loss in turn.losses.items()}
    timed = turns[1:]
    return Timing(
        statistics.median(value for turn in timed for value in turn.seconds),
        statistics.median(value for turn in timed for value in turn.bubbles),
        statistics.fmean(turn.step_bytes for turn in timed),
        losses,
    )


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--rounds", type=int, help="how often each side has its turn, at least 2")
    parser.add_argument("--no-torch", action="store_true", help="leave the rival out (while working on gradstream)")
    parser.add_argument("--no-gradstream", action="store_true", help="the rival alone, with stages of equal work")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds: at least 2, as a single round does not show its error")
    if arguments.no_torch and arguments.no_gradstream:
        parser.error("--no-torch and --no-gradstream leave nothing to measure")
    cases = chosen("pipeline", named([SMOKE] if arguments.smoke else CASES), arguments.only)
    # Makes `timeout` and `kill` end the cluster and the namespaces too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ["OMP_NUM_THREADS"] = "1"  # of both sides
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as temporary:
        data = Path(temporary) / "data"
        max_bytes = 200_000 if arguments.smoke else 4_000_000
        options = PrepareConfig(
            sources=["stdlib:"], vocab_size=4096, num_shards=8, max_bytes=max_bytes, validation_fraction=0.0
        )
        prepare(options, str(data))
        for case in cases.values():
            case = replace(case, num_rounds=arguments.rounds or case.num_rounds)
            recipe = recipe_of(case, data, Path(temporary))
            found = compare(case, recipe, Path(temporary), not arguments.no_gradstream, not arguments.no_torch)
            # Print at once, because the report comes much later.
            for one in found:
                print(f"{one.name}: {one.value}, {one.detail}", file=sys.stderr, flush=True)
            results += found
    report("pipeline", results)


def compare(case: Case, recipe: Recipe, temporary: Path, with_gradstream: bool, with_torch: bool) -> list[Result]:
    """Run all sides in turns on one network; return the ratio of their throughputs and the bubble of each."""
    turns: dict[str, list[Turn]] = defaultdict(list)
    with network_of(case.network, NUM_WORKERS) as network, ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=temporary)))
        sides: dict[str, Side] = {}
        stage_ends = balanced_ends(recipe)
        if with_gradstream:
            sides[GRADSTREAM], stage_ends = stack.enter_context(
                gradstream_side(recipe, network, NUM_WORKERS, directory)
            )
        for name, use_table in case.rivals.items() if with_torch else ():
            sides[name] = stack.enter_context(
                torch_side(recipe, stage_ends, network, NUM_WORKERS, directory, use_table)
            )
            # Each side starts alone.
            take_turn(case, name, sides[name], case.num_warm_steps, turns)
        if with_gradstream:
            take_turn(case, GRADSTREAM, sides[GRADSTREAM], case.num_warm_steps, turns)
        for number in range(case.num_rounds):
            for name in sides if number % 2 == 0 else reversed(sides):
                take_turn(case, name, sides[name], case.turn_steps, turns)
    timings = {name: together(found) for name, found in turns.items()}
    ours = timings.get(GRADSTREAM)
    rivals = [timing for name, timing in timings.items() if name != GRADSTREAM]
    results = []
    if ours is not None and rivals:
        best = min(rivals, key=lambda timing: timing.step_seconds)
        check_same(case, ours, best)
        last = max(ours.losses.keys() & best.losses.keys())
        ratios = round_ratios(turns)
        results.append(
            result(
                f"torch_ratio_{case.name}",
                best.step_seconds / ours.step_seconds,
                TARGET,
                f"± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}; "
                f"{case.num_tokens / ours.step_seconds:.0f} / {case.num_tokens / best.step_seconds:.0f} tokens/s, "
                f"{ours.step_seconds * 1e3:.0f} / {best.step_seconds * 1e3:.0f} ms, "
                f"{ours.step_bytes / 1e6:.1f} / {best.step_bytes / 1e6:.1f} MB a machine, "
                f"loss {ours.losses[last]:.4f} / {best.losses[last]:.4f} at step {last}",
            )
        )
    for name, timing in timings.items():
        milliseconds = timing.step_seconds * 1e3
        detail = f"ideal {ideal_bubble(case):.3f}, {milliseconds:.0f} ms a step, stages end at {list(stage_ends)}"
        results.append(result(f"bubble_{name}_{case.name}", timing.bubble, 0.0, detail))
    return results


def take_turn(case: Case, name: str, side: Side, num_steps: int, turns: dict[str, list[Turn]]) -> None:
    """Have a side compute some steps, and print them on stderr."""
    turn = side.turn(num_steps)
    turns[name].append(turn)
    print(
        f"{case.name} {name}: {', '.join(f'{seconds * 1e3:.0f}' for seconds in turn.seconds)} ms a step, "
        f"{turn.step_bytes / 1e6:.2f} MB a machine, "
        f"loss {', '.join(f'{loss:.4f}' for loss in turn.losses.values())}",
        file=sys.stderr,
        flush=True,
    )


def round_ratios(turns: Mapping[str, Sequence[Turn]]) -> list[float]:
    """Compute each round's own ratio, to the rivals' mean."""
    rivals = [found[1:] for name, found in turns.items() if name != GRADSTREAM]
    return [
        statistics.fmean(rival.step_seconds for rival in of_round) / ours.step_seconds
        for ours, *of_round in zip(turns[GRADSTREAM][1:], *rivals, strict=True)
    ]


def check_same(case: Case, ours: Timing, rival: Timing) -> None:
    """Check by the first losses that both sides have the same weights and samples."""
    if abs(ours.losses[0] - rival.losses[0]) > MAX_LOSS_DIFFERENCE:
        raise SystemExit(
            f"error: {case.name}: the first loss is {ours.losses[0]:.4f} in gradstream and {rival.losses[0]:.4f} in "
            f"torch, so they do not train the same"
        )


def recipe_of(case: Case, data: Path, temporary: Path) -> Recipe:
    """Make the recipe that both sides follow."""
    global_batch = case.num_microbatches * case.microbatch
    return parse_recipe(
        {
            "name": f"bench-{case.model}",
            "seed": 1,
            "run_root": str(temporary / "runs"),
            "model": {"config": PIPELINE_MODELS[case.model]},
            "training": {
                "num_steps": case.num_steps,
                "num_slots": 1,
                "global_batch": global_batch,
                "microbatch": case.microbatch,
                "sequence_length": case.sequence_length,
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "data": {"path": str(data)},
            "validation": {"interval_steps": 0},
            "checkpoint": {"interval_steps": 0},
            "pipeline": {
                "stages": NUM_WORKERS * case.num_chunks,
                "chunks": case.num_chunks,
                "schedule": case.schedule,
                "activations": case.activations,
            },
            "cluster": {"min_servers": NUM_WORKERS, "min_workers": NUM_WORKERS},
        }
    )


def balanced_ends(recipe: Recipe) -> tuple[int, ...]:
    """Cut stages of about equally many matrix elements; return the first forward unit after each stage."""
    work: dict[int, int] = {}
    for tensor in inventory(recipe.model.config):
        work.setdefault(tensor.unit, 0)
        # An embedding is only looked up, but a tied one is also multiplied as the head.
        if tensor.kind in ("matrix", "head") or tensor.last_unit != tensor.unit:
            work[tensor.last_unit] = work.get(tensor.last_unit, 0) + tensor.num_elements
    units = sorted(work)
    segments = [SegmentCost(str(unit), work[unit], 0, 0) for unit in units]
    stages = recipe.pipeline.stages
    assert isinstance(stages, int)
    cut, _ = cut_stages(segments, [StageOffer("", 1.0, 0, 0)] * stages)
    return tuple(units[end] if end < len(units) else units[-1] + 1 for end in cut.ends)


def ideal_bubble(case: Case) -> float:
    """Compute the bubble of equal stages without communication time.

    A backward pass takes as long as two forward passes and sends its gradient only at its end, as in torch. For gpipe
    and 1f1b the bubble is (P - 1) / (M + P - 1).
    """
    schedule = make_schedule(case.schedule, NUM_WORKERS, case.num_microbatches, case.num_chunks)
    costs = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 1.0, Op.BACKWARD_WEIGHT: 1.0}
    return simulate(schedule, Costs([costs] * schedule.num_stages)).bubble


if __name__ == "__main__":
    main()
