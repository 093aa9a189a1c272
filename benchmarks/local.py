"""bench-local: the validation loss of local steps against data-parallel training, one factor at a time, equal tokens.

The rivals are data-parallel AdamW and Muon: jobs of ordinary steps, each at the best of a few learning rates. A figure
is the final validation loss minus that of the better rival, in nats, mean over the seeds. All jobs run in this process
with the cluster's own slot and server code (one_process.py). Losses do not depend on the machine's load.

    make bench-local                                              # all factors at the smallest size, three seeds
    python benchmarks/local.py --factors state steps --seeds 1    # the rivals, the default and two factors
    python benchmarks/local.py --runs runs.jsonl --png local.png  # resumes an interrupted call, draws a chart
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from one_process import train
from report import Result, arguments_parser, at_most, chosen, named, report
from runs import Run, Runs

from gradstream.coordinator.cli.pictures import style
from gradstream.coordinator.data.prepare import prepare
from gradstream.core.log import configure
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe

DEFAULT = "default"
SEEDS = [1, 2, 3]
BUSY = 0.95
"""The share of the time in which slots compute, for which the rate of a link is given."""
NUM_STEPS = 2400
BATCH = 8
TRAINING = {"num_steps": NUM_STEPS, "global_batch": BATCH, "sequence_length": 64}
SMOKE_TRAINING = {**TRAINING, "num_steps": 4}
SMOKE_LOCAL = {"steps": 2}
LOCAL = {"steps": 30}
CODEC = {"push": "int4", "pull": "delta-int4"}
INT2 = {"push": "int2", "pull": "delta-int2", "embedding": "int2"}


@dataclass(frozen=True)
class Size:
    """A model, and the learning rates of its rivals. Local steps have the second of AdamW's rates."""

    model: dict[str, Any]
    adamw_rates: tuple[float, ...]
    muon_rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        return self.adamw_rates[1]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


SIZES = {
    "0.3m": Size(_llama(64, 176, 4, 4, 1024), (4e-3, 8e-3, 16e-3), (4e-3, 8e-3, 16e-3)),
    "1m": Size(_llama(128, 384, 4, 4, 2048), (2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 16e-3)),
    "10m": Size(_llama(320, 896, 7, 5, 4096), (1e-3, 2e-3, 4e-3), (1e-3, 2e-3, 4e-3)),
}


@dataclass(frozen=True)
class Case:
    """A training. `changes` are keys of the recipe's sections, beside those of the default.

    `target` is the most that the loss may be above that of `against`; 0 means no target. `against` is a case, or empty
    for the better rival.
    """

    name: str
    factor: str
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    target: float = 0.0
    against: str = ""

    @property
    def is_rival(self) -> bool:
        return self.factor == "rival"


CASES = [
    Case(DEFAULT, DEFAULT, target=0.05),
    Case("state_reset", "state", {"local": {"inner_state": "reset"}}),
    Case("state_keep", "state", {"local": {"inner_state": "keep"}}),
    Case("moments_fp32", "moments", {"local": {"moments": "fp32"}}),
    Case("moments_bf16", "moments", {"local": {"moments": "bf16"}}, 0.01, "moments_fp32"),
    Case("moments_int2", "moments", {"local": {"moments": {"exp_avg": "int2"}}}, 0.03, "moments_fp32"),
    Case("moments_none", "moments", {"local": {"moments": {"exp_avg": "none"}}}),
    Case("steps_1", "steps", {"local": {"steps": 1}}),
    Case("steps_10", "steps", {"local": {"steps": 10}}, 0.02),
    Case("steps_100", "steps", {"local": {"steps": 100}}),
    Case("slots_1", "slots", {"training": {"num_slots": 1}}),
    Case("slots_2", "slots", {"training": {"num_slots": 2}}),
    Case("outer_1_0", "outer", {"local": {"outer": {"learning_rate": 1.0, "momentum": 0.0}}}),
    Case("outer_0.9_0.5", "outer", {"local": {"outer": {"learning_rate": 0.9, "momentum": 0.5}}}),
    Case("outer_0.8_0.9", "outer", {"local": {"outer": {"learning_rate": 0.8, "momentum": 0.9}}}),
    Case("codec_fp32", "codec", {"codec": {"push": "fp32", "pull": "fp32"}}),
    Case("codec_int8", "codec", {"codec": {"push": "int8", "pull": "delta-int8"}}, 0.01, "codec_fp32"),
    Case("codec_int4", "codec", {"codec": {"push": "int4", "pull": "delta-int4"}}, 0.01, "codec_fp32"),
    Case("codec_int2", "codec", {"codec": INT2}, 0.03, "codec_fp32"),
    Case("codec_int2_residual", "codec", {"codec": {**INT2, "residual_decay": 0.9}}, 0.03, "codec_fp32"),
    Case("codec_sparse", "codec", {"codec": {**INT2, "push": "sparse"}}, 0.03, "codec_fp32"),
    Case("inner_muon", "inner", {"optimizer": {"kind": "muon"}}),
]
FACTORS = list(dict.fromkeys(case.factor for case in CASES if case.factor != DEFAULT))


