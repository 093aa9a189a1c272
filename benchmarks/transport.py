"""bench-transport: the push path (socket to accumulated fp32) and the pull path (to module parameters) against raw TCP.

The server and each sender are processes of their own (standalone.py). The rival copies the same bytes over loopback
with `sendall` and `recv_into` between two processes, in calls of the same size. In every round both move the same bytes
once, in turns; the median of the rounds' ratios is reported. A push is over when every contribution is in the sum, a
pull when it is decoded. Further figures: gRPC alone, with messages that are built before and dropped after, and the
cost of TLS.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from report import Result, arguments_parser, chosen, report, result
from standalone import Child, make_plan, payloads_of, run_sender, run_server

from gradstream.coordinator.cli.pictures import style
from gradstream.core.credentials.authority import Authority
from gradstream.core.wire.frames import PIECE_BYTES

PIECES_BYTES = [
    64 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    (4 << 20) - 4096,
]  # the limit is 4 MiB with the header
NUM_SENDERS = [1, 2, 4, 8]
NUM_SLOTS = 512
TARGET = 0.45


@dataclass(frozen=True)
class Size:
    """The size of the measurement."""

    num_rounds: int = 7
    num_layers: int = 4


SMOKE = Size(1, 1)


class RawTcp:
    """The rival: copies bytes from this process into the memory of another one."""

    def __init__(self, max_bytes: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs, max_bytes), daemon=True)
        self._process.start()
        self._socket = socket.create_connection(("127.0.0.1", self._pipe.recv()))
        self._source = memoryview(bytearray(os.urandom(max_bytes)))

    def seconds(self, num_bytes: int, piece_bytes: int) -> float:
        """Measure the seconds to copy `num_bytes`."""
        self._pipe.send((num_bytes, piece_bytes))
        self._pipe.recv()
        began = time.monotonic()
        for begin in range(0, num_bytes, piece_bytes):
            self._socket.sendall(self._source[begin : min(num_bytes, begin + piece_bytes)])
        ended: float = self._pipe.recv()
        return ended - began

    def close(self) -> None:
        """End the other process."""
        self._socket.close()
        self._pipe.close()
        self._process.join(10)


def _receive(pipe: Connection, max_bytes: int) -> None:
    target = memoryview(bytearray(max_bytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        peer, _ = listener.accept()
    while True:
        try:
            num_bytes, piece_bytes = pipe.recv()
        except EOFError:
            return
        pipe.send("ready")
        filled = 0
        while filled < num_bytes:
            filled += peer.recv_into(target[filled : min(num_bytes, filled + piece_bytes)])
        pipe.send(time.monotonic())


class Bench:
    """A server, its senders and the rival."""

    def __init__(self, stack: ExitStack, codec: str, num_senders: int, size: Size, credentials: Path | None = None):
        self._size = size
        self.plan = make_plan(codec, NUM_SLOTS, size.num_layers)
        self.num_bytes = sum(payload.nbytes for payload in payloads_of(self.plan))
        self.raw = RawTcp(self.num_bytes)
        stack.callback(self.raw.close)
        self._server = Child(partial(run_server, credentials=credentials), "server")
        stack.callback(self._server.close)
        sender = partial(run_sender, credentials=credentials)
        self._senders = [Child(sender, f"sender-{number}") for number in range(num_senders)]
        for sender in self._senders:
            stack.callback(sender.close)
        self.use(codec)

    def use(self, codec: str) -> None:
        """Load a new plan with another codec."""
        self.codec = codec
        self.plan = make_plan(codec, NUM_SLOTS, self._size.num_layers)
        self.num_bytes = sum(payload.nbytes for payload in payloads_of(self.plan))
        self._num_slots = 0
        address = self._server.ask("load", self.plan)
        for sender in self._senders:
            sender.ask("connect", address, self.plan, 1)

    def push(self, num_senders: int, piece_bytes: int) -> float:
        """Measure the seconds until a slot's contributions, divided among the senders, are in the sum."""
        bundles = list(range(len(self.plan.bundles)))
        senders = self._senders[:num_senders]
        for number, sender in enumerate(senders):
            sender.tell("push", [[(self._num_slots, bundles[number::num_senders])]], piece_bytes)
        began = min(sender.answer() for sender in senders)
        self._num_slots += 1
        ended: float = self._server.ask("wait_added", self._num_slots)
        return ended - began

    def pull(self) -> float:
        """Measure the seconds in which a sender pulls all weights."""
        began, ended = self._senders[0].ask("pull", 0)
        return float(ended - began)

    def bare(self, piece_bytes: int) -> float:
        """Measure the seconds in which gRPC alone moves as many bytes, in prebuilt messages that are dropped."""
        began, ended = self._senders[0].ask("push_bare", self.num_bytes, piece_bytes)
        return float(ended - began)

    def seconds(self, case: Case) -> float:
        """Measure the seconds of one round of a case."""
        if case.path == "push":
            return self.push(case.num_senders, case.piece_bytes)
        return self.pull() if case.path == "pull" else self.bare(case.piece_bytes)

    def compare(self, case: Case) -> Result:
        """Measure a case; return its ratio to the rival."""
        ratios, speeds, rivals = [], [], []
        for number in range(self._size.num_rounds + 1):
            ours = self.seconds(case)
            rival = self.raw.seconds(self.num_bytes, case.piece_bytes)
            if number:  # the first round is the warm-up
                ratios.append(rival / ours)
                speeds.append(self.num_bytes / ours / 1e9)
                rivals.append(self.num_bytes / rival / 1e9)
        detail = (
            f"{statistics.median(speeds):.2f} GB/s against {statistics.median(rivals):.2f}; "
            f"ratios {min(ratios):.2f} to {max(ratios):.2f}"
        )
        print(f"{case.name}: {statistics.median(ratios):.3f} ({detail})", flush=True)
        return result(case.name, statistics.median(ratios), case.target, detail)


