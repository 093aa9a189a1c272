# Written by `make clients` from _async_fine_tuning_client.py: change that file, not this one.
"""The blocking client of a fine-tuning service: AsyncFineTuningClient, run on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from gradstream.client._async_fine_tuning_client import AnyRecipe, AsyncFineTuningClient
from gradstream.client._fine_tuning_types import (
    ExamplesPreview,
    FineTuning,
    FineTuningWatchItem,
    GeneratedText,
    Generation,
)
from gradstream.client._job_types import ExportProgress
from gradstream.client._loop_thread import LoopThread


class FineTuningClient:
    """A client of a fine-tuning service: creates, watches and steers fine-tunings, and uses what comes of them.

        with FineTuningClient("10.0.0.1:7001") as client:
            made = client.create("my-task.yaml")
            client.wait(made.name)
            for piece in client.generate(made.name, "def add("):
                print(piece.text, end="")

    `address` is host:port; None takes the environment's GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001. `credentials` is a
    directory; None takes the environment's GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address,
    else the connection is in the clear. The first call connects, for at most `connect_timeout_seconds`;
    `call_timeout_seconds` bounds each call after that unless the method says otherwise.

    A name of None means the newest fine-tuning. A method that takes a name raises ConfigError when there is no such
    fine-tuning. Every method may raise UnreachableError when the service does not answer, CredentialsError and
    AccessError when the credentials are not accepted or do not allow the call, and BusyError when the caller asks for
    too much at once.

    Callbacks run on its own thread. Any thread may use it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connect_timeout_seconds: float = 5.0,
        call_timeout_seconds: float = 60.0,
        credentials: str | Path | None = None,
    ):
        # Raises on a bad address before there is a thread to stop.
        self._client = AsyncFineTuningClient(
            address,
            connect_timeout_seconds=connect_timeout_seconds,
            call_timeout_seconds=call_timeout_seconds,
            credentials=credentials,
        )
        self._thread = LoopThread()

    @property
    def address(self) -> str:
        """The service's address, host:port."""
        return self._client.address

    def __enter__(self) -> FineTuningClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls, close the connection and stop the thread."""
        self._thread.close(self._client.close)

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when (local time) every attempt to reach the service has failed; None when the last one succeeded."""
        return self._client.unreachable_since

    # ---- Examples --------------------------------------------------------------------------------------------------

    def upload(self, path: str | Path) -> str:
        """Send a file of examples. Return its path as the service sees it, for `data.path` of a recipe.

        Raises ConfigError when the file cannot be read, or when `path` is a directory or a glob; DataError when the
        file is too large.
        """
        return self._thread.run(self._client.upload(path))

    def preview(
        self, recipe: AnyRecipe, overrides: Iterable[str] = (), num_examples: int = 3, *, upload: bool = False
    ) -> ExamplesPreview:
        """Show the first `num_examples` examples as they would be trained on, and count what becomes of all rows.

        Creates nothing. `recipe`, `overrides` and `upload` are those of `create`. The call has no time-out, since it
        reads all rows.

        Raises ConfigError when the recipe or its base is wrong, DataError when the examples are.
        """
        return self._thread.run(self._client.preview(recipe, overrides, num_examples, upload=upload))

    # ---- Fine-tunings ----------------------------------------------------------------------------------------------

    def create(
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
        return self._thread.run(self._client.create(recipe, overrides, upload=upload, request_id=request_id))

    def list(self) -> list[FineTuning]:
        """All fine-tunings, newest first."""
        return self._thread.run(self._client.list())

    def generation(self) -> Generation:
        """How many requests generate and wait, and the memory of their keys and values."""
        return self._thread.run(self._client.generation())

    def get(self, name: str | None = None) -> FineTuning:
        """One fine-tuning: its job, its examples, how good base and result are."""
        return self._thread.run(self._client.get(name))

    def watch(self, name: str | None = None) -> Iterator[FineTuningWatchItem]:
        """Iterate over a fine-tuning's changes and its job's history until it has ended.

        An item is the FineTuning, each time it has changed, or an Event, Step, Validation, LogLine or Checkpoint of its
        job. While the service does not answer, the client retries without a limit; `unreachable_since` says since when.
        After a retry the FineTuning comes again, the items of the history do not.

        Raises UnreachableError when the service does not answer the first call.
        """
        return self._thread.iterate(self._client.watch(name))

    def wait(
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
        return self._thread.run(self._client.wait(name, on_progress, until=until, poll_seconds=poll_seconds))

    def pause(self, name: str) -> FineTuning:
        """Pause a fine-tuning's job at its next step boundary. Return at once, before it rests.

        Raises ConfigError when its job does not run.
        """
        return self._thread.run(self._client.pause(name))

    def resume(self, name: str) -> FineTuning:
        """Resume a paused, failed or cancelled fine-tuning. Raises ConfigError for one that cannot be resumed."""
        return self._thread.run(self._client.resume(name))

    def cancel(self, name: str) -> FineTuning:
        """End a fine-tuning at once. Its checkpoints stay. Raises ConfigError when it has ended."""
        return self._thread.run(self._client.cancel(name))

    # ---- Results ---------------------------------------------------------------------------------------------------

    def generate(
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
    ) -> Iterator[GeneratedText]:
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
        return self._thread.iterate(
            self._client.generate(
                name,
                prompt,
                base=base,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
            )
        )

    def export(
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
        return self._thread.run(
            self._client.export(name, directory, kind=kind, version=version, on_progress=on_progress)
        )