def rivals(size: Size) -> list[Case]:
    """The data-parallel trainings: ordinary steps, with gradients in fp32."""
    fp32 = {"push": "fp32", "pull": "fp32"}
    return [
        Case(f"{kind}_{rate:g}", "rival", {"optimizer": {"kind": kind, "learning_rate": rate}, "codec": fp32})
        for kind, rates in (("adamw", size.adamw_rates), ("muon", size.muon_rates))
        for rate in rates
    ]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=FACTORS, help="default: all")
    parser.add_argument("--size", choices=SIZES, default="0.3m", help="parameters of the model")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 to 3")
    parser.add_argument("--runs", type=Path, help="a file that keeps each run; runs found in it are not made again")
    parser.add_argument("--png", type=Path, help="write a chart of the differences over the steps")
    options = parser.parse_args()
    # Makes `timeout` and `kill` remove the temporary directory too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    configure("warning")
    size = SIZES[options.size]
    cases = chosen_cases(options)
    others = rivals(size)[:1] if options.smoke else rivals(size)
    seeds = options.seeds or ([1] if options.smoke else SEEDS)
    settings = settings_of(size, options.smoke)
    runs = Runs(options.runs, settings)
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as directory:
        temporary = Path(directory)
        prepared = False
        for seed in seeds:
            for case in (*others, *cases):
                if runs.get(case.name, seed) is not None:
                    continue
                if not prepared:
                    prepare(sources_of(size, options.smoke), str(temporary / "data"))
                    prepared = True
                began = time.monotonic()
                recipe = recipe_of(settings, case, seed, temporary)
                runs.add(case.name, seed, train(recipe, temporary / f"{case.name}-{seed}"))
                say(case, seed, runs[case.name, seed], began)
    figures = Figures(runs, seeds, others, cases)
    if options.png:
        draw(figures, options.png)
    report("local", figures.results())


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The default, the cases of the factors, and the cases against which those are measured."""
    if options.smoke:
        return list(chosen("local", named(CASES[:1]), options.only).values())
    cases = [case for case in CASES if case.factor in (DEFAULT, *options.factors)]
    found = chosen("local", named(cases), options.only)
    needed = {DEFAULT, *found, *(case.against for case in found.values())}
    return [case for case in CASES if case.name in needed]


def sources_of(size: Size, smoke: bool) -> PrepareConfig:
    """What the data set is made of."""
    max_bytes, held_out = (1_000_000, 0.2) if smoke else (9_000_000, 0.05)
    return PrepareConfig(
        sources=["stdlib:"],
        vocab_size=size.model["vocab_size"],
        num_shards=8,
        max_bytes=max_bytes,
        validation_fraction=held_out,
    )


def settings_of(size: Size, smoke: bool) -> dict[str, Any]:
    """The sections of the default's recipe."""
    return {
        "model": {"config": size.model},
        "training": {"num_slots": 4, **(SMOKE_TRAINING if smoke else TRAINING)},
        "optimizer": {"learning_rate": size.rate, "clip_norm": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 1 if smoke else 100, "min_ratio": 0.1},
        "codec": CODEC,
        "local": SMOKE_LOCAL if smoke else LOCAL,
        "validation": {"interval_steps": 2 if smoke else 300, "num_samples": 8 if smoke else 256},
        "checkpoint": {"interval_steps": 0},
    }


