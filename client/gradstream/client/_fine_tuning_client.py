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
)
from gradstream.client._loop_thread import LoopThread
from gradstream.client._types import ExportProgress


class FineTuningClient:
    """Talks to a fine-tuning service.

        with FineTuningClient("10.0.0.1:7001") as client:
            made = client.create("my-task.yaml")
            client.wait(made.name)
            for piece in client.generate(made.name, "def add("):
                print(piece.text, end="")

    `address` is host:port; None takes the environment's GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001. Nothing is sent
    before the first call, which raises UnreachableError after at most `connect_timeout_seconds` when nobody answers.
    `call_timeout_seconds` bounds each unary call after that. `credentials` is a directory; None takes the environment's
    GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address, else talks in the clear.
    A name of None means the newest fine-tuning.

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
        """Send a file of examples; return its path as the service sees it, for `data.path` of a recipe.

        Raises ConfigError when the file cannot be read or is several, DataError when it is too large.
        """
        return self._thread.run(self._client.upload(path))

    def preview(
        self, recipe: AnyRecipe, overrides: Iterable[str] = (), num_examples: int = 3, *, upload: bool = False
    ) -> ExamplesPreview:
        """The first examples as they would be trained on, and what would become of all rows. Begins nothing.

        `recipe`, `overrides` and `upload` are those of `create`.

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
        """Begin a fine-tuning, once: where no answer comes it is asked for again, under the same request id. It is
        preparing its data when this returns; `wait` waits for its end.

        `recipe` is a FineTuningRecipe, the path of a recipe file, or a mapping; `overrides` are `key.sub=value` strings
        and go with a path only. Relative paths in it are made absolute against the current directory. With `upload`
        the files of `data.path` and `data.validation_path` are sent from this machine first (`upload`), so the service
        need not see them. `request_id` (1 to 64 letters, digits, '.', '_', '-') is new for each fine-tuning; a later
        call with the id of one that was taken gives that one. None: one that no other call has.

        Raises ConfigError when the recipe is wrong or its name taken, or a file to send cannot be read, DataError when
        its data is not to be found, UnreachableError, which names the request id, when it is not known whether the
        fine-tuning was taken.
        """
        return self._thread.run(self._client.create(recipe, overrides, upload=upload, request_id=request_id))

    def list(self) -> list[FineTuning]:
        """All fine-tunings, newest first."""
        return self._thread.run(self._client.list())

    def get(self, name: str | None = None) -> FineTuning:
        """One fine-tuning. Raises ConfigError when there is none of that name."""
        return self._thread.run(self._client.get(name))

    def watch(self, name: str | None = None) -> Iterator[FineTuningWatchItem]:
        """The fine-tuning whenever it has changed, and its job's history, until it has ended.

        Survives a service that goes away for a while (`unreachable_since` tells): items of the history come once, the
        fine-tuning again. The first call raises UnreachableError like any other.
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
        """Wait until a fine-tuning has ended, or `until` holds; return its last state.

        How it ended is its `state`: FineTuningState.FINISHED, or CANCELLED when a person ended it. One that failed
        raises FineTuningFailedError, with the reason. A paused one has not ended.

        `on_progress` is called with it about every `poll_seconds`. Survives a service that goes away for a while.
        """
        return self._thread.run(self._client.wait(name, on_progress, until=until, poll_seconds=poll_seconds))

    def pause(self, name: str) -> FineTuning:
        """Pause the job at its next step boundary. Returns before it rests."""
        return self._thread.run(self._client.pause(name))

    def resume(self, name: str) -> FineTuning:
        """Go on with a paused, failed or cancelled one."""
        return self._thread.run(self._client.resume(name))

    def cancel(self, name: str) -> FineTuning:
        """End it at once; its checkpoints stay."""
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
        """What a fine-tuning's best version continues `prompt` with, piece by piece as it is generated.

        `prompt` is a text, or a conversation of {"role": …, "content": …} for the tokenizer's chat template. With
        `base=True` the fine-tuning's base generates; `base="PATH"` names a base by itself, with no name. At temperature
        0 the likeliest token is taken each time. `max_new_tokens=None`: 128, or what there is room for. Ends before the
        first of the texts `stop`, which may be special tokens. Leaving the iterator ends the generation.

        Raises ConfigError for an unknown name or a prompt that is too long, CheckpointError when there is no version
        yet.
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
        """Write a result (the best version, or `version`) as a directory; return its path.

        An adapter's is peft's, a merged one a Hugging Face model's; without `kind` lora gives its adapter and full the
        model. `directory` must not exist or be empty, and never holds a part of an export.

        Raises ConfigError when the directory is not empty or there is nothing of the kind, CheckpointError when there
        is no such version, ProtocolError when what came is not what was announced.
        """
        return self._thread.run(
            self._client.export(name, directory, kind=kind, version=version, on_progress=on_progress)
        )
