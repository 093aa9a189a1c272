"""Where a role serves its metrics."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from gradstream.core.errors import ConfigError

FIRST_PORT = 9464
"""The port of containers, and the first one that is tried where none is given: that of OpenTelemetry's exporters."""
NUM_PORTS = 100
"""Ports that are tried, beginning with FIRST_PORT, before any free one is taken."""


@dataclass(frozen=True)
class MetricsAddress:
    """A host and a port, 0 for any free one, or None for the first free one from FIRST_PORT on."""

    host: str
    port: int | None = None

    def bind(self) -> socket.socket:
        """Listen there. Raises ConfigError when the port is in use or the address is not this machine's."""
        if self.port is not None:
            return self._bind(self.port)
        for port in range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
            try:
                return self._bind(port)
            except _InUseError:
                continue
        return self._bind(0)

    def _bind(self, port: int) -> socket.socket:
        host = self.host.strip("[]")
        cure = "choose another with --metrics HOST:PORT, or none with --metrics off"
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            return socket.create_server((host, port), family=family, backlog=16)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _InUseError(f"cannot serve metrics on {self.host}:{port}: the port is in use; {cure}") from None
            raise ConfigError(f"cannot serve metrics on {self.host}:{port}: {error.strerror}; {cure}") from None


class _InUseError(ConfigError):
    """The port is in use."""
