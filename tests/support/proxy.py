"""A TCP proxy that simulates a network that drops packets, by holding bytes back, or one whose connections break."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Collection
from contextlib import suppress

import psutil

PIECE_BYTES = 1 << 16


class Proxy:
    """Forwards connections to `target` (host:port). Any thread may call its methods."""

    def __init__(self, target: str):
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._shut_out: frozenset[int] = frozenset()
        self._writers: dict[asyncio.StreamWriter, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Hold back all bytes, of new connections too, until `heal`. The peers get no error."""
        self._call(self._open.clear)

    def shut_out(self, pids: Collection[int]) -> None:
        """Break the connections of these processes, and their new ones, until `heal`. All others go on."""

        def shut() -> None:
            self._shut_out = frozenset(pids)
            for writer, pid in self._writers.items():
                if pid in pids:
                    writer.transport.abort()

        self._call(shut)

    def heal(self) -> None:
        """Forward again, first the bytes that were held back."""

        def mend() -> None:
            self._shut_out = frozenset()
            self._open.set()

        self._call(mend)

    def close(self) -> None:
        """End the proxy and its connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # -- in the proxy's thread -------------------------------------------------------------------------------------

    def _call(self, function: object) -> None:
        done = threading.Event()

        def call() -> None:
            function()  # type: ignore[operator]
            done.set()

        self._loop.call_soon_threadsafe(call)
        assert done.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        pid = await asyncio.to_thread(owner_of, port)
        if pid in self._shut_out:
            writer.transport.abort()
            return
        self._writers[writer] = pid
        host, _, target_port = self.target.rpartition(":")
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection(host, int(target_port))
            await asyncio.gather(self._forward(reader, far_writer), self._forward(far_reader, writer))
        except OSError:
            pass
        finally:
            del self._writers[writer]
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(PIECE_BYTES):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        finally:
            # This also ends the other direction.
            with suppress(OSError, RuntimeError):
                writer.close()


def owner_of(port: int) -> int:
    """Find the process whose end of a connection has a local TCP port; 0 when there is none."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    return 0


def free_port() -> int:
    """Find a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
