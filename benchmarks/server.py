"""bench-server: one server process with 1 to 64 senders: goodput, processor time per GB, memory, a checkpoint's cost.

Each sender is a stream on a channel of its own. The senders are spread over at most 4 processes, because the machine
has few cores. All push whole slots at once, so contributions arrive out of turn, as in a step of many workers. The
cases of late slots and of a checkpoint are in server_memory.py.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from report import Result, arguments_parser, chosen, fail, report, result
from server_memory import CASES as MEMORY_CASES
from standalone import Child, Usage, make_plan, payloads_of, run_sender, run_server

from gradstream.core.wire.frames import PIECE_BYTES

NUM_SENDERS = [1, 2, 4, 8, 16, 32, 64]
MAX_PROCESSES = 4
NUM_SLOTS = 64
SMOKE_SENDERS = 2
NUM_ROUNDS = 3
CODEC = "int8"
TARGET_LINEAR = 0.67
"""Target of processor time per GB with 1 sender over that with 64; it is 1 when cost is proportional to bytes."""


def main() -> None:
    arguments = arguments_parser(__doc__).parse_args()
    names = {f"{number}_senders": number for number in NUM_SENDERS} | dict.fromkeys(MEMORY_CASES, 0)
    cases = chosen("server", names, arguments.only)
    counts = [number for number in cases.values() if number and (not arguments.smoke or number <= SMOKE_SENDERS)]
    memory_cases = [MEMORY_CASES[name] for name in cases if name in MEMORY_CASES]
    if not counts and not memory_cases:
        fail("server", f"a smoke run has at most {SMOKE_SENDERS} senders")
    results = _many_senders(counts, arguments.smoke) if counts else []
    for measure in memory_cases:
        results += measure(arguments.smoke)
    report("server", results)


def _many_senders(counts: list[int], smoke: bool) -> list[Result]:
    """Push whole slots with each of these numbers of senders."""
    num_slots, num_rounds = (4, 1) if smoke else (NUM_SLOTS, NUM_ROUNDS)
    plan = make_plan(CODEC, num_slots, num_layers=1 if smoke else 4)
    slot_bytes = sum(payload.nbytes for payload in payloads_of(plan))
    bundles = list(range(len(plan.bundles)))
    results: list[Result] = []
    seconds_a_gb: dict[int, float] = {}
    with ExitStack() as stack:
        server = Child(run_server, "server")
        stack.callback(server.close)
        senders = [Child(run_sender, f"sender-{number}") for number in range(min(MAX_PROCESSES, max(counts)))]
        for sender in senders:
            stack.callback(sender.close)
        for num_senders in counts:
            num_processes = min(MAX_PROCESSES, num_senders)
            address = server.ask("load", plan)
            for sender in senders[:num_processes]:
                sender.ask("connect", address, plan, num_senders // num_processes)
            speeds, costs = [], []
            before: Usage = server.ask("usage")
            state_bytes, resting_bytes = server.ask("state_bytes"), before.resident_bytes
            peak_bytes = 0
            for step in range(num_rounds + 1):
                # Sender i has slots i, i + num_senders, …; each stream of a process belongs to one sender.
                for process, sender in enumerate(senders[:num_processes]):
                    jobs = [
                        [(slot, bundles) for slot in range(number, num_slots, num_senders)]
                        for number in range(process, num_senders, num_processes)
                    ]
                    sender.tell("push", jobs, PIECE_BYTES, step)
                began = min(sender.answer() for sender in senders[:num_processes])
                ended: float = server.ask("wait_version", step + 1)
                after: Usage = server.ask("usage")
                if step:  # the first step is the warm-up
                    speeds.append(num_slots * slot_bytes / (ended - began) / 1e9)
                    costs.append((after.cpu_seconds - before.cpu_seconds) / (num_slots * slot_bytes / 1e9))
                peak_bytes = max(peak_bytes, after.peak_resident_bytes)
                before = after
            seconds_a_gb[num_senders] = statistics.median(costs)
            # Waiting contributions and, for each stream, one in assembly and a fragment's messages in gRPC.
            bound_bytes = num_slots * slot_bytes + num_senders * 3 * PIECE_BYTES
            growth_bytes = max(1, peak_bytes - resting_bytes)
            detail = (
                f"{statistics.median(speeds):.2f} GB/s, {seconds_a_gb[num_senders]:.2f} CPU s/GB, peak "
                f"{peak_bytes >> 20} MiB, grown {growth_bytes >> 20} of {bound_bytes >> 20} MiB allowed; state "
                f"{state_bytes >> 20} MiB"
            )
            print(f"{num_senders} senders: {detail}", flush=True)
            results.append(result(f"memory_bound_over_growth_{num_senders}", bound_bytes / growth_bytes, 1.0, detail))
            results.append(result(f"gb_per_second_{num_senders}", statistics.median(speeds), 0.0))
    for num_senders in counts if NUM_SENDERS[0] in counts else ():
        if num_senders == NUM_SENDERS[0]:
            continue
        ratio = seconds_a_gb[NUM_SENDERS[0]] / seconds_a_gb[num_senders]
        results.append(result(f"cpu_per_gb_1_over_{num_senders}", ratio, TARGET_LINEAR))
    return results


if __name__ == "__main__":
    main()
