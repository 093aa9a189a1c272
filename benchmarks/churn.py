"""bench-churn: rounds of local steps while a worker is killed every few seconds, against the same job undisturbed.

Real processes on this machine: a coordinator, a server, and workers with a thread and a cache directory each. The
workers are killed (SIGKILL) in turn and started again at once. The figure is the tokens a second over those of the
undisturbed job times the share of its workers that were live, from the first commit to the last. A worker is live from
its registration to its death. The final checkpoints of both jobs must have the same bits.

    make bench-churn
    python benchmarks/churn.py --only churn_2w_10m_h10 --rounds 16
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from report import Result, arguments_parser, chosen, fail, named, report, result
from step import MODELS, await_file, process

from gradstream.client import Client, Event, NodeKind, Step
from gradstream.coordinator.data.prepare import prepare
from gradstream.core.node.faults import VARIABLE
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """A job with rounds on `num_workers` workers, of which one is killed every `kill_seconds`."""

    name: str
    model: str
    num_workers: int
    num_slots: int
    round_steps: int
    num_rounds: int
    slot_batch: int
    sequence_length: int
    kill_seconds: float
    slow_milliseconds: int = 0
    """What an inner step takes longer, asleep: the model may then be tiny, and the figure bears other work on the
    machine."""


CASES = [
    Case("churn_2w_10m_h10", "10m", 2, 4, 10, 30, 2, 128, 15.0),
    Case("churn_2w_tiny_h10", "tiny", 2, 4, 10, 25, 2, 16, 15.0, 200),
]
SMOKE = Case("churn_2w_tiny_h5", "tiny", 2, 4, 5, 5, 2, 16, 2.0, 100)
TARGET = 0.95


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of each job")
    parser.add_argument("--slots", type=int, help="slots of each job")
    parser.add_argument("--events", action="store_true", help="print the events of the disturbed job on stderr")
    arguments = parser.parse_args()
    cases = chosen("churn", named([SMOKE] if arguments.smoke else CASES), arguments.only)
    # Makes `timeout` and `kill` end the cluster too.
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
            own = replace(
                case,
                num_rounds=arguments.rounds or case.num_rounds,
                num_slots=arguments.slots or case.num_slots,
                slot_batch=case.slot_batch * case.num_slots // (arguments.slots or case.num_slots),
            )
            results.append(measure(own, data, Path(temporary) / case.name, arguments.events))
    report("churn", results)


def recipe_of(case: Case, data: Path, directory: Path, name: str) -> Recipe:
    return parse_recipe(
        {
            "name": name,
            "seed": 1,
            "run_root": str(directory / "runs"),
            "model": {"config": MODELS[case.model]},
            "training": {
                "num_steps": case.num_rounds * case.round_steps,
                "num_slots": case.num_slots,
                "global_batch": case.slot_batch * case.num_slots,
                "microbatch": case.slot_batch,
                "sequence_length": case.sequence_length,
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "codec": {"push": "int4", "pull": "delta-int4"},
            "data": {"path": str(data)},
            "validation": {"interval_steps": 0},
            "checkpoint": {"interval_steps": 0},
            "cluster": {"min_servers": 1, "min_workers": case.num_workers},
            "local": {"steps": case.round_steps},
        }
    )


@dataclass(frozen=True)
class Walk:
    """How a job went from its first commit to its last."""

    tokens_per_second: float
    live_share: float
    num_kills: int
    sha256: str


def measure(case: Case, data: Path, directory: Path, with_events: bool) -> Result:
    """Run the job undisturbed, disturbed, and undisturbed again, because a machine's speed changes meanwhile."""
    directory.mkdir()
    with cluster(case, directory) as (address, workers), Client(address) as client:
        before = walk(client, recipe_of(case, data, directory, "before"), workers, case, 0.0)
        disturbed = walk(
            client, recipe_of(case, data, directory, "churn"), workers, case, case.kill_seconds, with_events
        )
        after = walk(client, recipe_of(case, data, directory, "after"), workers, case, 0.0)
    if len({before.sha256, disturbed.sha256, after.sha256}) != 1:
        fail("churn", f"{case.name}: the final checkpoints differ")
    if not disturbed.num_kills:
        fail("churn", f"{case.name}: the job ended before a worker was killed; give it more --rounds")
    undisturbed = (before.tokens_per_second + after.tokens_per_second) / 2
    share = disturbed.tokens_per_second / undisturbed / disturbed.live_share
    detail = (
        f"{disturbed.tokens_per_second:.0f} of {undisturbed:.0f} tokens/s ({before.tokens_per_second:.0f} before, "
        f"{after.tokens_per_second:.0f} after), {disturbed.live_share:.3f} of the workers live, "
        f"{disturbed.num_kills} kills, same bits"
    )
    return result(f"share_{case.name}", share, TARGET, detail)


