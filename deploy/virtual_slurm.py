"""A real Slurm on this machine for tests: munged, slurmctld and a slurmd for each of several virtual nodes.

All files lie in one directory, all ports are free ones of the loopback interface, and all daemons are ended by their
process ids. Debian's slurm-wlm is installed if it is missing.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import CannotRunError, apt_install, free_port, run, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
START_SECONDS = 60.0
NODE_CPUS = 2
NODE_MIB = 4000
REQUEUE_SECONDS = 5
"""Slurm starts a requeued job after the credentials of its last run have expired; 120 s is the default."""

NODE_SECONDS = 30
"""Slurm takes a node for failed that has not answered for this long; 300 s is the default."""


class VirtualSlurm:
    """A Slurm whose nodes n1, n2, … are this machine. `environment` is that of its commands."""

    def __init__(self, directory: Path, num_nodes: int):
        self.directory = directory
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of Slurm; return its stdout. Raises AssertionError with its output when it fails."""
        return run(command, self.environment, check)

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of a job, as `scontrol show job` names them."""
        words = self.run("scontrol", "show", "job", job_id, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start(self) -> None:
        """Start all daemons, and wait until all nodes are idle. Raises CannotRunError when they do not come up."""
        self._write_files()
        munge = self.directory / "munge"
        places = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn(
            "munged",
            "munged",
            "--foreground",
            f"--socket={self.directory}/munge.socket",
            *(f"--{option}={munge}/{name}" for option, name in places.items()),
        )
        wait_until(lambda: self._up("munge", "--no-input", f"--socket={self.directory}/munge.socket"), "munged", 30)
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self.boot(node)
        wait_until(self._is_idle, "nodes to be idle", START_SECONDS, self.last_lines)

    def boot(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._spawn(node, "slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node)

    def crash(self, node: str) -> None:
        """Kill all processes of a node at once, slurmd first. Slurm finds out after NODE_SECONDS."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        for pid in _processes_of(node, self.directory):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _is_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise CannotRunError(f"{name}: {daemon.args} ended with {daemon.returncode}: {self.last_lines()}")
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def stop(self) -> None:
        """Cancel all jobs, wait for their end, and end the daemons."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            wait_until(lambda: not self.run("squeue", "--noheader", check=False).strip(), "all jobs to end", 120)
        for daemon in reversed(self._daemons.values()):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def last_lines(self) -> str:
        """The last lines that the daemons logged."""
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"{log.name}: {' | '.join(log.read_text().splitlines()[-3:])}" for log in logs)

    def _up(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def _spawn(self, name: str, *command: str) -> None:
        with (self.directory / "logs" / "daemons.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _write_files(self) -> None:
        for name in ("logs", "state", "spool", "munge"):
            (self.directory / name).mkdir(parents=True)
        # munged wants its key in a directory that nobody else enters, and its socket where everybody may.
        self.directory.chmod(0o711)
        (self.directory / "munge").chmod(0o700)
        key = self.directory / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        Path(self.environment["SLURM_CONF"]).write_text(self._configuration())

    def _configuration(self) -> str:
        host, user, place = socket.gethostname(), getpass.getuser(), self.directory
        lines = [
            "ClusterName=virtual",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={place}/munge.socket,cred_expire={REQUEUE_SECONDS}",
            "CredType=cred/munge",
            f"StateSaveLocation={place}/state",
            f"SlurmdSpoolDir={place}/spool/%n",
            f"SlurmctldLogFile={place}/logs/slurmctld.log",
            f"SlurmdLogFile={place}/logs/%n.log",
            f"SlurmctldPidFile={place}/slurmctld.pid",
            f"SlurmdPidFile={place}/%n.pid",
            # A container has no systemd, and its cgroups are not ours.
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            "MailProg=/bin/true",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory",
            f"SlurmdTimeout={NODE_SECONDS}",
            "ReturnToService=2",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={NODE_CPUS} "
                f"RealMemory={NODE_MIB}"
                for node, port in zip(self.nodes, _free_ports(len(self.nodes)), strict=True)
            ),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        return "\n".join(lines) + "\n"


def _processes_of(node: str, directory: Path) -> list[int]:
    """The processes that this Slurm has started on a virtual node: those of jobs, and the slurmstepd above them."""
    found: set[int] = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={directory}/slurm.conf".encode()} <= set(variables):
                found.add(int(place.name))
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found.add(parent)
        except OSError:  # ended meanwhile
            continue
    return sorted(found)


def _path() -> str:
    """The PATH with the directories of daemons."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> Sequence[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


@contextmanager
def virtual_slurm(directory: Path, num_nodes: int) -> Iterator[VirtualSlurm]:
    """Yield a running Slurm until the block ends. Raises CannotRunError when there is none to be had here."""
    if any(shutil.which(program, path=_path()) is None for program in PROGRAMS):
        apt_install("slurm-wlm", "munge")
    slurm = VirtualSlurm(directory, num_nodes)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
