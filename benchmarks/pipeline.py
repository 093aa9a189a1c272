"""bench-pipeline: a step of a pipeline of two workers against torch.distributed.pipelining on gloo, in the same run.

Same model, cut, schedule, microbatches, initial weights, samples, optimizer and clipping; one thread a worker, and what
travels between stages is of the same type. Each machine runs one worker and one parameter server, the coordinator a
machine of its own. The cut is that of gradstream's plan. torch runs a schedule of its own and, as a second rival, its
runtime with gradstream's table of it; the ratio is to the faster one. The sides take turns, twice each, since a
machine's speed may change while one of them runs; a step's time is the median over the timed steps of both turns, each
after a warm-up.

The bubble is the share of the workers' time between the first and the last pass of a step in which they compute no
pass, on both sides from the begin and end of every pass.

    make bench-pipeline                                          # all cases
    python benchmarks/pipeline.py --only loopback_1f1b_10m       # one; a prefix is enough
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import Result, report, result
from step import MODELS, Network, cluster, free_port, network_of, process

from gradstream.client import Client, Job, Span, SpanKind, Step, Timeline
from gradstream.coordinator.data_prepare import prepare
from gradstream.coordinator.sqlite_state import SqliteState
from gradstream.core.config import PrepareConfig, Recipe, parse_recipe
from gradstream.core.model import inventory
from gradstream.core.plan import Plan
from gradstream.core.schedules import Costs, Op, make_schedule, simulate
from gradstream.core.stages import SectionCost, StageOffer, cut_stages
from gradstream.core.timeline import PASSES, union
from gradstream.proto.v1 import plan_pb2

NUM_WORKERS = 2
NUM_ROUNDS = 2
TARGET = 1.0
MAX_LOSS_DIFFERENCE = 0.01
"""Nats by which the first losses may differ; beyond it the two sides do not train the same."""


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
    num_steps: int = 16
    num_warm_steps: int = 4

    @property
    def name(self) -> str:
        name = f"{self.network}_{self.schedule}_{self.model}"
        if self.num_microbatches != Case.num_microbatches:
            name += f"_m{self.num_microbatches}"
        return name if self.activations == "fp32" else f"{name}_{self.activations}"

    @property
    def rivals(self) -> dict[str, bool]:
        """How torch runs the schedule, and whether by gradstream's table. It has no eager-1f1b of its own."""
        return {**({"torch": False} if self.schedule != "eager-1f1b" else {}), "torch_table": True}

    @property
    def num_tokens(self) -> int:
        """Target tokens of a step."""
        return self.num_microbatches * self.microbatch * self.sequence_length


