"""Weights coming: one version pulled from all servers at once, each in forward order, into an inbox."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.codecs import codec_named
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.fragments import Fragment
from gradstream.core.log import get_logger
from gradstream.core.plan import Plan, Server
from gradstream.core.rpc import Backoff, error_from_rpc, refused_for_good
from gradstream.core.wire import Assembler, ParameterServerStub, parse, verify
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.weights import Inbox

log = get_logger()


class OvertakenError(Exception):
    """The servers moved on to a later version during the pull."""


class ServerPull:
    """One server's part of a pull: first the version, then its fragments."""

    def __init__(self, plan: Plan, server: Server, fragments: dict[int, Fragment], stub: ParameterServerStub):
        self.server = server
        self._plan = plan
        self._stub = stub
        self._codec = codec_named(plan.recipe.codec.pull)
        self._fragments = fragments
        self._call: grpc.aio.UnaryStreamCall[pb.PullRequest, bytes] | None = None

    async def version(self, min_version: int) -> int:
        """Ask for a version and return which one comes; waits as long as it takes. Raises ProtocolError."""
        backoff = Backoff()
        since: float | None = None
        while True:
            self.cancel()
            request = pb.PullRequest(
                job_id=self._plan.job_id,
                epoch=self._plan.epoch,
                min_version=min_version,
                codec=self._codec.wire,
                fragments=list(self._fragments),
            )
            try:
                self._call = self._stub.Pull(request)
                first = await self._call.read()
                if not isinstance(first, bytes):  # the end of the stream
                    raise ProtocolError(f"server {self.server.name} ended a pull without an answer")
                return self._header(first)[0].version
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.server.title)
                if refused_for_good(error):
                    raise error from None
                if since is None:
                    since = time.time()
                    log.info("a pull waits for its server", server=self.server.name, cause=one_line(error))
            await asyncio.sleep(backoff.next())

    async def receive(self, inbox: Inbox) -> int:
        """Move this server's fragments into the inbox; return their bytes. Raises OvertakenError, ProtocolError,
        AioRpcError."""
        if self._call is None:
            raise RuntimeError("version() comes first")
        missing = set(self._fragments)
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        num_bytes = 0
        try:
            # read() all through: grpc.aio does not allow to mix it with iteration.
            while isinstance(message := await self._call.read(), bytes):
                encoded, piece = parse(message)
                if encoded is not None:
                    header = _decode(bytes(encoded), self.server)
                    self._check(header, inbox.version, missing)
                    assembler.begin(header)
                whole = assembler.add(piece)
                if whole is not None:
                    header, payload = whole
                    verify(header, payload, f"fragment {header.fragment} of version {header.version}")
                    missing.discard(header.fragment)
                    num_bytes += payload.nbytes
                    inbox.put(header.fragment, payload)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:
                raise OvertakenError from None
            raise
        if missing:
            raise ProtocolError(f"server {self.server.name} ended a pull with {len(missing)} fragments missing")
        return num_bytes

    def cancel(self) -> None:
        """Give up the call under way, if any."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _header(self, message: bytes) -> tuple[pb.WeightsHeader, memoryview]:
        encoded, piece = parse(message)
        if encoded is None:
            raise ProtocolError(f"server {self.server.name} answered a pull without a header")
        return _decode(bytes(encoded), self.server), piece

    def _check(self, header: pb.WeightsHeader, version: int, missing: set[int]) -> None:
        """Check a header against the plan before anything is allocated for it. Raises ProtocolError."""
        what = f"server {self.server.name}, fragment {header.fragment}"
        if header.fragment not in missing:
            raise ProtocolError(f"{what}: not asked for, or sent twice")
        if header.version != version:
            raise ProtocolError(f"{what}: version {header.version} in a pull of version {version}")
        if header.codec != self._codec.wire:
            raise ProtocolError(f"{what}: codec {header.codec}, but {self._codec.name} was asked for")
        expected = self._codec.encoded_bytes(self._fragments[header.fragment].num_elements)
        if header.payload_bytes != expected:
            raise ProtocolError(f"{what}: payload of {header.payload_bytes} bytes announced, {expected} needed")


class Puller:
    """Pulls whole versions of the model."""

    def __init__(self, plan: Plan, stubs: list[ParameterServerStub]):
        self._plan = plan
        # By server, once a plan: a pull is made a version.
        self._targets = [
            (server, {fragment.index: fragment for fragment in plan.fragments_of(index)}, stub)
            for index, (server, stub) in enumerate(zip(plan.servers, stubs, strict=True))
        ]
        self._receiving: asyncio.Task[None] | None = None
        self.received_bytes = 0

    async def next(self, min_version: int) -> Inbox:
        """Wait until all servers have a common version of at least `min_version` under way; return its inbox, filling.

        A pull begun earlier is given up.
        """
        pulls = [ServerPull(self._plan, *target) for target in self._targets]
        try:
            versions = list(await asyncio.gather(*(pull.version(min_version) for pull in pulls)))
            # Servers publish a commit within moments of each other: ask those that are behind for the latest again.
            while len(set(versions)) > 1:
                latest = max(versions)
                behind = [index for index, version in enumerate(versions) if version < latest]
                for index, version in zip(
                    behind, await asyncio.gather(*(pulls[index].version(latest) for index in behind)), strict=True
                ):
                    versions[index] = version
        except BaseException:
            for pull in pulls:
                pull.cancel()
            raise
        await self.stop()
        inbox = Inbox(versions[0])
        self._receiving = asyncio.create_task(self._receive(pulls, inbox))
        return inbox

    async def stop(self) -> None:
        """Give up the pull under way."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
            self._receiving = None

    async def _receive(self, pulls: list[ServerPull], inbox: Inbox) -> None:
        try:
            received = await asyncio.gather(*(pull.receive(inbox) for pull in pulls))
            self.received_bytes += sum(received)
        except asyncio.CancelledError:
            inbox.fail()
            raise
        except (OvertakenError, grpc.aio.AioRpcError) as error:
            log.info("a pull broke off, trying again", version=inbox.version, cause=type(error).__name__)
            inbox.fail()
        except Exception as error:
            inbox.fail(error)
        finally:
            for pull in pulls:
                pull.cancel()


def _decode(encoded: bytes, server: Server) -> pb.WeightsHeader:
    try:
        return pb.WeightsHeader.FromString(encoded)
    except DecodeError:
        raise ProtocolError(f"server {server.name} sent a header that is not a valid message") from None
