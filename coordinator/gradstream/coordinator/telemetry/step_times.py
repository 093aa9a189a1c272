"""Break a step's time down by cause, as means of the workers' StepTimes over the last steps, and give advice.

With local steps, a step here is what lies between two versions: a round.

A worker knows when its last contribution was acknowledged and when the next version arrived. Between the two it waits
for the slots of other workers and for the servers' commit. The others wait for the worker that waits least. Its wait is
the servers' part; the rest of the others' waits is the slots' part. No clocks are compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from gradstream.core.recipe.local import LocalConfig
from gradstream.core.recipe.recipe import CodecConfig
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

NUM_STEPS = 32
NUM_OPEN_STEPS = 2
"""Number of newest steps whose reports may be incomplete."""
MAX_WORKERS = 1024
NOTABLE_SHARE = 0.1
"""A cause below this share of a step is not named."""
COARSER = {"fp32": "bf16", "fp32-zstd": "int8", "bf16-zstd": "int8", "bf16": "int8", "int8": "int4"}
"""For a push codec, the next coarser one, with at most half the bytes."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a step by cause. Their sum is the step's duration."""

    compute: float = 0.0
    weights: float = 0.0
    send: float = 0.0
    slots: float = 0.0
    servers: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """The step's duration."""
        return self.compute + self.weights + self.send + self.slots + self.servers + self.other


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """A worker's means: its parts, slots per step, and payload bytes per second up and down."""

    name: str
    parts: Parts
    num_slots: float
    push_bytes_per_second: float
    pull_bytes_per_second: float
    server_seconds: tuple[float, ...] = ()
    """for each server, the time during which at least one contribution to it was under way"""

    @property
    def slot_seconds(self) -> float:
        """The worker's time for a slot; 0 when it computed none."""
        busy = self.parts.compute + self.parts.weights + self.parts.send + self.parts.other
        return busy / self.num_slots if self.num_slots else 0.0


class WorkerReport(NamedTuple):
    """A worker's StepTimes of one step, in seconds. `rest` is the wait for other workers' slots and for the servers.

    The values are plain, because a part of a message keeps the whole message, with its timeline, in memory.
    """

    compute: float
    weights: float
    send: float
    rest: float
    other: float
    num_slots: int
    push_bytes_per_second: float
    pull_bytes_per_second: float
    server_seconds: tuple[float, ...]
    round_steps: int = 0

    @classmethod
    def from_proto(cls, times: coordinator_pb2.StepTimes) -> WorkerReport:
        """The report that a message holds."""
        known = times.compute_us + times.weights_us + times.send_us + times.rest_us
        return cls(
            times.compute_us / 1e6,
            times.weights_us / 1e6,
            times.send_us / 1e6,
            times.rest_us / 1e6,
            max(0, times.period_us - known) / 1e6,
            times.num_slots,
            times.push_bytes_per_second,
            times.pull_bytes_per_second,
            tuple(each / 1e6 for each in times.server_us),
            times.round_steps,
        )


class Measured(NamedTuple):
    """The means of each worker over `num_steps` steps, or over as many rounds of `round_steps` inner steps."""

    num_steps: int = 0
    workers: tuple[WorkerParts, ...] = ()
    round_steps: int = 0


class StepWindow:
    """The reports of the last steps, by worker. One thread at a time calls `add`; any thread reads `measured`."""

    def __init__(self) -> None:
        self.measured = Measured()
        """The last steps; renewed when the reports of another step begin to come."""
        self._steps: OrderedDict[tuple[int, int], dict[str, WorkerReport]] = OrderedDict()

    def add(self, worker: str, epoch: int, version: int, times: coordinator_pb2.StepTimes) -> None:
        """Add a worker's times of a version. Steps of a superseded epoch are dropped."""
        newest = next(reversed(self._steps), (0, 0))
        if epoch < newest[0]:
            return
        if epoch > newest[0]:
            self._steps.clear()
        is_new = (epoch, version) not in self._steps
        step = self._steps.setdefault((epoch, version), {})
        if worker in step or len(step) < MAX_WORKERS:
            step[worker] = WorkerReport.from_proto(times)
        while len(self._steps) > NUM_STEPS + NUM_OPEN_STEPS:
            self._steps.popitem(last=False)
        if is_new:
            self.measured = measure(list(self._steps.values()))


