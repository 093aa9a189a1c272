"""Simulates several machines on one: network namespaces joined by shaped veth links to one bridge.

    root namespace: bridge 10.77.N.254 ── veth ── namespace 0: eth0 10.77.N.1
                                       └─ veth ── namespace 1: eth0 10.77.N.2

Both ends of a link have a token bucket of the wanted rate, so each machine sends and receives at most at that rate.
Needs root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType


class Loopback:
    """A network in which all machines are this one. Bytes are counted on `lo`, where each byte passes once."""

    name = "loopback"

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    coordinator = "127.0.0.1"
    interface = "lo"

    def address(self, machine: int) -> str:
        """The address of machine number `machine`."""
        return "127.0.0.1"

    def prefix(self, machine: int) -> list[str]:
        """The words before a command that run it on a machine."""
        return []

    def sent_bytes(self, num_machines: int) -> float:
        """Bytes that have left the machines so far, on average over them, as the interface counted them."""
        with open("/sys/class/net/lo/statistics/tx_bytes", encoding="ascii") as counter:
            return int(counter.read()) / num_machines


class Namespaces:
    """`num_machines` namespaces with links of `megabits` a second."""

    interface = "eth0"

    def __init__(self, num_machines: int, megabits: int):
        self.name = f"{megabits}mbit" if megabits < 1000 else f"{megabits // 1000}gbit"
        self._id = f"gs{os.getpid() % 100_000}"
        # Addresses must differ from those of another run, and from the remains of a killed one.
        self._subnet = f"10.77.{os.getpid() % 250}"
        self.coordinator = f"{self._subnet}.254"
        self._num_machines = num_machines
        self._megabits = megabits

    def __enter__(self) -> Namespaces:
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in range(self._num_machines):
            # Removing a namespace also removes its link, but only some time later. The next network may need the name.
            _ip("link", "del", f"{self._id}-{machine}", check=False)
            _ip("netns", "del", self._namespace(machine), check=False)
        _ip("link", "del", self._id, check=False)

    def _build(self) -> None:
        _ip("link", "add", self._id, "type", "bridge")
        _ip("addr", "add", f"{self.coordinator}/24", "dev", self._id)
        _ip("link", "set", self._id, "up")
        for machine in range(self._num_machines):
            inside, outside = self._namespace(machine), f"{self._id}-{machine}"
            _ip("netns", "add", inside)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", inside)
            _ip("link", "set", outside, "master", self._id, "up")
            _ip("-n", inside, "addr", "add", f"{self.address(machine)}/24", "dev", "eth0")
            _ip("-n", inside, "link", "set", "eth0", "up")
            _ip("-n", inside, "link", "set", "lo", "up")
            shape = ["root", "tbf", "rate", f"{self._megabits}mbit", "burst", "256kb", "latency", "100ms"]
            _run(["tc", "qdisc", "add", "dev", outside, *shape])
            _run(["tc", "-n", inside, "qdisc", "add", "dev", "eth0", *shape])
        if self._num_machines > 1:
            self._check()

    def _check(self) -> None:
        """Check that machines reach each other. Docker, for example, makes the kernel drop packets of other bridges."""
        command = [*self.prefix(0), sys.executable, "-c", _REACH, self.address(1)]
        if subprocess.run(command, capture_output=True).returncode:
            raise SystemExit(
                "error: the simulated machines do not reach each other, because this machine's firewall drops "
                "forwarded packets; accept them: `iptables -I FORWARD -i gs+ -j ACCEPT`"
            )

    def address(self, machine: int) -> str:
        """The address of machine number `machine`."""
        return f"{self._subnet}.{machine + 1}"

    def prefix(self, machine: int) -> list[str]:
        """The words before a command that run it on a machine."""
        return ["ip", "netns", "exec", self._namespace(machine)]

    def sent_bytes(self, num_machines: int) -> float:
        """Bytes that have left the machines so far, on average over them, as their interfaces counted them."""
        total = 0
        for machine in range(num_machines):
            # The outer end of a machine's link receives the bytes that the machine sends.
            with open(f"/sys/class/net/{self._id}-{machine}/statistics/rx_bytes", encoding="ascii") as counter:
                total += int(counter.read())
        return total / num_machines

    def _namespace(self, machine: int) -> str:
        return f"{self._id}m{machine}"


# A refused connection also shows that the machine is reachable.
_REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), 3)
except ConnectionRefusedError:
    pass
"""


def _ip(*arguments: str, check: bool = True) -> None:
    _run(["ip", *arguments], check)


def _run(command: list[str], check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        what = f"`{' '.join(command)}` failed ({done.stderr.strip()})"
        raise SystemExit(f"error: {what}; namespaces need root and iproute2")