def walk(
    client: Client, recipe: Recipe, workers: Workers, case: Case, kill_seconds: float, with_events: bool = False
) -> Walk:
    """Run a job; with `kill_seconds`, kill the workers in turn at this interval from the first commit on.

    None is killed while another one starts.
    """
    job = client.submit(recipe)
    steps: list[Step] = []
    ended = threading.Event()
    counted: list[float] = []
    num_kills = 0

    def disturb() -> None:
        nonlocal num_kills
        due = time.monotonic() + kill_seconds
        while not ended.wait(SAMPLE_SECONDS):
            live = sum(node.alive and node.kind == NodeKind.WORKER for node in client.nodes())
            counted.append(live / case.num_workers)
            workers.start_missing()
            if kill_seconds and time.monotonic() >= due and workers.all_up:
                workers.kill(num_kills % case.num_workers)
                num_kills += 1
                due = max(due + kill_seconds, time.monotonic())

    disturber = threading.Thread(target=disturb)
    for item in client.watch(job.job_id):
        if isinstance(item, Event) and with_events:
            print(f"{item.time:%H:%M:%S.%f} {item.kind}: {item.message}", file=sys.stderr, flush=True)
        if isinstance(item, Step):
            steps.append(item)
            if with_events:
                print(f"{item.time:%H:%M:%S.%f} round {item.version + 1}", file=sys.stderr, flush=True)
            if len(steps) == 1:
                disturber.start()
            if len(steps) == case.num_rounds:
                ended.set()
    disturber.join()
    found = client.job(job.job_id)
    if found.state != "finished" or len(steps) != case.num_rounds:
        raise SystemExit(f"error: {job.job_id} {found.state} after {len(steps)} rounds: {found.reason}")
    workers.await_all()
    seconds = (steps[-1].time - steps[0].time).total_seconds()
    done = Walk(
        sum(step.num_tokens for step in steps[1:]) / seconds,
        sum(counted) / len(counted),
        num_kills,
        client.checkpoints(job.job_id)[-1].state_sha256,
    )
    print(f"{case.name} {job.job_id}: {seconds:.1f} s, {done}", file=sys.stderr, flush=True)
    return done


class Workers:
    """The workers of a cluster, which can be killed and started again."""

    def __init__(self, case: Case, directory: Path, coordinator: str, stack: ExitStack):
        self._directory = directory
        self._coordinator = coordinator
        self._stack = stack
        self._slow_milliseconds = case.slow_milliseconds
        self._running: list[subprocess.Popen[str] | None] = [None] * case.num_workers

    def start_missing(self) -> None:
        """Start the workers that do not run."""
        for number, running in enumerate(self._running):
            if running is None or running.poll() is not None:
                self._running[number] = self._start(number)

    def _start(self, number: int) -> subprocess.Popen[str]:
        self._ready(number).unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "gradstream.coordinator.cli", "serve", "worker", "--insecure",
            "--name", f"worker-{number}", "--device", "cpu", "--coordinator", self._coordinator,
            "--listen", "127.0.0.1:0", "--memory", "8GiB", "--ready-file", str(self._ready(number)),
            # As on a machine of its own.
            "--cache", str(self._directory / f"cache-{number}"),
        ]  # fmt: skip
        log = self._directory / f"worker-{number}-{time.monotonic_ns()}.log"
        faults = f"slow@milliseconds={self._slow_milliseconds}" if self._slow_milliseconds else ""
        return self._stack.enter_context(process(command, {VARIABLE: faults}, log=log))

    def _ready(self, number: int) -> Path:
        return self._directory / f"worker-{number}.ready"

    @property
    def all_up(self) -> bool:
        """Whether all workers are up. A machine on which they take too long to start would never end a round else."""
        return all(self._ready(number).exists() for number in range(len(self._running)))

    def kill(self, number: int) -> None:
        running = self._running[number]
        if running is not None:
            running.kill()
            running.wait()

    def await_all(self) -> None:
        """Wait until all workers are up."""
        self.start_missing()
        for number in range(len(self._running)):
            await_file(self._ready(number))


@contextmanager
def cluster(case: Case, directory: Path) -> Iterator[tuple[str, Workers]]:
    """Run a coordinator, a server and the case's workers for the block; yield the coordinator's address."""
    with ExitStack() as stack:

        def serve(role: str, *arguments: str) -> str:
            ready = directory / f"{role}.ready"
            command = [sys.executable, "-m", "gradstream.coordinator.cli", "serve", role, "--insecure"]
            command += ["--listen", "127.0.0.1:0", "--ready-file", str(ready), *arguments]
            stack.enter_context(process(command, {}, log=directory / f"{role}.log"))
            return await_file(ready)

        address = serve("coordinator", "--state", str(directory / "state"))
        serve("parameter-server", "--name", "server", "--coordinator", address, "--memory", "8GiB", "--threads", "1")
        workers = Workers(case, directory, address, stack)
        workers.await_all()
        yield address, workers


if __name__ == "__main__":
    main()