CASES = [
    Case("loopback", "1f1b", "10m"),
    Case("1gbit", "1f1b", "10m"),
    Case("1gbit", "1f1b", "10m", "bf16"),
    # What happens once a version, commit and pull, weighs less the longer the version is.
    Case("loopback", "1f1b", "10m", num_microbatches=32, num_steps=9, num_warm_steps=3),
    Case("loopback", "1f1b", "10m-untied"),
    Case("loopback", "gpipe", "10m"),
    Case("loopback", "interleaved-1f1b", "10m", num_chunks=2),
    Case("loopback", "zero-bubble", "10m"),
    Case("loopback", "1f1b", "124m", microbatch=1, sequence_length=64, num_steps=9, num_warm_steps=3),
    Case("1gbit", "1f1b", "124m", microbatch=1, sequence_length=64, num_steps=9, num_warm_steps=3),
]
# Without a tied embedding torch has nothing to exchange but activations, and gradstream still its gradients.
PIPELINE_MODELS: Mapping[str, dict[str, Any]] = {
    **MODELS,
    "10m-untied": {**MODELS["10m"], "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Timing:
    """What one side did in one turn or, as `together` makes it, in several: each timed step's seconds, the machines'
    bytes a step, the first and the last loss, and each step's bubble."""

    seconds: Sequence[float]
    step_bytes: float
    first_loss: float
    loss: float
    bubbles: Sequence[float]

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bubble(self) -> float:
        return statistics.median(self.bubbles)


def together(turns: Sequence[Timing]) -> Timing:
    """All timed steps of a side's turns as one. The losses of all are the same."""
    seconds = [value for turn in turns for value in turn.seconds]
    bubbles = [value for turn in turns for value in turn.bubbles]
    step_bytes = statistics.fmean(turn.step_bytes for turn in turns)
    return Timing(seconds, step_bytes, turns[0].first_loss, turns[0].loss, bubbles)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    parser.add_argument("--no-torch", action="store_true", help="leave the rival out (while working on gradstream)")
    parser.add_argument("--no-gradstream", action="store_true", help="the rival alone, with stages of equal work")
    arguments = parser.parse_args()
    # So that `timeout` and `kill` end the cluster and the namespaces too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ["OMP_NUM_THREADS"] = "1"  # of both sides
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as temporary:
        data = Path(temporary) / "data"
        options = PrepareConfig(
            sources=["stdlib:"], vocab_size=4096, num_shards=8, max_bytes=4_000_000, validation_fraction=0.0
        )
        prepare(options, str(data))
        for case in CASES:
            if case.name.startswith(arguments.only):
                recipe = recipe_of(case, data, Path(temporary))
                results += compare(case, recipe, Path(temporary), not arguments.no_gradstream, not arguments.no_torch)
    report("pipeline", results)


def compare(case: Case, recipe: Recipe, temporary: Path, with_gradstream: bool, with_torch: bool) -> list[Result]:
    """Run both sides in turns on one network: the ratio of their throughputs, and the bubble of each."""
    ideal = ideal_bubble(case)
    turns: dict[str, list[Timing]] = defaultdict(list)
    with network_of(case.network, NUM_WORKERS) as network:
        cuts = [balanced_ends(recipe)] if not with_gradstream else []
        for _ in range(NUM_ROUNDS):
            if with_gradstream:
                timing, stage_ends = run_gradstream(case, recipe, network, temporary)
                cuts.append(stage_ends)  # of each turn: speeds are measured anew
                turns["gradstream"].append(timing)
                say(case, "gradstream", timing)
            for name, use_table in case.rivals.items() if with_torch else ():
                timing = run_torch(case, recipe, cuts[-1], network, temporary, use_table)
                turns[name].append(timing)
                say(case, name, timing)
    sides = {name: together(timings) for name, timings in turns.items()}
    ours = sides.get("gradstream")
    rivals = [side for name, side in sides.items() if name != "gradstream"]
    results = []
    best = min(rivals, key=lambda timing: timing.step_seconds, default=None)
    if ours is not None and best is not None:
        check_same(case, ours, best)
        results.append(
            result(
                f"torch_ratio_{case.name}",
                best.step_seconds / ours.step_seconds,
                TARGET,
                f"{case.num_tokens / ours.step_seconds:.0f} / {case.num_tokens / best.step_seconds:.0f} tokens/s, "
                f"{ours.step_seconds * 1e3:.0f} / {best.step_seconds * 1e3:.0f} ms, "
                f"{ours.step_bytes / 1e6:.1f} / {best.step_bytes / 1e6:.1f} MB a machine, "
                f"loss {ours.loss:.4f} / {best.loss:.4f}",
            )
        )
    for name, side in sides.items():
        ends = " and ".join(str(list(stage_ends)) for stage_ends in dict.fromkeys(cuts))
        detail = f"ideal {ideal:.3f}, {side.step_seconds * 1e3:.0f} ms a step, stages end at {ends}"
        results.append(result(f"bubble_{name}_{case.name}", side.bubble, 0.0, detail))
    return results


def check_same(case: Case, ours: Timing, rival: Timing) -> None:
    """The first losses show whether both sides have the same weights and samples, and whether neither lost any."""
    if abs(ours.first_loss - rival.first_loss) > MAX_LOSS_DIFFERENCE:
        raise SystemExit(
            f"error: {case.name}: the first loss is {ours.first_loss:.4f} in gradstream and {rival.first_loss:.4f} in "
            f"torch, so they do not train the same"
        )


def say(case: Case, name: str, timing: Timing) -> None:
    """Progress, on stderr."""
    print(
        f"{case.name} {name}: {timing.step_seconds * 1e3:.0f} ms a step, {timing.step_bytes / 1e6:.2f} MB a machine, "
        f"bubble {timing.bubble:.3f}, loss {timing.first_loss:.5f} to {timing.loss:.5f}",
        file=sys.stderr,
        flush=True,
    )


def recipe_of(case: Case, data: Path, temporary: Path) -> Recipe:
    """The recipe that both sides follow."""
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


# --- the cut ----------------------------------------------------------------------------------------------------------


def planned_ends(state: Path, job: Job) -> tuple[int, ...]:
    """The first forward unit after each stage, as the coordinator that kept `state` planned them."""
    store = SqliteState(state)
    try:
        stored = store.load_plan(job.job_id, job.epoch)
    finally:
        store.close()
    if stored is None:
        raise SystemExit(f"error: the coordinator has no plan of {job.job_id}, epoch {job.epoch}")
    return Plan.from_proto(plan_pb2.Plan.FromString(stored)).stage_ends


def balanced_ends(recipe: Recipe) -> tuple[int, ...]:
    """The first forward unit after each stage when the stages' matrices have about equally many elements."""
    work: dict[int, int] = {}
    for tensor in inventory(recipe.model.config):
        work.setdefault(tensor.unit, 0)
        # An embedding is looked up; as a head it is multiplied with.
        if tensor.kind == "matrix" or tensor.last_unit != tensor.unit:
            work[tensor.last_unit] = work.get(tensor.last_unit, 0) + tensor.num_elements
    units = sorted(work)
    sections = [SectionCost(str(unit), work[unit], 0, 0) for unit in units]
    stages = recipe.pipeline.stages
    assert isinstance(stages, int)
    cut, _ = cut_stages(sections, [StageOffer("", 1.0, 0, 0)] * stages)
    return tuple(units[end] if end < len(units) else units[-1] + 1 for end in cut.ends)


# --- the bubble -------------------------------------------------------------------------------------------------------


def ideal_bubble(case: Case) -> float:
    """That of equal stages between which nothing takes time, where a backward pass takes as long as two forward ones
    and gives nothing away before its end, as in torch. For gpipe and 1f1b it is (P - 1) / (M + P - 1)."""
    schedule = make_schedule(case.schedule, NUM_WORKERS, case.num_microbatches, case.num_chunks)
    costs = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 1.0, Op.BACKWARD_WEIGHT: 1.0}
    return simulate(schedule, Costs([costs] * schedule.num_stages)).bubble


def bubble(workers: Sequence[Iterable[Span]]) -> float:
    """The share of a step's time that the workers compute no pass, from the first pass's begin to the last one's end.
    `workers` are the spans of each; those that are no passes do not count."""
    passes = [
        [(span.begin_us, span.begin_us + span.duration_us) for span in spans if span.kind in PASSES]
        for spans in workers
    ]
    every = [interval for intervals in passes for interval in intervals]
    whole = max(end for _, end in every) - min(begin for begin, _ in every)
    busy = sum(end - begin for intervals in passes for begin, end in union(intervals))
    return 1 - busy / (len(passes) * whole)


def gradstream_bubbles(timelines: Iterable[Timeline], num_warm_steps: int) -> list[float]:
    """The bubbles of the timed versions, of those of which every worker has sent a timeline."""
    versions: dict[tuple[int, int], list[Timeline]] = defaultdict(list)
    for timeline in timelines:
        if timeline.version >= num_warm_steps and any(span.kind in PASSES for span in timeline.spans):
            versions[timeline.epoch, timeline.version].append(timeline)
    whole = [found for found in versions.values() if len(found) == NUM_WORKERS]
    if not whole:
        raise SystemExit("error: of no version both workers have sent a timeline with passes")
    return [bubble([timeline.spans for timeline in found]) for found in whole]


def torch_bubbles(ranks: Sequence[Path], num_warm_steps: int) -> list[float]:
    """The bubbles of the timed steps, from the files that the ranks have written."""
    by_rank = [json.loads(path.read_text(encoding="utf-8"))[num_warm_steps:] for path in ranks]
    return [
        bubble(
            [
                [
                    Span(SpanKind(kind), begin_us, duration_us, stage=stage, microbatch=microbatch)
                    for kind, begin_us, duration_us, stage, microbatch in passes
                ]
                for passes in step
            ]
        )
        for step in zip(*by_rank, strict=True)
    ]


# --- the two sides ----------------------------------------------------------------------------------------------------


def run_torch(
    case: Case, recipe: Recipe, stage_ends: Sequence[int], network: Network, temporary: Path, use_table: bool
) -> Timing:
    path = temporary / "recipe.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    passes = [temporary / f"passes-{rank}.json" for rank in range(NUM_WORKERS)]
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for rank in range(NUM_WORKERS):
            command = [
                *network.prefix(rank), sys.executable, str(Path(__file__).with_name("torch_pipeline.py")),
                "--recipe", str(path), "--rank", str(rank), "--address", network.address(0), "--port", str(port),
                "--stage-ends", *map(str, stage_ends), "--passes", str(passes[rank]),
                *(["--table"] if use_table else []),
            ]  # fmt: skip
            environment = {"GLOO_SOCKET_IFNAME": network.interface}
            # The last rank has the loss.
            processes.append(stack.enter_context(process(command, environment, pipe=rank == NUM_WORKERS - 1)))
        begin = end = 0.0
        steps = []
        assert processes[-1].stdout is not None
        for line in processes[-1].stdout:
            steps.append(json.loads(line))
            if len(steps) == case.num_warm_steps:
                begin = network.sent_bytes(NUM_WORKERS)
            end = network.sent_bytes(NUM_WORKERS)
        if len(steps) != case.num_steps:
            raise SystemExit(f"error: torch ended after {len(steps)} of {case.num_steps} steps")
    timed = [step["seconds"] for step in steps[case.num_warm_steps :]]
    return Timing(
        timed,
        (end - begin) / len(timed),
        steps[0]["loss"],
        steps[-1]["loss"],
        torch_bubbles(passes, case.num_warm_steps),
    )


def run_gradstream(case: Case, recipe: Recipe, network: Network, temporary: Path) -> tuple[Timing, tuple[int, ...]]:
    """Run the job on a cluster of its own; return also where its stages end."""
    with tempfile.TemporaryDirectory(dir=temporary) as directory:
        with cluster(network, NUM_WORKERS, Path(directory)) as address, Client(address) as client:
            steps: list[Step] = []
            begin = end = 0.0
            job = client.submit(recipe)
            for item in client.watch(job.job_id):
                if isinstance(item, Step):
                    steps.append(item)
                    if len(steps) == case.num_warm_steps:
                        begin = network.sent_bytes(NUM_WORKERS)
                    elif len(steps) == case.num_steps:
                        end = network.sent_bytes(NUM_WORKERS)
                        break
            job = client.job(job.job_id)
            if len(steps) < case.num_steps:
                raise SystemExit(f"error: the job {job.state} after {len(steps)} steps: {job.reason}")
            timelines = client.timeline(job.job_id)
        # The coordinator is gone, so its state can be opened.
        stage_ends = planned_ends(Path(directory) / "state", job)
    times = [step.time.timestamp() for step in steps]
    timed = [after - before for before, after in pairwise(times)][case.num_warm_steps - 1 :]
    return Timing(
        timed,
        (end - begin) / len(timed),
        steps[0].loss,
        steps[-1].loss,
        gradstream_bubbles(timelines, case.num_warm_steps),
    ), stage_ends


if __name__ == "__main__":
    main()
