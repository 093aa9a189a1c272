"""bench-transport: the push path (socket to accumulated fp32) and the pull path (to module parameters), each against a
raw TCP loopback copy of the same bytes.

The server and each sender are processes of their own (standalone.py), the rival is `sendall` and `recv_into` between
two processes with calls of the same size. In every round each of them moves the same bytes once, in turns; the median
of the rounds' ratios is reported. A push is over when every contribution is in the sum, a pull when it is decoded.
Beside them, what gRPC alone makes of messages that are built before and dropped after, and what TLS costs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from report import Result, report, result
from standalone import Child, make_plan, payloads_of, run_sender, run_server

from gradstream.core.authority import Authority
from gradstream.core.wire import PIECE_BYTES

PIECES_BYTES = [
    64 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    (4 << 20) - 4096,
]  # the limit is 4 MiB with the header
NUM_SENDERS = [1, 2, 4, 8]
NUM_ROUNDS = 7
NUM_SLOTS = 512
TARGET = 0.45


class RawTcp:
    """The rival: bytes from this process into the memory of another one."""

    def __init__(self, most_bytes: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs, most_bytes), daemon=True)
        self._process.start()
        self._socket = socket.create_connection(("127.0.0.1", self._pipe.recv()))
        self._source = memoryview(bytearray(os.urandom(most_bytes)))

    def seconds(self, num_bytes: int, piece_bytes: int) -> float:
        """Seconds to copy `num_bytes`."""
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


def _receive(pipe: Connection, most_bytes: int) -> None:
    target = memoryview(bytearray(most_bytes))
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

    def __init__(self, stack: ExitStack, codec: str, num_senders: int, credentials: Path | None = None):
        self.plan = make_plan(codec, NUM_SLOTS)
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
        """Begin anew with another codec."""
        self.plan = make_plan(codec, NUM_SLOTS)
        self.num_bytes = sum(payload.nbytes for payload in payloads_of(self.plan))
        self._num_slots = 0
        address = self._server.ask("load", self.plan)
        for sender in self._senders:
            sender.ask("connect", address, self.plan, 1)

    def push(self, num_senders: int, piece_bytes: int) -> float:
        """Seconds in which a slot's contributions, dealt to the senders, come into the sum."""
        bundles = list(range(len(self.plan.bundles)))
        senders = self._senders[:num_senders]
        for number, sender in enumerate(senders):
            sender.tell("push", [[(self._num_slots, bundles[number::num_senders])]], piece_bytes)
        began = min(sender.answer() for sender in senders)
        self._num_slots += 1
        ended: float = self._server.ask("wait_added", self._num_slots)
        return ended - began

    def pull(self) -> float:
        """Seconds in which a sender pulls all the weights."""
        began, ended = self._senders[0].ask("pull", 0)
        return float(ended - began)

    def bare(self, piece_bytes: int) -> float:
        """Seconds in which gRPC alone moves as many bytes, in messages that are built already and then dropped."""
        began, ended = self._senders[0].ask("push_bare", self.num_bytes, piece_bytes)
        return float(ended - began)

    def compare(self, name: str, target: float, piece_bytes: int, ours_seconds: Callable[[], float]) -> Result:
        """The ratio to the rival."""
        ratios, speeds, rivals = [], [], []
        for number in range(NUM_ROUNDS + 1):
            ours = ours_seconds()
            rival = self.raw.seconds(self.num_bytes, piece_bytes)
            if number:  # the first one warms up
                ratios.append(rival / ours)
                speeds.append(self.num_bytes / ours / 1e9)
                rivals.append(self.num_bytes / rival / 1e9)
        detail = (
            f"{statistics.median(speeds):.2f} GB/s against {statistics.median(rivals):.2f}; "
            f"ratios {min(ratios):.2f} to {max(ratios):.2f}"
        )
        print(f"{name}: {statistics.median(ratios):.3f} ({detail})", flush=True)
        return result(name, statistics.median(ratios), target, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, help="write a chart of the ratios by piece size")
    options = parser.parse_args()
    results = []
    with ExitStack() as stack:
        bench = Bench(stack, "fp32", max(NUM_SENDERS))
        by_piece = [
            bench.compare(f"push_fp32_1_sender_{piece >> 10}_kib", TARGET, piece, partial(bench.push, 1, piece))
            for piece in PIECES_BYTES
        ]
        results += by_piece
        name = f"{PIECE_BYTES >> 10}_kib"
        results.append(bench.compare(f"grpc_alone_{name}", 0.0, PIECE_BYTES, partial(bench.bare, PIECE_BYTES)))
        for num_senders in NUM_SENDERS[1:]:
            push = partial(bench.push, num_senders, PIECE_BYTES)
            results.append(bench.compare(f"push_fp32_{num_senders}_senders_{name}", TARGET, PIECE_BYTES, push))
        results.append(bench.compare(f"pull_fp32_{name}", TARGET, PIECE_BYTES, bench.pull))
        for codec in ("bf16", "int8"):
            bench.use(codec)
            push = partial(bench.push, 1, PIECE_BYTES)
            results.append(bench.compare(f"push_{codec}_1_sender_{name}", TARGET, PIECE_BYTES, push))
            results.append(bench.compare(f"pull_{codec}_{name}", TARGET, PIECE_BYTES, bench.pull))
    with ExitStack() as stack:
        results += _compare_tls(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    if options.png:
        _draw(by_piece, options.png)
    report("transport", results)


def _compare_tls(stack: ExitStack, directory: Path) -> list[Result]:
    """What TLS and the tokens cost: the same path with credentials against the one in the clear, in turns."""
    with Authority.init(directory / "authority", directory / "coordinator" / "tokens.json") as authority:
        for role in ("server", "worker"):
            authority.issue(role, role, directory=directory / role)
    clear, secure = Bench(stack, "fp32", 1), Bench(stack, "fp32", 1, directory)
    results = []
    for codec in ("fp32", "int8"):
        for bench in (clear, secure):
            bench.use(codec)
        for path in ("push", "pull"):
            ratios, speeds = [], []
            for number in range(NUM_ROUNDS + 1):
                seconds = [bench.push(1, PIECE_BYTES) if path == "push" else bench.pull() for bench in (clear, secure)]
                if number:  # the first one warms up
                    ratios.append(seconds[0] / seconds[1])
                    speeds.append(secure.num_bytes / seconds[1] / 1e9)
            ratio = statistics.median(ratios)
            detail = f"{statistics.median(speeds):.2f} GB/s; ratios {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{path}_{codec}_tls: {ratio:.3f} of the same in the clear ({detail})", flush=True)
            results.append(result(f"{path}_{codec}_tls_to_clear", ratio, 0.0, detail))
    return results


def _draw(by_piece: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([piece >> 10 for piece in PIECES_BYTES], [item.value for item in by_piece], marker="o")
    axes.axhline(TARGET, linestyle="--", color="gray", label="target")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("message payload, KiB")
    axes.set_ylabel("push path / raw TCP of the same bytes")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
