"""bench-parity: the effect of codec pairs on the loss, gradstream against one plain PyTorch process in fp32.

Both sides have the same initial weights, samples, optimizer and learning rates on the standard-library corpus, for
several seeds. A figure is the final validation loss minus the reference's, in nats, mean over the seeds. gradstream's
loss is computed with the weights that workers hold, so it includes the pull codec's error. One cluster (coordinator,
server, worker) runs all jobs, one after another. Losses depend neither on the number of workers nor on the machine's
load.

    make bench-parity                                                    # all pairs, three seeds
    python benchmarks/parity.py --pairs int8/delta-int8 --seeds 1        # a pair is push/pull or push/pull/embedding
    python benchmarks/parity.py --runs runs.jsonl --png parity.png       # resumes an interrupted call, draws a chart
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plain import train_plain
from report import Result, arguments_parser, at_most, chosen, report
from runs import Run, Runs
from step import await_file, process

from gradstream.client import Client, Step, Validation
from gradstream.coordinator.cli.pictures import style
from gradstream.coordinator.data.prepare import prepare
from gradstream.core.model.model import inventory
from gradstream.core.plan.bundles import codec_for
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, cut
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe

TARGET_NATS = 0.01
REFERENCE = "reference"
CONTROL = "control_bf16_start"
"""The reference with its initial weights rounded to bf16 once. Its figure shows how much a harmless difference changes
the final loss: training is chaotic where the learning rate is high for the batch. Smaller differences mean nothing."""
SEEDS = [1, 2, 3]
SMOKE_PAIR = "int8_delta-int8"
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TRAINING = {"num_steps": 300, "num_slots": 2, "global_batch": 8, "microbatch": 4, "sequence_length": 64}
# The highest rate without chaotic training: at twice this rate bf16 ended 0.046 nats below the reference.
OPTIMIZER = {"learning_rate": 1e-3}
SCHEDULE = {"kind": "cosine", "warmup_steps": 60, "min_ratio": 0.0}
VALIDATION = {"interval_steps": 50, "num_samples": 128}


@dataclass(frozen=True)
class Pair:
    """The codecs of one run. Pairs that trade loss for bytes have no target."""

    push: str
    pull: str
    embedding: str = "bf16"
    target: float = 0.0

    @property
    def name(self) -> str:
        suffix = "" if self.embedding == "bf16" else f"_emb-{self.embedding}"
        return f"{self.push}_{self.pull}{suffix}"


PAIRS = [
    Pair("fp32", "fp32", target=TARGET_NATS),
    Pair("bf16", "bf16", target=TARGET_NATS),
    Pair("bf16", "delta-bf16", target=TARGET_NATS),
    Pair("int8", "delta-int8", target=TARGET_NATS),
    Pair("int8", "delta-int8", "int8", target=TARGET_NATS),
    Pair("int4", "delta-int4", target=TARGET_NATS),
    Pair("int4", "delta-int4", "int8", target=TARGET_NATS),
    Pair("int4", "delta-int4", "int4", target=TARGET_NATS),
    Pair("int4-hadamard", "delta-int4-hadamard", target=TARGET_NATS),
    Pair("topk", "delta-int8"),
    Pair("sign", "delta-int8"),
    Pair("powersgd", "delta-int8"),
    Pair("int8", "int8"),
]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--pairs", nargs="+", type=parse_pair, help="push/pull or push/pull/embedding")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 to 3")
    parser.add_argument("--untied", action="store_true", help="a model whose output layer is not its embedding")
    parser.add_argument("--runs", type=Path, help="a file that keeps each run; runs found in it are not made again")
    parser.add_argument("--png", type=Path, help="write a chart of the differences")
    options = parser.parse_args()
    named_pairs = {pair.name: pair for pair in options.pairs or PAIRS}
    pairs = list(chosen("parity", named_pairs, options.only or (SMOKE_PAIR if options.smoke else "")).values())
    seeds = options.seeds or ([1] if options.smoke else SEEDS)
    training = {**TRAINING, "num_steps": 4} if options.smoke else TRAINING
    schedule = {**SCHEDULE, "warmup_steps": 1} if options.smoke else SCHEDULE
    validation = {"interval_steps": 2, "num_samples": 8} if options.smoke else VALIDATION
    # Makes `timeout` and `kill` end the cluster too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    model = {**MODEL, "tie_word_embeddings": not options.untied}
    settings = {"model": model, "training": training, "optimizer": OPTIMIZER, "schedule": schedule}
    settings["validation"] = validation
    runs = Runs(options.runs, settings)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradstream-bench-")))
        data = temporary / "data"
        max_bytes, held_out = (1_000_000, 0.2) if options.smoke else (4_000_000, 0.05)
        vocab_size = MODEL["vocab_size"]
        sources = PrepareConfig(
            sources=["stdlib:"], vocab_size=vocab_size, num_shards=4, max_bytes=max_bytes, validation_fraction=held_out
        )
        prepare(sources, str(data))
        for seed in seeds:
            for name in (REFERENCE, CONTROL):
                if runs.get(name, seed) is None:
                    recipe = recipe_of(settings, seed, Pair("fp32", "fp32"), data, temporary)
                    began = time.monotonic()
                    runs.add(name, seed, Run(train_plain(recipe, rounded_start=name == CONTROL)))
                    say(name, seed, runs, began)
        missing = [(pair, seed) for seed in seeds for pair in pairs if runs.get(pair.name, seed) is None]
        if missing:
            client = stack.enter_context(cluster(temporary))
            for pair, seed in missing:
                began = time.monotonic()
                runs.add(pair.name, seed, run_job(client, recipe_of(settings, seed, pair, data, temporary)))
                say(pair.name, seed, runs, began)
    results = [compare(CONTROL, 0.0, seeds, runs)]
    for pair in pairs:
        pulled = pulled_bytes(recipe_of(settings, seeds[0], pair, Path("data"), Path("runs")))
        results.append(compare(pair.name, pair.target, seeds, runs, pulled))
    if options.png:
        _draw(pairs, seeds, runs, options.png)
    report("parity", results)


def parse_pair(text: str) -> Pair:
    """Parse a pair given as push/pull or push/pull/embedding. The recipe's check finds unknown codecs."""
    parts = text.split("/")
    if len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(f"'{text}' is not push/pull or push/pull/embedding, such as int8/delta-int8")
    pair = Pair(parts[0], parts[1], parts[2] if len(parts) == 3 else Pair.embedding)
    return next((known for known in PAIRS if known.name == pair.name), pair)


