"""Check the options of `gradstream serve`, and give their defaults."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gradstream.coordinator.cli.options import parse_size

if TYPE_CHECKING:
    from gradstream.core.metrics.address import MetricsAddress

DEFAULT_MEMORY_SHARE = 0.8


def root_directory(root: Path | None) -> str:
    """The --root option as an absolute path; empty without one."""
    return str(root.expanduser().absolute()) if root is not None else ""


def state_directory(given: Path | None, name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The --state option as an absolute path. Without one: `name` below $XDG_STATE_HOME or ~/.local/state.

    A state below ~/.local/state stays in use until there is one below $XDG_STATE_HOME: earlier versions wrote it.
    """
    usual = Path("~/.local/state").expanduser().absolute() / name
    configured = environment.get("XDG_STATE_HOME", "")
    if given is not None:
        return given.expanduser().absolute()
    # The XDG standard says to ignore a relative path.
    if not os.path.isabs(configured):
        return usual
    chosen = Path(configured) / name
    return usual if usual.is_dir() and not chosen.exists() else chosen


def default_name() -> str:
    """The default name of a node, host-pid, which no two live nodes of a cluster share."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname().split('.')[0] or 'node'}-{os.getpid()}")


def check_name(name: str) -> str:
    """Check that `name` can be a node's name and return it. Raises ConfigError if not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        from gradstream.core.errors import ConfigError

        raise ConfigError(f"--name '{name}': a name has 1 to 63 letters, digits, dots, dashes and underscores")
    return name


def check_address(address: str, option: str) -> str:
    """Check that `address` is host:port and return it. Raises ConfigError if not."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or int(port) > 65535:
        from gradstream.core.errors import ConfigError

        raise ConfigError(f"{option} '{address}' is not of the form host:port, like 127.0.0.1:7000")
    return address


def writable_directory(directory: Path, option: str) -> Path:
    """Create `directory` if needed; return its absolute path. Raises ConfigError when it cannot be written."""
    import tempfile

    from gradstream.core.errors import ConfigError

    found = directory.expanduser().absolute()
    try:
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        raise ConfigError(
            f"{option} {found} cannot be written ({error.strerror}); make it writable for this user or choose another"
        ) from None


def metrics_address(
    metrics: str | None, listen: str, credentials: Path | None, insecure: bool
) -> MetricsAddress | None:
    """The --metrics option; None for "off". Without one: on the host of --listen. Raises ConfigError."""
    if metrics == "off":
        return None
    from gradstream.core.metrics.address import MetricsAddress

    if metrics is None:
        return MetricsAddress(listen.rpartition(":")[0])
    check_address(metrics, "--metrics")
    check_exposure(metrics, credentials, insecure, "--metrics")
    host, _, port = metrics.rpartition(":")
    return MetricsAddress(host, int(port))


def check_exposure(listen: str, credentials: Path | None, insecure: bool, option: str = "--listen") -> None:
    """Raise ConfigError when a role would serve other machines without credentials and without --insecure."""
    import ipaddress

    from gradstream.core.errors import ConfigError

    if credentials is not None and insecure:
        raise ConfigError("--credentials and --insecure contradict each other; leave one out")
    host = listen.rpartition(":")[0].strip("[]")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if credentials is None and not insecure and not is_loopback:
        raise ConfigError(
            f"{option} {listen} is open to other machines, and there are no credentials; name some with --credentials "
            f"(`gradstream certs init` makes them), or use --insecure on a network where you trust every machine"
        )


def memory_bytes(memory: str | None, share: float = DEFAULT_MEMORY_SHARE) -> int:
    """The bytes of the --memory option; by default a share of the memory of the machine or container."""
    if memory is not None:
        return parse_size(memory)
    from gradstream.core.machine.memory import available_bytes

    return int(available_bytes() * share)