def measure(steps: Sequence[Mapping[str, WorkerReport]]) -> Measured:
    """Average over `steps`, which are oldest first; workers are in the order of their names.

    Only the steps with the most reports count, because a worker that cannot report as fast as it computes leaves steps
    out. The newest steps do not count, because their reports still come. Once a job has gone over to rounds, ordinary
    steps do not count.
    """
    over = steps[:-NUM_OPEN_STEPS]
    round_steps = _round_steps(over[-1]) if over else 0
    over = [step for step in over if _round_steps(step) == round_steps]
    most = max(map(len, over), default=0)
    whole = [step for step in over if len(step) == most]
    found: dict[str, list[tuple[Parts, WorkerReport]]] = {}
    for step in whole:
        servers = min(report.rest for report in step.values())
        for worker, report in step.items():
            parts = Parts(report.compute, report.weights, report.send, report.rest - servers, servers, report.other)
            found.setdefault(worker, []).append((parts, report))
    workers = [
        WorkerParts(
            worker,
            mean([parts for parts, _ in entries]),
            sum(report.num_slots for _, report in entries) / len(entries),
            sum(report.push_bytes_per_second for _, report in entries) / len(entries),
            sum(report.pull_bytes_per_second for _, report in entries) / len(entries),
            _server_seconds([report.server_seconds for _, report in entries]),
        )
        for worker, entries in sorted(found.items())
    ]
    return Measured(len(whole), tuple(workers), round_steps)


def _round_steps(step: Mapping[str, WorkerReport]) -> int:
    return max((report.round_steps for report in step.values()), default=0)