def recipe_of(settings: dict[str, Any], seed: int, pair: Pair, data: Path, temporary: Path) -> Recipe:
    """Make the recipe that both sides follow."""
    return parse_recipe(
        {
            "name": "bench-parity",
            "seed": seed,
            "run_root": str(temporary / "runs"),
            "model": {"config": settings["model"]},
            "training": settings["training"],
            "optimizer": settings["optimizer"],
            "schedule": settings["schedule"],
            "codec": {"push": pair.push, "pull": pair.pull, "embedding": pair.embedding},
            "data": {"path": str(data)},
            "validation": settings["validation"],
            "checkpoint": {"interval_steps": 0},
            "cluster": {"min_servers": 1, "min_workers": 1},
        }
    )


def say(name: str, seed: int, runs: Runs, began: float) -> None:
    """Print progress on stderr."""
    run, reference = runs[name, seed], runs[REFERENCE, seed]
    print(
        f"{name} seed {seed}: {run.first:.4f} to {run.last:.5f}, {run.last - reference.last:+.5f}, "
        f"{run.pushed_bytes / 1e3:.1f} kB pushed a slot, {time.monotonic() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )


# --- gradstream's side ------------------------------------------------------------------------------------------------


@contextmanager
def cluster(temporary: Path) -> Iterator[Client]:
    """Start a coordinator, a server and a worker on loopback; yield a client."""
    with ExitStack() as stack:

        def serve(role: str, name: str, *arguments: str) -> Path:
            ready = temporary / f"{name}.ready"
            command = [sys.executable, "-m", "gradstream.coordinator.cli", "serve", role, *arguments]
            stack.enter_context(process([*command, "--ready-file", str(ready)], {}, log=ready.with_suffix(".log")))
            return ready

        listen = ["--listen", "127.0.0.1:0"]
        address = await_file(serve("coordinator", "coordinator", *listen, "--state", str(temporary / "state")))
        common = ["--coordinator", address, "--memory", "2GiB"]
        server = serve("parameter-server", "server", "--name", "server", *listen, *common)
        cache = ["--cache", str(temporary / "cache")]
        worker = serve("worker", "worker", "--name", "worker", "--device", "cpu", *cache, *common)
        for ready in (server, worker):
            await_file(ready)
        yield stack.enter_context(Client(address))


def run_job(client: Client, recipe: Recipe) -> Run:
    """Train on the cluster until the job has ended, so that the next job finds the cluster idle."""
    job = client.submit(recipe)
    losses: dict[int, float] = {}
    pushed = []
    for item in client.watch(job.job_id):
        if isinstance(item, Validation):
            losses[item.version] = item.loss
        elif isinstance(item, Step):
            pushed.append(item.pushed_bytes)
    job = client.job(job.job_id)
    if recipe.training.num_steps not in losses:
        raise SystemExit(f"error: {job.job_id} {job.state} at version {job.version}: {job.reason}")
    return Run(losses, statistics.mean(pushed) / recipe.training.num_slots)


def pulled_bytes(recipe: Recipe) -> int:
    """Payload bytes of a pull by a worker that holds the version before; an upper bound for lossless codecs."""
    tensors, form = inventory(recipe.model.config), downlink(recipe.codec.pull)
    return sum(
        encoded_bytes(
            codec_for(tensors[fragment.tensor].kind, form.delta, form.delta)
            if form.delta
            else codec_for(tensors[fragment.tensor].kind, form.full, recipe.codec.embedding),
            fragment.shape,
        )
        for fragment in cut(tensors, recipe.cluster.fragment_bytes // BYTES_PER_ELEMENT)
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def compare(name: str, target: float, seeds: list[int], runs: Runs, pulled: int = 0) -> Result:
    """Compute the figure of a pair, or of the control. `pulled` is the number of bytes pulled a version."""
    ours = [runs[name, seed] for seed in seeds]
    references = [runs[REFERENCE, seed] for seed in seeds]
    differences = [run.last - reference.last for run, reference in zip(ours, references, strict=True)]
    last = [reference.last for reference in references]
    detail = (
        f"{statistics.mean(run.last for run in ours):.4f} against {statistics.mean(last):.4f} nats "
        f"(from {statistics.mean(run.first for run in references):.2f}); by seed "
        f"{', '.join(f'{difference:+.4f}' for difference in differences)}; "
        f"the references end {max(last) - min(last):.4f} apart"
    )
    if pulled:
        pushed = statistics.mean(run.pushed_bytes for run in ours)
        detail += f"; {pushed / 1e3:.0f} kB pushed a slot and step, {pulled / 1e3:.0f} kB pulled"
    return at_most(f"loss_{name}", statistics.mean(differences), target, detail)


def _draw(pairs: list[Pair], seeds: list[int], runs: Runs, path: Path) -> None:
    """Draw the chart. Left: mean difference over the versions. Right: the final difference of every seed."""
    figure = style.new_figure(13, 5)
    curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, pair in enumerate(pairs):
        differences = [
            {
                version: loss - runs[REFERENCE, seed].losses[version]
                for version, loss in runs[pair.name, seed].losses.items()
            }
            for seed in seeds
        ]
        versions = sorted(differences[0])
        again, place = divmod(number, len(style.SERIES))
        color = style.SERIES[place]
        curves.plot(
            versions,
            [statistics.mean(by_version[version] for by_version in differences) for version in versions],
            color=color,
            linestyle=("-", "--", ":")[again % 3],
            label=pair.name,
        )
        last = [by_version[versions[-1]] for by_version in differences]
        finals.plot(last, [number] * len(last), "o", color=color, alpha=0.7)
    curves.set_xlabel("steps")
    curves.set_ylabel("validation loss minus the fp32 reference's, nats")
    curves.set_yscale("symlog", linthresh=TARGET_NATS)
    finals.set_yticks(range(len(pairs)), [pair.name for pair in pairs])
    finals.invert_yaxis()
    finals.set_xscale("symlog", linthresh=TARGET_NATS)
    finals.set_xlabel(f"final difference of each seed, nats (target: {TARGET_NATS:g})")
    for draw in (curves.axhline, finals.axvline):
        draw(TARGET_NATS, linestyle="--", color=style.MUTED, linewidth=1)
        draw(0.0, color=style.MUTED, linewidth=0.5)
    style.frame(curves)
    style.frame(finals)
    style.legend(curves)
    path.write_bytes(style.encoded(figure, style.format_of(path)))


if __name__ == "__main__":
    main()