@dataclass(frozen=True)
class Case:
    """One figure of the path without TLS."""

    name: str
    path: Literal["push", "pull", "bare"]
    codec: str = "fp32"
    num_senders: int = 1
    piece_bytes: int = PIECE_BYTES
    target: float = TARGET


def all_cases() -> list[Case]:
    """All cases in the order of measurement: those of the same codec together."""
    by_piece = [Case(f"push_fp32_1_sender_{piece >> 10}_kib", "push", piece_bytes=piece) for piece in PIECES_BYTES]
    name = f"{PIECE_BYTES >> 10}_kib"
    return [
        *by_piece,
        Case(f"grpc_alone_{name}", "bare", target=0.0),
        *(Case(f"push_fp32_{count}_senders_{name}", "push", num_senders=count) for count in NUM_SENDERS[1:]),
        Case(f"pull_fp32_{name}", "pull"),
        *(
            case
            for codec in ("bf16", "int8")
            for case in (
                Case(f"push_{codec}_1_sender_{name}", "push", codec),
                Case(f"pull_{codec}_{name}", "pull", codec),
            )
        ),
    ]


SMOKE_NAMES = (f"push_fp32_1_sender_{PIECE_BYTES >> 10}_kib", f"pull_int8_{PIECE_BYTES >> 10}_kib")
TLS_CASES = {f"{path}_{codec}_tls_to_clear": (path, codec) for codec in ("fp32", "int8") for path in ("push", "pull")}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--png", type=Path, help="write a chart of the ratios by piece size")
    options = parser.parse_args()
    cases = {case.name: case for case in all_cases()}
    known = [*SMOKE_NAMES] if options.smoke else [*cases, *TLS_CASES]
    wanted = chosen("transport", {name: name for name in known}, options.only)
    size = SMOKE if options.smoke else Size()
    found: dict[str, Result] = {}
    clear = [case for name, case in cases.items() if name in wanted]
    with ExitStack() as stack:
        if clear:
            bench = Bench(stack, clear[0].codec, max(case.num_senders for case in clear), size)
        for case in clear:
            if bench.codec != case.codec:
                bench.use(case.codec)
            found[case.name] = bench.compare(case)
    with ExitStack() as stack:
        if secure := [name for name in TLS_CASES if name in wanted]:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found |= _compare_tls(stack, directory, secure, size)
    if options.png:
        _draw([found[case.name] for case in clear if case.name.startswith("push_fp32_1_sender")], options.png)
    report("transport", list(found.values()))


def _compare_tls(stack: ExitStack, directory: Path, names: list[str], size: Size) -> dict[str, Result]:
    """Measure the cost of TLS and tokens: the same path with credentials against the path without, in turns."""
    with Authority.init(directory / "authority", directory / "coordinator" / "tokens.json") as authority:
        for role in ("server", "worker"):
            authority.issue(role, role, directory=directory / role)
    benches = (Bench(stack, "fp32", 1, size), Bench(stack, "fp32", 1, size, directory))
    results = {}
    for name in names:
        path, codec = TLS_CASES[name]
        for bench in benches:
            if bench.codec != codec:
                bench.use(codec)
        ratios, speeds = [], []
        for number in range(size.num_rounds + 1):
            seconds = [bench.push(1, PIECE_BYTES) if path == "push" else bench.pull() for bench in benches]
            if number:  # the first round is the warm-up
                ratios.append(seconds[0] / seconds[1])
                speeds.append(benches[1].num_bytes / seconds[1] / 1e9)
        ratio = statistics.median(ratios)
        detail = f"{statistics.median(speeds):.2f} GB/s; ratios {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: {ratio:.3f} ({detail})", flush=True)
        results[name] = result(name, ratio, 0.0, detail)
    return results


def _draw(by_piece: list[Result], path: Path) -> None:
    figure = style.new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot([piece >> 10 for piece in PIECES_BYTES], [item.value for item in by_piece], "o-", color=style.BLUE)
    axes.axhline(TARGET, linestyle="--", color=style.MUTED, label="target")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("message payload, KiB")
    axes.set_ylabel("push path / raw TCP of the same bytes")
    style.frame(axes)
    style.legend(axes)
    path.write_bytes(style.encoded(figure, style.format_of(path)))


if __name__ == "__main__":
    main()
