"""The asyncio client of a fine-tuning service."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import grpc.aio

from gradstream.client._connection import Connection, Peer
from gradstream.client._errors import FineTuningFailedError
from gradstream.client._export import ExportWriter
from gradstream.client._fine_tuning_types import (
    ExamplesPreview,
    FineTuning,
    FineTuningState,
    FineTuningWatchItem,
    GeneratedText,
    Generation,
)
from gradstream.client._job_types import ExportProgress
from gradstream.client._watch_types import watch_item
from gradstream.core.errors import BusyError, ConfigError, UnreachableError
from gradstream.core.recipe.files import absolute_path
from gradstream.core.recipe.fine_tuning_recipe import (
    FineTuningRecipe,
    absolute_fine_tuning_paths,
    load_fine_tuning_recipe,
    parse_fine_tuning_recipe,
)
from gradstream.core.rpc import access
from gradstream.core.rpc.requests import new_request_id
from gradstream.core.rpc.retry import Backoff, cancelling
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.proto.v1 import fine_tuning_pb2_grpc

PIECE_BYTES = 1 << 20
FINE_TUNING = Peer(
    "fine-tuning service",
    "127.0.0.1:7001",
    "gradstream serve fine-tuning",
    "GRADSTREAM_FINE_TUNING",
    "--service",
    access.FINE_TUNING,
)

AnyRecipe = FineTuningRecipe | str | Path | Mapping[str, Any]


def default_fine_tuning_address() -> str:
    """The fine-tuning service's address from the environment's GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001."""
    return os.environ.get(FINE_TUNING.variable) or FINE_TUNING.default_address


class AsyncFineTuningClient:
    """A client of a fine-tuning service: creates, watches and steers fine-tunings, and uses what comes of them.

        async with AsyncFineTuningClient("10.0.0.1:7001") as client:
            made = await client.create("my-task.yaml")
            await client.wait(made.name)
            async for piece in client.generate(made.name, "def add("):
                print(piece.text, end="")

    `address` is host:port; None takes the environment's GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001. `credentials` is a
    directory; None takes the environment's GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address,
    else the connection is in the clear. The first call connects, for at most `connect_timeout_seconds`;
    `call_timeout_seconds` bounds each call after that unless the method says otherwise.

    A name of None means the newest fine-tuning. A method that takes a name raises ConfigError when there is no such
    fine-tuning. Every method may raise UnreachableError when the service does not answer, CredentialsError and
    AccessError when the credentials are not accepted or do not allow the call, and BusyError when the caller asks for
    too much at once.

    Must be made, used and closed in one event loop.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connect_timeout_seconds: float = 5.0,
        call_timeout_seconds: float = 60.0,
        credentials: str | Path | None = None,
    ):
        self._connection = Connection(
            FINE_TUNING,
            address or default_fine_tuning_address(),
            fine_tuning_pb2_grpc.FineTuningServiceStub,
            connect_timeout_seconds,
            call_timeout_seconds,
            credentials,
        )
        self.address = self._connection.address

    async def __aenter__(self) -> AsyncFineTuningClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and close the connection."""
        await self._connection.close()

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when (local time) every attempt to reach the service has failed; None when the last one succeeded."""
        return self._connection.unreachable_since

    # ---- Examples --------------------------------------------------------------------------------------------------

    async def upload(self, path: str | Path) -> str:
        """Send a file of examples. Return its path as the service sees it, for `data.path` of a recipe.

        Raises ConfigError when the file cannot be read, or when `path` is a directory or a glob; DataError when the
        file is too large.
        """
        path = await asyncio.to_thread(_file_to_send, path)

        async def pieces() -> AsyncIterator[pb.UploadExamplesRequest]:
            stream = await asyncio.to_thread(path.open, "rb")
            with stream:
                payload = await asyncio.to_thread(stream.read, PIECE_BYTES)
                yield pb.UploadExamplesRequest(file=path.name, payload=payload)
                while payload := await asyncio.to_thread(stream.read, PIECE_BYTES):
                    yield pb.UploadExamplesRequest(payload=payload)

        stub = await self._connection.connect()
        try:
            response = await stub.UploadExamples(pieces())
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None
        return response.path

    async def preview(
        self, recipe: AnyRecipe, overrides: Iterable[str] = (), num_examples: int = 3, *, upload: bool = False
    ) -> ExamplesPreview:
        """Show the first `num_examples` examples as they would be trained on, and count what becomes of all rows.

        Creates nothing. `recipe`, `overrides` and `upload` are those of `create`. The call has no time-out, since it
        reads all rows.

        Raises ConfigError when the recipe or its base is wrong, DataError when the examples are.
        """
        resolved = await self._resolved(recipe, overrides, upload)
        request = pb.PreviewExamplesRequest(
            recipe_json=resolved.model_dump_json(), num_examples=num_examples, directory=os.getcwd()
        )
        # It reads all rows, and the base before them: no deadline that fits one file would fit another.
        response = await self._connection.call(lambda stub, _: stub.PreviewExamples(request))
        return ExamplesPreview.from_proto(response)

    # ---- Fine-tunings ----------------------------------------------------------------------------------------------

    async def create(
        self,
        recipe: AnyRecipe,
        overrides: Iterable[str] = (),
        *,
        upload: bool = False,
        request_id: str | None = None,
    ) -> FineTuning:
        """Create a fine-tuning. Return it while it prepares its data; `wait` waits for its end.

        `recipe` is a FineTuningRecipe, the path of a recipe file, or a mapping; `overrides` are `key.sub=value` strings
        and go with a path only. Relative paths in the recipe are made absolute against the current directory. With
        `upload` the client first sends the files of `data.path` and `data.validation_path`, so the service need not see
        them.

        The request is idempotent: when its answer is lost, the client retries it with the same `request_id` for 10 s.
        `request_id` has 1 to 64 letters, digits, '.', '_' and '-'; None makes a new one. A later call with the id of an
        earlier one returns the earlier one's fine-tuning.

        Raises ConfigError when the recipe is wrong, with all that is wrong, when its name is taken, or when a file to
        send cannot be read; DataError when the data is missing; UnreachableError, which names the request id, when the
        client does not know whether the fine-tuning was created.
        """
        resolved = await self._resolved(recipe, overrides, upload)
        request = pb.CreateFineTuningRequest(
            recipe_json=resolved.model_dump_json(), directory=os.getcwd(), request_id=request_id or new_request_id()
        )
        response = await self._connection.call_once(
            lambda stub, timeout: stub.CreateFineTuning(request, timeout=timeout), request.request_id
        )
        return FineTuning.from_proto(response.fine_tuning)

    async def _resolved(self, recipe: AnyRecipe, overrides: Iterable[str], upload: bool) -> FineTuningRecipe:
        """The recipe, whole and with absolute paths; with `upload`, its files of examples sent and named as the service
        has them."""
        overrides = tuple(overrides)
        if isinstance(recipe, str | Path):
            resolved = await asyncio.to_thread(load_fine_tuning_recipe, recipe, overrides)
        elif overrides:
            raise ConfigError(
                "overrides go with the path of a recipe; change the mapping or the FineTuningRecipe instead"
            )
        else:
            parsed = recipe if isinstance(recipe, FineTuningRecipe) else parse_fine_tuning_recipe(recipe)
            resolved = absolute_fine_tuning_paths(parsed)
        if not upload:
            return resolved
        keys = [key for key in ("path", "validation_path") if getattr(resolved.data, key) is not None]
        for key in keys:
            await asyncio.to_thread(_file_to_send, getattr(resolved.data, key))  # before any is sent
        paths = {key: await self.upload(getattr(resolved.data, key)) for key in keys}
        return resolved.model_copy(update={"data": resolved.data.model_copy(update=paths)})

    async def list(self) -> list[FineTuning]:
        """All fine-tunings, newest first."""
        found: builtins.list[FineTuning] = []
        request = pb.ListFineTuningsRequest()
        while True:
            response = await self._connection.call(lambda stub, timeout: stub.ListFineTunings(request, timeout=timeout))
            found += map(FineTuning.from_proto, response.fine_tunings)
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def generation(self) -> Generation:
        """How many requests generate and wait, and the memory of their keys and values."""
        request = pb.GetGenerationRequest()
        response = await self._connection.call(lambda stub, timeout: stub.GetGeneration(request, timeout=timeout))
        return Generation.from_proto(response)

    async def get(self, name: str | None = None) -> FineTuning:
        """One fine-tuning: its job, its examples, how good base and result are."""
        request = pb.GetFineTuningRequest(name=name or "")
        response = await self._connection.call(lambda stub, timeout: stub.GetFineTuning(request, timeout=timeout))
        return FineTuning.from_proto(response.fine_tuning)

    async def watch(self, name: str | None = None) -> AsyncIterator[FineTuningWatchItem]:
        """Iterate over a fine-tuning's changes and its job's history until it has ended.

        An item is the FineTuning, each time it has changed, or an Event, Step, Validation, LogLine or Checkpoint of its
        job. While the service does not answer, the client retries without a limit; `unreachable_since` says since when.
        After a retry the FineTuning comes again, the items of the history do not.

        Raises UnreachableError when the service does not answer the first call.
        """
        name = (await self.get(name)).name
        cursor = 0
        backoff = Backoff()
        while True:
            ended = False
            try:
                stub = await self._connection.connect()
                with cancelling(stub.WatchFineTuning(pb.WatchFineTuningRequest(name=name))) as messages:
                    async for message in messages:
                        self._connection.unreachable_since = None
                        backoff.reset()
                        if message.HasField("fine_tuning"):
                            fine_tuning = FineTuning.from_proto(message.fine_tuning)
                            ended = fine_tuning.state.ended
                            yield fine_tuning
                        elif message.job.cursor > cursor:
                            cursor = message.job.cursor
                            item = watch_item(message.job)
                            if item is not None:
                                yield item
                # A service that shuts down may end a stream in good order too.
                if ended:
                    return
            except grpc.aio.AioRpcError as rpc_error:
                error = self._connection.error(rpc_error)
                if not isinstance(error, UnreachableError | BusyError):
                    raise error from None
            except (UnreachableError, BusyError):
                pass
            await asyncio.sleep(backoff.next())

    async def wait(
        self,
        name: str | None = None,
        on_progress: Callable[[FineTuning], None] | None = None,
        *,
        until: Callable[[FineTuning], bool] | None = None,
        poll_seconds: float = 1.0,
    ) -> FineTuning:
        """Wait until a fine-tuning has ended, or `until` returns true for it. Return it in its last state.

        The returned fine-tuning's `state` says how it ended: FineTuningState.FINISHED, or CANCELLED when a person ended
        it. A paused one has not ended.

        `on_progress` is called with the fine-tuning about every `poll_seconds`. While the service does not answer, the
        client retries without a limit, except for the first call.

        Raises FineTuningFailedError, with the reason and the fine-tuning, when it failed.
        """
        fine_tuning = await self.get(name)
        name = fine_tuning.name
        backoff = Backoff()
        while True:
            if on_progress is not None:
                on_progress(fine_tuning)
            if fine_tuning.state is FineTuningState.FAILED:
                raise FineTuningFailedError(fine_tuning)
            if fine_tuning.state.ended or (until is not None and until(fine_tuning)):
                return fine_tuning
            await asyncio.sleep(poll_seconds)
            while True:
                try:
                    fine_tuning = await self.get(name)
                    backoff.reset()
                    break
                except (UnreachableError, BusyError):
                    await asyncio.sleep(backoff.next())

    async def pause(self, name: str) -> FineTuning:
        """Pause a fine-tuning's job at its next step boundary. Return at once, before it rests.

        Raises ConfigError when its job does not run.
        """
        request = pb.PauseFineTuningRequest(name=name)
        response = await self._connection.call(lambda stub, timeout: stub.PauseFineTuning(request, timeout=timeout))
        return FineTuning.from_proto(response.fine_tuning)

    async def resume(self, name: str) -> FineTuning:
        """Resume a paused, failed or cancelled fine-tuning. Raises ConfigError for one that cannot be resumed."""
        request = pb.ResumeFineTuningRequest(name=name)
        response = await self._connection.call(lambda stub, timeout: stub.ResumeFineTuning(request, timeout=timeout))
        return FineTuning.from_proto(response.fine_tuning)

    async def cancel(self, name: str) -> FineTuning:
        """End a fine-tuning at once. Its checkpoints stay. Raises ConfigError when it has ended."""
        request = pb.CancelFineTuningRequest(name=name)
        response = await self._connection.call(lambda stub, timeout: stub.CancelFineTuning(request, timeout=timeout))
        return FineTuning.from_proto(response.fine_tuning)

    # ---- Results ---------------------------------------------------------------------------------------------------

    async def generate(
        self,
        name: str | None = None,
        prompt: str | Sequence[Mapping[str, str]] = "",
        *,
        base: bool | str = False,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Iterable[str] = (),
    ) -> AsyncIterator[GeneratedText]:
        """Continue `prompt` with a fine-tuning's best version. Iterate over the text as it is generated, in pieces.

        With `base=True` the fine-tuning's base generates instead. Without a name, `base` may name a model by itself: a
        path as the service sees it, or job:ID or job:ID@VERSION.

        `prompt` is a text, or a conversation of {"role": …, "content": …} for the tokenizer's chat template. At
        temperature 0 each token is the likeliest; above 0 it is drawn, with `seed`, among the likeliest tokens that
        together have probability `top_p`. At most `max_new_tokens` tokens are generated; None means 128, or fewer where
        the model has no room for them. The text ends before the first of the texts in `stop`, which may be special
        tokens. Leaving the iterator ends the generation.

        Raises ConfigError for an unknown name or a prompt that is too long, CheckpointError when there is no version
        yet, UnreachableError when the connection broke.
        """
        request = pb.GenerateRequest(
            name=name or "",
            use_base=base is True,
            base=absolute_path(base) if isinstance(base, str) else "",
            prompt=prompt if isinstance(prompt, str) else "",
            messages=[] if isinstance(prompt, str) else [_message(message) for message in prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        stub = await self._connection.connect()
        try:
            with cancelling(stub.Generate(request)) as messages:
                async for message in messages:
                    yield GeneratedText.from_proto(message)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None

    async def export(
        self,
        name: str | None,
        directory: str | Path,
        *,
        kind: Literal["adapter", "merged"] | None = None,
        version: int | None = None,
        on_progress: Callable[[ExportProgress], None] | None = None,
    ) -> Path:
        """Write the best version, or `version`, as a local directory. Return its path.

        `kind` "adapter" writes a directory that peft loads, "merged" a whole Hugging Face model. Without `kind` the
        method "lora" gives its adapter, and "full" the model. `directory` must be empty or not exist, and never holds a
        part of an export. `on_progress` is called after each piece.

        Raises ConfigError when the directory is not empty or there is nothing of the kind, CheckpointError when there
        is no such version, ProtocolError when the files are not as announced, and UnreachableError when the connection
        broke.
        """
        kinds = {None: pb.EXPORT_KIND_UNSPECIFIED, "adapter": pb.EXPORT_KIND_ADAPTER, "merged": pb.EXPORT_KIND_MERGED}
        request = pb.ExportFineTuningRequest(name=name or "", kind=kinds[kind], version=version)
        writer = await asyncio.to_thread(ExportWriter, directory)
        try:
            stub = await self._connection.connect()
            with cancelling(stub.ExportFineTuning(request)) as pieces:
                async for piece in pieces:
                    progress = await asyncio.to_thread(writer.write, piece)
                    if on_progress is not None:
                        on_progress(progress)
            return await asyncio.to_thread(writer.finish)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None
        finally:
            await asyncio.to_thread(writer.discard)


def _file_to_send(path: str | Path) -> Path:
    """The path of a file that can be read. Raises ConfigError for anything else."""
    path = Path(path).expanduser()
    is_glob = any(character in path.name for character in "*?[") and not path.exists()
    if path.is_dir() or is_glob:
        raise ConfigError(
            f"{path} is a {'glob' if is_glob else 'directory'}, and one file is sent; join its files into one, or "
            f"put them where the service can see them"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); correct the path") from None
    return path


def _message(message: Mapping[str, str]) -> pb.ChatMessage:
    """Raises ConfigError for a message with other fields than role and content, none of which is sent."""
    if set(message) != {"role", "content"}:
        raise ConfigError(f"a message has the fields {', '.join(sorted(message)) or 'none'}; give it role and content")
    return pb.ChatMessage(role=message["role"], content=message["content"])