def _server_seconds(steps: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Means by server; all steps under one plan have the same servers."""
    if len({len(step) for step in steps}) != 1:
        return ()
    return tuple(sum(server) / len(steps) for server in zip(*steps, strict=True))


def mean(parts: Sequence[Parts]) -> Parts:
    """The mean of each part."""
    return Parts(*(sum(getattr(each, field.name) for each in parts) / len(parts) for field in fields(Parts)))


def slowest_worker(workers: Sequence[WorkerParts]) -> WorkerParts | None:
    """The worker for whose slots the others wait; None if they do not wait a notable time."""
    if len(workers) < 2:
        return None
    slowest = min(workers, key=lambda worker: worker.parts.slots)
    others = mean([worker.parts for worker in workers if worker is not slowest])
    return slowest if others.slots >= NOTABLE_SHARE * others.total else None


def slowest_link(workers: Sequence[WorkerParts]) -> WorkerParts | None:
    """The worker whose link takes the most time of a step; None if no link takes a notable time."""
    slowest = max(workers, key=lambda worker: worker.parts.weights + worker.parts.send, default=None)
    if slowest is None or slowest.parts.weights + slowest.parts.send < NOTABLE_SHARE * slowest.parts.total:
        return None
    return slowest


def slowest_server(workers: Sequence[WorkerParts]) -> tuple[int, float, float] | None:
    """(a server's place in the plan, seconds its contributions are under way, those of the other servers on average).

    None unless that takes the server a notable part of a step longer than the others.
    """
    known = [worker.server_seconds for worker in workers if len(worker.server_seconds) > 1]
    if not known or len({len(each) for each in known}) != 1:
        return None
    seconds = [sum(server) / len(known) for server in zip(*known, strict=True)]
    slowest = max(range(len(seconds)), key=lambda server: seconds[server])
    others = (sum(seconds) - seconds[slowest]) / (len(seconds) - 1)
    step_seconds = mean([worker.parts for worker in workers]).total
    if seconds[slowest] - others < NOTABLE_SHARE * step_seconds:
        return None
    return slowest, seconds[slowest], others


def advise(
    workers: Sequence[WorkerParts], codec: CodecConfig, num_slots: int, local: LocalConfig | None = None
) -> tuple[str, str]:
    """Return the part to improve first and advice for people; "compute" if no other part takes a notable time.

    `local` is given if the steps are rounds.
    """
    step = "round" if local is not None else "step"
    parts = mean([worker.parts for worker in workers])
    causes = {"link": parts.weights + parts.send, "slots": parts.slots, "servers": parts.servers}
    cause = max(causes, key=lambda name: causes[name])
    if causes[cause] < NOTABLE_SHARE * parts.total:
        more = f"more workers (up to {num_slots} share a {step})" if len(workers) < num_slots else "faster workers"
        return "compute", f"compute sets the pace: {more} would help"
    if cause == "link":
        coarser = COARSER.get(codec.push)
        if local is not None:
            return cause, f"the network sets the pace: more local.steps than {local.steps} make exchanges rarer"
        help_ = f"codec.push={coarser} sends half the bytes" if coarser else "a larger training.global_batch sends less"
        return cause, f"the network sets the pace: {help_}"
    slowest = slowest_worker(workers)
    if cause == "slots" and slowest is not None:
        others = mean([worker.parts for worker in workers if worker is not slowest])
        return cause, (
            f"the others wait for {slowest.name}, which computes {slowest.parts.compute:.2f} s a {step} where they "
            f"compute {others.compute:.2f} s: more slots (training.num_slots) share the work more evenly"
        )
    if cause == "slots":
        return cause, "workers wait for each other in turn: more microbatches a slot even out their times"
    return cause, "the servers set the pace: another parameter server would help"


def breakdown(
    window: StepWindow,
    codec: CodecConfig,
    num_slots: int,
    server_names: Sequence[str] = (),
    local: LocalConfig | None = None,
) -> jobs_pb2.StepBreakdown | None:
    """The breakdown that status shows; None before a step was measured. `server_names` are those of the plan."""
    num_steps, workers, round_steps = window.measured
    if not workers:
        return None
    parts = mean([worker.parts for worker in workers])
    slowest, link, server = slowest_worker(workers), slowest_link(workers), slowest_server(workers)
    return jobs_pb2.StepBreakdown(
        num_steps=num_steps,
        round_steps=round_steps,
        mean=_message(parts),
        slowest_worker=slowest.name if slowest is not None else "",
        slowest_link=_link(link) if link is not None else "",
        slowest_server=_server(server_names, *server) if server is not None else "",
        advice=advise(workers, codec, num_slots, local if round_steps else None)[1],
        workers=[
            jobs_pb2.WorkerTimes(
                worker=worker.name,
                num_slots=worker.num_slots,
                parts=_message(worker.parts),
                push_bytes_per_second=worker.push_bytes_per_second,
                pull_bytes_per_second=worker.pull_bytes_per_second,
            )
            for worker in workers
        ],
    )


def _message(parts: Parts) -> jobs_pb2.StepParts:
    return jobs_pb2.StepParts(**{f"{field.name}_seconds": getattr(parts, field.name) for field in fields(Parts)})


def _server(names: Sequence[str], place: int, seconds: float, others: float) -> str:
    name = names[place] if place < len(names) else f"server {place} of the plan"
    return f"{name}: contributions are under way for {seconds:.2f} s, to the others for {others:.2f} s"


def _link(worker: WorkerParts) -> str:
    up, down = (_bit_rate(rate) for rate in (worker.push_bytes_per_second, worker.pull_bytes_per_second))
    return f"{worker.name}: {up} up, {down} down"


def _bit_rate(bytes_per_second: float) -> str:
    megabits = 8 * bytes_per_second / 1e6
    return f"{megabits / 1000:.1f} Gb/s" if megabits >= 999.5 else f"{megabits:.3g} Mb/s"
