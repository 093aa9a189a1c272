"""bench-step: a data-parallel step of gradstream against PyTorch DDP on gloo, in the same run.

Both sides have the same model, initial weights, samples, optimizer and clipping, and one thread a worker. Each machine
runs one worker and one parameter server; the coordinator, which is not in the step's path, has a machine of its own. A
step's time is the median over the timed steps, after a warm-up. Bytes are counted by the interfaces over the timed
steps.

    make bench-step                                      # all cases
    python benchmarks/step.py --only loopback_2w_10m     # one; a prefix is enough
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from network import Loopback, Namespaces
from report import Result, arguments_parser, at_most, chosen, fail, named, report, result

from gradstream.client import Client, Step
from gradstream.coordinator.data.prepare import prepare
from gradstream.core.errors import ConfigError, one_line
from gradstream.core.machine.facts import arithmetic_threads
from gradstream.core.recipe.loading import load_recipe, parse_recipe
from gradstream.core.recipe.recipe import CodecConfig, PrepareConfig, Recipe
from gradstream.services.parameter_server.autocodec import TRIAL_STEPS

REPOSITORY = Path(__file__).resolve().parent.parent
Network = Loopback | Namespaces

MODELS: dict[str, dict[str, Any]] = {
    "10m": dict(load_recipe(REPOSITORY / "recipes" / "stdlib-gpt.yaml").model.config),
    "124m": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
MODELS["tiny"] = {**MODELS["124m"], "vocab_size": 4096, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
TARGETS = {"loopback": 1.0, "1gbit": 2.0, "100mbit": 5.0, "20mbit": 0.0}
MEGABITS = {"1gbit": 1000, "100mbit": 100, "20mbit": 20}
SHARES = {"100mbit": 0.95, "20mbit": 0.85}
"""Targets of rounds: the tokens a second over those of the same job on loopback."""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    network: str
    num_workers: int
    model: str
    slot_batch: int
    sequence_length: int
    num_steps: int
    num_warm_steps: int
    round_steps: int = 0
    """With local steps, the inner steps of a round. Then a step's time is a round's over its inner steps, and the steps
    above are DDP's."""

    @property
    def name(self) -> str:
        local = f"_h{self.round_steps}" if self.round_steps else ""
        return f"{self.network}_{self.num_workers}w_{self.model}{local}"

    @property
    def rounds(self) -> Case:
        """The case as gradstream runs it: with local steps two rounds after one to warm up."""
        steps = self.round_steps
        return replace(self, num_steps=3 * steps, num_warm_steps=steps) if steps else self


CASES = [
    Case("loopback", 2, "10m", 2, 64, 24, 6),
    Case("loopback", 4, "10m", 2, 64, 24, 6),
    Case("1gbit", 2, "10m", 2, 64, 24, 6),
    Case("1gbit", 4, "10m", 2, 64, 24, 6),
    Case("100mbit", 2, "10m", 2, 64, 14, 4),
    Case("100mbit", 4, "10m", 2, 64, 14, 4),
    Case("loopback", 2, "124m", 1, 32, 9, 3),
    Case("1gbit", 2, "124m", 1, 32, 9, 3),
    Case("100mbit", 2, "124m", 1, 32, 5, 2),
    Case("loopback", 2, "124m", 1, 32, 9, 3, 30),
    Case("100mbit", 2, "124m", 1, 32, 4, 1, 30),
    Case("20mbit", 2, "124m", 1, 32, 2, 1, 30),
]
SMOKE = Case("loopback", 1, "tiny", 1, 16, 3, 1)
PAIRS = {
    "tiny": ["int8/delta-int8"],
    "10m": ["bf16/bf16", "int8/delta-int8", "int4/delta-int4", "auto/auto"],
    "124m": ["int8/delta-int8", "int4/delta-int4"],
}
PAIRS_OF_ROUNDS = ["int4/delta-int4", "int2/delta-int2"]
AUTO_SEARCH_STEPS = 3 * (TRIAL_STEPS + 1)
"""Steps that `auto` may take to settle. They belong to its warm-up."""


