"""Sources of a server's token table: a file for the coordinator, the coordinator for all other servers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from gradstream.core.credentials.authority_files import write_table
from gradstream.core.credentials.tokens import TokenTable, succeeds
from gradstream.core.errors import ConfigError, CredentialsError, GradstreamError, one_line
from gradstream.core.log import get_logger
from gradstream.core.rpc.access import SERVER, WORKER
from gradstream.core.rpc.channel import MAX_MESSAGE_BYTES, advertised_host, listen, new_server
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.rpc.guard import Guard, Note
from gradstream.core.rpc.retry import Backoff, cancelling
from gradstream.core.rpc.transport import Transport
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

log = get_logger()

LOOK_SECONDS = 1.0
"""Longest time for which a change of the file goes unnoticed."""
MIN_LOOK_SECONDS = 0.05
"""Shortest time between two looks at the file, which bounds the looks that calls with unknown tokens cause."""


class FileTokens:
    """The table in a file, which the authority replaces. Raises CredentialsError when the file is unreadable.

    If the file becomes unreadable later, the table before it stays in force, and the file is read again at every look.
    """

    def __init__(self, path: Path, trusted: Callable[[], bytes] | None = None):
        """`trusted` returns the CAs (PEM) whose authority may replace the table (`replace`)."""
        self.path = path
        self._trusted = trusted
        self._looked_at = 0.0
        self._told = ""
        self._table, self._mark = self._read()

    @property
    def table(self) -> TokenTable:
        """The table in the file, at most LOOK_SECONDS old."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            try:
                if _mark(self.path) != self._mark:
                    # Both change or neither does: the mark must belong to the table in force.
                    self._table, self._mark = self._read()
                    log.info("took up a new table of tokens", tokens=len(self._table.tokens))
                self._told = ""
            except (OSError, GradstreamError) as error:
                if one_line(error) != self._told:
                    self._told = one_line(error)
                    log.error(
                        "the new table of tokens cannot be used: the old one stays in force, and what was revoked "
                        "since is still good; trying again every second",
                        cause=self._told,
                    )
        return self._table

    def refresh(self) -> None:
        """Look at the file now, unless the last look was less than MIN_LOOK_SECONDS ago."""
        if time.monotonic() - self._looked_at >= MIN_LOOK_SECONDS:
            self._looked_at = -math.inf

    def replace(self, data: bytes, signature: bytes, certificate: bytes) -> TokenTable:
        """Replace the table in force by a table that the cluster's authority has signed; return the new one.

        Blocks while the file is written. Raises ConfigError when the signature is wrong or the table is older.
        """
        from gradstream.core.credentials import certificates

        table = TokenTable.parse(data, "the table that was sent")
        certificates.verify_signature(self._trusted() if self._trusted else b"", certificate, data, signature)
        refused = succeeds(table, self.table)
        if refused:
            raise ConfigError(refused)
        write_table(self.path, table)
        self._looked_at = -math.inf
        return table

    def _read(self) -> tuple[TokenTable, tuple[int, int, int]]:
        try:
            mark = _mark(self.path)
            text = self.path.read_bytes()
        except OSError as error:
            raise CredentialsError(
                f"the table of tokens {self.path} cannot be read ({error.strerror}); `gradstream certs init` makes it, "
                f"and --tokens names it"
            ) from None
        return TokenTable.parse(text, f"the table of tokens {self.path}"), mark


class FollowedTokens:
    """The table that the coordinator sends. The last one stays in force while the coordinator is away."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.table: TokenTable | None = None
        self._clock = clock
        self._certificates: dict[str, bytes] = {}

    def certificates(self, role: str) -> bytes | None:
        """The certificates (PEM) by which callers verify the peers of a role; None to verify by the CA alone.

        The coordinator is verified by the CA, because the table with its new certificate comes from itself.
        """
        if self.table is None or role not in (SERVER, WORKER):
            return None
        if role not in self._certificates:
            self._certificates[role] = self.table.certificates(role, self._clock())
        return self._certificates[role]

    def take(self, table: TokenTable) -> None:
        """Use this table from now on."""
        self.table, self._certificates = table, {}

    def refresh(self) -> None:
        """Do nothing: the coordinator sends each new table by itself."""

    async def follow(self, channel: grpc.aio.Channel, peer: str) -> None:
        """Take each table that the coordinator sends, until cancelled."""
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        backoff = Backoff()
        told = ""
        while True:
            try:
                with cancelling(stub.WatchTokens(coordinator_pb2.WatchTokensRequest())) as responses:
                    async for response in responses:
                        self.take(TokenTable.parse(response.table_json))
                        backoff.reset()
                        told = ""
            except grpc.aio.AioRpcError as rpc_error:
                error: GradstreamError = error_from_rpc(rpc_error, peer)
                if one_line(error) != told:
                    told = one_line(error)
                    log.warning("no table of tokens arrives, trying again until one does", cause=told)
            except GradstreamError as error:
                log.warning("the coordinator sent a table of tokens that cannot be read", cause=one_line(error))
            await asyncio.sleep(backoff.next())


class FollowingServer:
    """A gRPC server whose guard follows the coordinator's table. In the clear it has no guard."""

    def __init__(
        self,
        transport: Transport,
        listen_address: str,
        note: Note | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        takes_bulk: bool = True,
        waiting_bytes: Callable[[], int] = lambda: 0,
    ):
        """Bind the server. `note` gets the audit log's entries, `waiting_bytes` is the guard's.

        The other arguments are those of `new_server`.

        Raises ConfigError when the port is in use or the address is not this machine's.
        """
        self._tokens = FollowedTokens()
        self._guard = Guard(self._tokens, note, waiting_bytes=waiting_bytes) if transport.is_secure else None
        transport.know_peers(self._tokens.certificates)
        guards = [self._guard] if self._guard is not None else []
        self.server = new_server(*guards, max_message_bytes=max_message_bytes, takes_bulk=takes_bulk)
        self.port = listen(self.server, listen_address, transport)
        self.address = f"{advertised_host(listen_address)}:{self.port}"
        """The address by which others reach the server."""

    @asynccontextmanager
    async def following(self, channel: grpc.aio.Channel, peer: str) -> AsyncIterator[None]:
        """Follow the coordinator's table over `channel`, and end calls of revoked tokens, while the block runs."""
        tasks = []
        if self._guard is not None:
            tasks = [asyncio.create_task(self._tokens.follow(channel, peer)), asyncio.create_task(self._guard.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _mark(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