def recipe_of(settings: Mapping[str, Any], case: Case, seed: int, temporary: Path) -> Recipe:
    """Make a case's recipe."""
    sections: dict[str, Any] = {name: {**section, **case.changes.get(name, {})} for name, section in settings.items()}
    if case.is_rival:
        del sections["local"]
    training = sections["training"]
    training["microbatch"] = training["global_batch"] // training["num_slots"]
    data = {"path": str(temporary / "data")}
    return parse_recipe({"name": f"local-{case.name}", "seed": seed, "data": data, **sections})


def say(case: Case, seed: int, run: Run, began: float) -> None:
    """Print progress on stderr."""
    print(
        f"{case.name} seed {seed}: {run.first:.4f} to {run.last:.5f}, {run.pushed_bytes / 1e3:.2f} kB pushed and "
        f"{run.pulled_bytes / 1e3:.2f} kB pulled a slot and step, {time.monotonic() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )


# --- figures ----------------------------------------------------------------------------------------------------------


class Figures:
    """The figures of all cases, from the runs of all seeds."""

    def __init__(self, runs: Runs, seeds: Sequence[int], others: Sequence[Case], cases: Sequence[Case]):
        self.cases = list(cases)
        self._runs = runs
        self._seeds = list(seeds)
        self._rivals = list(others)
        self.best = min((case.name for case in others), key=self.loss)
        """The rival with the smallest mean loss."""

    def loss(self, name: str) -> float:
        """Mean final loss over the seeds."""
        return statistics.mean(self._runs[name, seed].last for seed in self._seeds)

    def gaps(self, name: str, against: str) -> list[float]:
        """Difference of the final losses for each seed."""
        return [self._runs[name, seed].last - self._runs[against, seed].last for seed in self._seeds]

    def curve(self, name: str) -> dict[int, float]:
        """Difference to the better rival by step, mean over the seeds."""
        pairs = [(self._runs[name, seed].losses, self._runs[self.best, seed].losses) for seed in self._seeds]
        steps = sorted(set(pairs[0][0]) & set(pairs[0][1]))
        return {step: statistics.mean(own[step] - rival[step] for own, rival in pairs) for step in steps}

    def results(self) -> list[Result]:
        """One figure a case, rivals first."""
        return [self._result(case) for case in (*self._rivals, *self.cases)]

    def _result(self, case: Case) -> Result:
        against = case.against or self.best
        gaps = self.gaps(case.name, against)
        run = self._runs[case.name, self._seeds[0]]
        sent = run.pushed_bytes + run.pulled_bytes
        detail = (
            f"{self.loss(case.name):.4f} against {self.loss(against):.4f} of {against}; by seed "
            f"{', '.join(f'{gap:+.4f}' for gap in gaps)}; {run.pushed_bytes / 1e3:.2f} kB pushed and "
            f"{run.pulled_bytes / 1e3:.2f} kB pulled a slot and step; busy {BUSY:.0%} of the time at "
            f"{sent * BUSY / (1 - BUSY) / 1e3:.0f} kB/s for one step a second"
        )
        return at_most(f"loss_{case.name}", statistics.mean(gaps), case.target, detail)


def draw(figures: Figures, path: Path) -> None:
    """Draw the differences over the steps: a panel for each factor, with the default in each."""
    factors = [factor for factor in FACTORS if any(case.factor == factor for case in figures.cases)] or [DEFAULT]
    columns = min(4, len(factors))
    rows = -(-len(factors) // columns)
    figure = style.new_figure(4 * columns, 3.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, panel in enumerate(panels.flat):
        if number >= len(factors):
            panel.set_axis_off()
            continue
        shown = [case.name for case in figures.cases if case.factor in (DEFAULT, factors[number])]
        for place, name in enumerate(shown):
            curve = {step: gap for step, gap in figures.curve(name).items() if step}
            panel.plot(list(curve), list(curve.values()), color=style.SERIES[place], label=name)
        panel.axhline(0.0, color=style.MUTED, linewidth=0.5)
        panel.set_title(factors[number])
        style.frame(panel)
        style.legend(panel)
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"loss minus {figures.best}'s, nats")
    path.write_bytes(style.encoded(figure, style.format_of(path)))


if __name__ == "__main__":
    main()