@dataclass(frozen=True)
class Timing:
    """The result of one side."""

    step_seconds: float
    step_bytes: float
    loss: float
    codecs: str = ""


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--codec", action="append", help="push/pull codec pairs, such as bf16/bf16; default: several")
    parser.add_argument("--no-ddp", action="store_true", help="leave the rival out (while working on gradstream)")
    arguments = parser.parse_args()
    cases = chosen("step", named([SMOKE] if arguments.smoke else CASES), arguments.only)
    for pair in arguments.codec or ():
        check_pair(pair)
    # Makes `timeout` and `kill` end the cluster and the namespaces too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as temporary:
        data = Path(temporary) / "data"
        max_bytes = 200_000 if arguments.smoke else 4_000_000
        options = PrepareConfig(
            sources=["stdlib:"], vocab_size=4096, num_shards=8, max_bytes=max_bytes, validation_fraction=0.0
        )
        prepare(options, str(data))
        for case in cases.values():
            results += compare(case, data, Path(temporary), arguments.codec, not arguments.no_ddp)
    report("step", results)


def compare(case: Case, data: Path, temporary: Path, codecs: list[str] | None, with_ddp: bool) -> list[Result]:
    """Run both sides on one network; return one result a codec pair, and one for DDP's own fp16 hook."""
    with network_of(case.network, case.num_workers) as network:
        rivals = {}
        if with_ddp:
            recipe = recipe_of(replace(case, round_steps=0), data, temporary, "fp32/fp32")  # DDP knows no rounds
            rivals["ddp"] = run_ddp(case, recipe, network, temporary, False)
            rivals["ddp_fp16"] = run_ddp(case, recipe, network, temporary, True)
            for name, timing in rivals.items():
                say(case, name, timing)
        results = []
        for pair in codecs or (PAIRS_OF_ROUNDS if case.round_steps else PAIRS[case.model]):
            search = AUTO_SEARCH_STEPS if "auto" in pair else 0
            own = case.rounds
            longer = replace(own, num_steps=own.num_steps + search, num_warm_steps=own.num_warm_steps + search)
            ours = run_gradstream(longer, recipe_of(longer, data, temporary, pair), network, temporary)
            say(case, f"{pair} ({ours.codecs})", ours)
            if case.round_steps:
                results += share_of_loopback(longer, pair, ours, data, temporary)
            if not rivals:
                milliseconds = ours.step_seconds * 1e3
                name = f"milliseconds_{case.name}_{pair.replace('/', '_')}"
                results.append(at_most(name, milliseconds, 0.0, f"{ours.step_bytes / 1e6:.1f} MB a machine"))
            for name, rival in rivals.items():
                target = TARGETS[case.network] if name == "ddp" and case.num_workers == 2 else 0.0
                results.append(
                    result(
                        f"{name}_ratio_{case.name}_{pair.replace('/', '_')}",
                        rival.step_seconds / ours.step_seconds,
                        target,
                        f"{rival.step_seconds * 1e3:.0f} / {ours.step_seconds * 1e3:.0f} ms, "
                        f"{rival.step_bytes / 1e6:.1f} / {ours.step_bytes / 1e6:.1f} MB a machine, "
                        f"loss {rival.loss:.4f} / {ours.loss:.4f}",
                    )
                )
    return results


_on_loopback: dict[tuple[Case, str], Timing] = {}


