"""Pulls one version of the weights from all servers at once, from each in forward order, into an inbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.codecs import codec_on_wire
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.log import get_logger
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.rpc.errors import error_from_rpc, refusal_of, refused_for_good
from gradstream.core.rpc.retry import Backoff
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.frames import Assembler, parse, verify
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.outbound import with_refusal
from gradstream.worker.timeline import Timeline, clock_ns
from gradstream.worker.weights import Arrival, Inbox, pulled_codec

log = get_logger()


class OvertakenError(Exception):
    """The servers moved on to a later version during the pull."""


class ServerPull:
    """One server's part of a pull: the version, and its bundles. The version's answer sets `push_codec`.

    Early bundles come before the answer. They are held until it says that the version is the expected one and was not
    skipped.

    `bundles` are those of the weights, `moments` those that are pulled besides at versions that share moments.
    """

    def __init__(
        self,
        plan: Plan,
        server: Server,
        bundles: dict[int, Bundle],
        stub: ParameterServerStub,
        book: CodecBook,
        moments: dict[int, Bundle],
        timeline: Timeline,
        on_bundle: Callable[[], None] = lambda: None,
    ):
        self.server = server
        self.push_codec = ""
        self.checkpoint = False
        # Unix time in seconds since which the server does not answer; None when it answers.
        self.unreachable_since: float | None = None
        # Why the server refuses the pull; empty if it does not, or does not answer.
        self.refusal = ""
        self._plan = plan
        self._stub = stub
        self._book = book
        self._on_bundle = on_bundle
        self._bundles = bundles
        self._moments = moments
        self._timeline = timeline
        self._early: list[Arrival] = []
        self._begin_ns = 0
        self._call: grpc.aio.UnaryStreamCall[pb.PullRequest, bytes] | None = None

    async def version(self, min_version: int, held_version: int | None, measured: pb.LinkMeasurement | None) -> int:
        """Request a version and return the one that the server will send. Waits without limit. Raises ProtocolError."""
        while True:
            version = await self._request(min_version, held_version, measured)
            if self._bundles_at(version).keys() == self._bundles_at(min_version).keys():
                return version
            # A request is for the bundles of `min_version`. Ordinary steps have others than the rounds after them.
            min_version, measured = version, None

    def _bundles_at(self, version: int) -> dict[int, Bundle]:
        """The bundles to pull at a version. Moments come last: validation passes need only the weights."""
        return {**self._bundles, **self._moments} if self._plan.shares_moments(version) else self._bundles

    async def _request(self, min_version: int, held_version: int | None, measured: pb.LinkMeasurement | None) -> int:
        backoff = Backoff()
        self.unreachable_since, self.refusal = None, ""
        while True:
            self.cancel()
            request = pb.PullRequest(
                job_id=self._plan.job_id,
                epoch=self._plan.epoch,
                min_version=min_version,
                bundles=list(self._bundles_at(min_version)),
                held_version=held_version,
                measured=measured,
                early=held_version is not None and self._plan.rounds.is_round(held_version),
            )
            try:
                self._call = self._stub.Pull(request)
                header = await self._answer(min_version)
                self.push_codec = codec_on_wire(header.push_codec).name
                self.checkpoint = header.checkpoint
                self.unreachable_since = None
                return header.version
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.server.title)
                if refused_for_good(error):
                    raise error from None
                self.refusal = refusal_of(rpc_error)
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    log.info("a pull waits for its server", server=self.server.name, cause=one_line(error))
            await asyncio.sleep(backoff.next())

    async def _answer(self, min_version: int) -> pb.WeightsHeader:
        """Read the answer that names the version, and hold the early bundles before it. Raises ProtocolError."""
        assert self._call is not None
        bundles = self._bundles_at(min_version)
        missing = set(bundles)
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        self._early = []
        self._begin_ns = 0
        while isinstance(message := await self._call.read(), bytes):
            self.unreachable_since = None
            encoded, piece = parse(message)
            header = None if encoded is None else _decode(bytes(encoded), self.server)
            if header is not None and not header.payload_bytes:
                if header.early_void or header.version != min_version:
                    self._early = []
                return header
            self._begin_ns = self._begin_ns or clock_ns()
            arrival = self._take(header, piece, assembler, min_version, bundles, missing)
            if arrival is not None:
                self._early.append(arrival)
        raise ProtocolError(f"server {self.server.name} ended a pull without an answer")

    def _take(
        self,
        header: pb.WeightsHeader | None,
        piece: memoryview,
        assembler: Assembler[pb.WeightsHeader],
        version: int,
        bundles: Mapping[int, Bundle],
        missing: set[int],
    ) -> Arrival | None:
        """Take a message of a bundle; return the bundle once it is whole. Raises ProtocolError."""
        if header is not None:
            self._check(header, version, bundles, missing)
            assembler.begin(header)
        whole = assembler.add(piece)
        if whole is None:
            return None
        header, payload = whole
        verify(header, payload, f"bundle {header.bundle} of version {header.version}")
        missing.discard(header.bundle)
        # The stream carries one bundle after another: a bundle's first byte follows the last byte of the bundle before.
        end_ns = clock_ns()
        self._timeline.add(SpanKind.RECEIVE, self._begin_ns, end_ns, None, header.bundle, payload.nbytes)
        self._begin_ns = end_ns
        self._on_bundle()
        return Arrival(header, payload)

    async def receive(self, inbox: Inbox) -> int:
        """Move this server's bundles into the inbox; return the number of their bytes.

        Raises OvertakenError, ProtocolError, AioRpcError.
        """
        if self._call is None:
            raise RuntimeError("version() comes first")
        bundles = self._bundles_at(inbox.version)
        missing = set(bundles)
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        num_bytes = 0

        def put(arrival: Arrival) -> None:
            nonlocal num_bytes
            num_bytes += arrival.payload.nbytes
            inbox.put(arrival)

        early, self._early = self._early, []
        for arrival in early:
            missing.discard(arrival.header.bundle)
            put(arrival)
        self._begin_ns = clock_ns()
        try:
            # Always read(): grpc.aio does not allow mixing read() with iteration.
            while isinstance(message := await self._call.read(), bytes):
                encoded, piece = parse(message)
                header = None if encoded is None else _decode(bytes(encoded), self.server)
                if whole := self._take(header, piece, assembler, inbox.version, bundles, missing):
                    put(whole)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:
                raise OvertakenError from None
            raise
        if missing:
            raise ProtocolError(f"server {self.server.name} ended a pull with {len(missing)} bundles missing")
        return num_bytes

    def cancel(self) -> None:
        """Give up the call under way, if any."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _check(self, header: pb.WeightsHeader, version: int, bundles: Mapping[int, Bundle], missing: set[int]) -> None:
        """Check a header against the plan before anything is allocated for it. Raises ProtocolError."""
        what = f"server {self.server.name}, bundle {header.bundle}"
        if header.bundle not in missing:
            raise ProtocolError(f"{what}: not asked for, or sent twice")
        if header.version != version:
            raise ProtocolError(f"{what}: version {header.version} in a pull of version {version}")
        try:
            bundle = bundles[header.bundle]
            pull = self._plan.codec_of(bundle, self._plan.recipe.codec.pull)
            codec = pulled_codec(self._book, bundle, pull, header)
            codec.check_sizes(header.fragment_bytes, header.payload_bytes)
        except ProtocolError as error:
            raise ProtocolError(f"{what}: {error}") from None