def share_of_loopback(case: Case, pair: str, ours: Timing, data: Path, temporary: Path) -> list[Result]:
    """The tokens a second of a job with rounds over those of the same job on loopback, which is run once."""
    key = (replace(case, network="loopback"), pair)
    if case.network == "loopback":
        _on_loopback[key] = ours
        return []
    if key not in _on_loopback:
        recipe = recipe_of(key[0], data, temporary, pair)
        _on_loopback[key] = run_gradstream(key[0], recipe, network_of("loopback", case.num_workers), temporary)
        say(key[0], pair, _on_loopback[key])
    alone = _on_loopback[key]
    return [
        result(
            f"share_of_loopback_{case.name}_{pair.replace('/', '_')}",
            alone.step_seconds / ours.step_seconds,
            SHARES[case.network] if "int4" in pair else 0.0,
            f"{alone.step_seconds * 1e3:.0f} / {ours.step_seconds * 1e3:.0f} ms an inner step, "
            f"{ours.step_bytes / 1e6:.2f} MB a machine and inner step",
        )
    ]


def check_pair(pair: str) -> None:
    """End the process with one line on stderr if a codec pair is invalid, before anything runs."""
    parts = pair.split("/")
    try:
        if len(parts) != 2:
            raise ConfigError("it is not push/pull, such as int8/delta-int8")
        CodecConfig(push=parts[0], pull=parts[1])
    except (ConfigError, ValueError) as error:
        fail("step", f"--codec {pair}: {one_line(error)}")


def say(case: Case, name: str, timing: Timing) -> None:
    """Print progress on stderr."""
    print(
        f"{case.name} {name}: {timing.step_seconds * 1e3:.0f} ms a step, {timing.step_bytes / 1e6:.2f} MB a machine, "
        f"loss {timing.loss:.5f}",
        file=sys.stderr,
        flush=True,
    )


def network_of(name: str, num_machines: int) -> Network:
    if name == "loopback":
        return Loopback()
    return Namespaces(num_machines, MEGABITS[name])


def recipe_of(case: Case, data: Path, temporary: Path, pair: str) -> Recipe:
    """Make the recipe that both sides follow. `pair` is push/pull."""
    push, pull = pair.split("/")
    return parse_recipe(
        {
            "name": f"bench-{case.model}",
            "seed": 1,
            "run_root": str(temporary / "runs"),
            "model": {"config": MODELS[case.model]},
            "training": {
                "num_steps": case.num_steps,
                "num_slots": case.num_workers,
                "global_batch": case.slot_batch * case.num_workers,
                "microbatch": case.slot_batch,
                "sequence_length": case.sequence_length,
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "codec": {"push": push, "pull": pull},
            "data": {"path": str(data)},
            "validation": {"interval_steps": 0},
            "checkpoint": {"interval_steps": 0},
            "cluster": {"min_servers": case.num_workers, "min_workers": case.num_workers},
            "local": {"steps": case.round_steps} if case.round_steps else None,
        }
    )


# --- the two sides ----------------------------------------------------------------------------------------------------


def run_ddp(case: Case, recipe: Recipe, network: Network, temporary: Path, fp16: bool) -> Timing:
    path = temporary / "recipe.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for rank in range(case.num_workers):
            command = [
                *network.prefix(rank), sys.executable, str(Path(__file__).with_name("ddp.py")),
                "--recipe", str(path), "--rank", str(rank), "--address", network.address(0), "--port", str(port),
                *(["--fp16"] if fp16 else []),
            ]  # fmt: skip
            environment = {"GLOO_SOCKET_IFNAME": network.interface}
            processes.append(stack.enter_context(process(command, environment, pipe=rank == 0)))
        begin = end = 0.0
        steps = []
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            step = json.loads(line)
            steps.append(step)
            if step["step"] == case.num_warm_steps - 1:
                begin = network.sent_bytes(case.num_workers)
            end = network.sent_bytes(case.num_workers)
        if len(steps) != case.num_steps:
            raise SystemExit(f"error: DDP ended after {len(steps)} of {case.num_steps} steps")
    timed = [step["seconds"] for step in steps[case.num_warm_steps :]]
    return Timing(statistics.median(timed), (end - begin) / len(timed), steps[-1]["loss"])


def run_gradstream(case: Case, recipe: Recipe, network: Network, temporary: Path) -> Timing:
    with (
        tempfile.TemporaryDirectory(dir=temporary) as directory,
        cluster(network, case.num_workers, Path(directory)) as running,
    ):
        steps: list[Step] = []  # one a commit
        each = case.round_steps or 1
        begin = end = 0.0
        with Client(running.address) as client:
            job = client.submit(recipe)
            for item in client.watch(job.job_id):
                if isinstance(item, Step):
                    steps.append(item)
                    if len(steps) * each == case.num_warm_steps:
                        begin = network.sent_bytes(case.num_workers)
                    elif len(steps) * each == case.num_steps:
                        end = network.sent_bytes(case.num_workers)
                        break
            job = client.job(job.job_id)
            if len(steps) * each < case.num_steps:
                raise SystemExit(f"error: the job {job.state} after {len(steps)} commits: {job.reason}")
    times = [step.time.timestamp() for step in steps]
    timed = [after - before for before, after in pairwise(times)][case.num_warm_steps // each - 1 :]
    return Timing(statistics.median(timed) / each, (end - begin) / len(timed) / each, steps[-1].loss, job.codecs)


@dataclass(frozen=True)
class Cluster:
    """A running cluster: the coordinator's address, and all processes."""

    address: str
    processes: list[subprocess.Popen[str]]


@contextmanager
def cluster(network: Network, num_machines: int, root: Path, num_servers: int | None = None) -> Iterator[Cluster]:
    """Run a coordinator, a worker on each machine, and a server on each or on the first `num_servers`, for the block.

    `root` has the coordinator's state in `state`, and the log of each process.
    """
    with ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []

        def serve(machine: int | None, role: str, *arguments: str) -> Path:
            ready = root / f"{role}-{machine}.ready"
            prefix = [] if machine is None else network.prefix(machine)
            command = [*prefix, sys.executable, "-m", "gradstream.coordinator.cli", "serve", role, "--insecure"]
            command += arguments
            command += ["--ready-file", str(ready)]
            processes.append(stack.enter_context(process(command, {}, log=root / f"{role}-{machine}.log")))
            return ready

        ready = serve(None, "coordinator", "--listen", f"{network.coordinator}:0", "--state", str(root / "state"))
        address = await_file(ready)
        waiting = []
        num_servers = num_machines if num_servers is None else num_servers
        threads = ["--threads", str(arithmetic_threads(num_servers))]
        for machine in range(num_machines):
            common = ["--coordinator", address, "--memory", "8GiB"]
            listen = ["--listen", f"{network.address(machine)}:0"]
            if machine < num_servers:
                waiting.append(
                    serve(machine, "parameter-server", "--name", f"server-{machine}", *threads, *listen, *common)
                )
            cache = ["--cache", str(root / "cache")]
            named = ["--name", f"worker-{machine}", "--device", "cpu"]
            waiting.append(serve(machine, "worker", *named, *listen, *cache, *common))
        for path in waiting:
            await_file(path)
        yield Cluster(address, processes)


@contextmanager
def process(
    command: list[str], environment: dict[str, str], pipe: bool = False, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a process until the block ends."""
    output = subprocess.PIPE if pipe else open(log, "w", encoding="utf-8") if log else None  # noqa: SIM115
    running = subprocess.Popen(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, text=True,
        stderr=output if log else None,
    )  # fmt: skip
    try:
        yield running
        if log is None:
            running.wait(60)
    finally:
        running.kill()
        running.wait()
        if log and output is not None and not isinstance(output, int):
            output.close()


def await_file(path: Path, timeout_seconds: float = 120.0) -> str:
    """Check every 20 ms until a process has written its ready file; return the file's line."""
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            log = path.with_suffix(".log")
            raise SystemExit(f"error: {path.stem} did not come up: {log.read_text()[-500:] if log.exists() else ''}")
        time.sleep(0.02)
    return path.read_text(encoding="utf-8").strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