class Puller:
    """Pulls whole versions of the tensors that worker number `worker` of a replica needs."""

    def __init__(self, plan: Plan, stubs: list[ParameterServerStub], timeline: Timeline, worker: int = 0):
        book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self._plan = plan
        self._timeline = timeline
        # One target a server. They are made once a plan, because every version has a pull.
        needed = {tensor for tensor, _ in plan.uses_of_worker(worker)}

        def of(server: int, bundles: Sequence[Bundle]) -> dict[int, Bundle]:
            return {bundle.index: bundle for bundle in bundles if bundle.server == server and bundle.is_of(needed)}

        targets = [
            (server, of(index, plan.bundles), stub, book, of(index, plan.moment_bundles))
            for index, (server, stub) in enumerate(zip(plan.servers, stubs, strict=True))
        ]
        # Servers that hold none of the worker's bundles are not asked. A worker whose stages have nothing trainable
        # still has to learn of new versions: it asks the leader.
        self._targets = [target for target in targets if target[1]] or [targets[plan.leader]]
        self._receiving: asyncio.Task[None] | None = None
        self._inbox: Inbox | None = None  # of the last pull
        self._asking: list[ServerPull] = []
        self.num_bundles = 0
        """Bundles received so far."""
        self.received_bytes = 0

    @property
    def cut_off(self) -> tuple[str, float] | None:
        """The server that has not answered for longest, and since when in Unix seconds; None when all answer.

        A server that answers with a refusal is named with the refusal.
        """
        silent = [(with_refusal(pull.server.title, pull.refusal), pull.unreachable_since) for pull in self._asking]
        return min(((title, since) for title, since in silent if since is not None), key=lambda p: p[1], default=None)

    async def next(
        self, min_version: int, held_version: int | None = None, measured: pb.LinkMeasurement | None = None
    ) -> Inbox:
        """Wait until all servers send a common version of at least `min_version`; return its inbox, which fills up.

        `held_version` is the version that this worker holds, or will hold when the pull under way is over; the version
        after it may come as differences. With `held_version` the request is sent only when the pull under way is over:
        the worker waits for that pull's bundles, and servers on the same machine need the processor to make them.
        Without `held_version` a pull under way is given up as soon as the servers have answered with a version.
        """
        if held_version is not None:
            await self.settled()
            if self._inbox is not None and self._inbox.failed:
                held_version = None
        pulls = self._asking = [
            ServerPull(self._plan, *target, self._timeline, self._count) for target in self._targets
        ]
        try:
            versions = list(
                await asyncio.gather(*(pull.version(min_version, held_version, measured) for pull in pulls))
            )
            # Servers publish a commit within moments of each other: request the latest version from those behind it.
            while len(set(versions)) > 1:
                latest = max(versions)
                behind = [index for index, version in enumerate(versions) if version < latest]
                for index, version in zip(
                    behind,
                    await asyncio.gather(*(pulls[index].version(latest, held_version, None) for index in behind)),
                    strict=True,
                ):
                    versions[index] = version
        except BaseException:
            for pull in pulls:
                pull.cancel()
            raise
        finally:
            self._asking = []
        await self.stop()
        inbox = self._inbox = Inbox(versions[0], pulls[0].push_codec, pulls[0].checkpoint)
        self._receiving = asyncio.create_task(self._receive(pulls, inbox))
        return inbox

    def _count(self) -> None:
        self.num_bundles += 1

    @property
    def is_receiving(self) -> bool:
        """Whether a pull is under way whose bundles have not all arrived."""
        return self._receiving is not None and not self._receiving.done()

    async def settled(self) -> None:
        """Wait until no pull is under way: all of its bundles have arrived, or it broke off."""
        if self._receiving is not None:
            await asyncio.wait([self._receiving])

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
