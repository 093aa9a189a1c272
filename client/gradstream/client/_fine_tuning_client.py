"""The fine-tuning client for programs without an event loop: AsyncFineTuningClient, run on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from gradstream.client._async_fine_tuning_client import AnyRecipe, AsyncFineTuningClient
from gradstream.client._fine_tuning_types import ExamplesPreview, FineTuning, FineTuningWatchItem, GeneratedText
from gradstream.client._loop_thread import LoopThread
from gradstream.client._types import ExportProgress


class FineTuningClient:
    """Talks to a fine-tuning service: the methods of AsyncFineTuningClient, each of which blocks until it is done.

        with FineTuningClient("10.0.0.1:7001") as client:
            made = client.create("my-task.yaml")
            client.wait(made.name)
            print("".join(piece.text for piece in client.generate(made.name, "def add(")))

    Callbacks run on the client's own thread. May be used from several threads.
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
    def address(self) -> str:
        """The service's address."""
        return self._client.address

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when every attempt to reach the service has failed; None when the last one succeeded."""
        return self._client.unreachable_since

    def upload(self, path: str | Path) -> str:
        """Send a file of examples; return its path as the service sees it. See AsyncFineTuningClient.upload."""
        return self._thread.run(self._client.upload(path))

    def preview(self, recipe: AnyRecipe, overrides: Iterable[str] = (), num_examples: int = 3) -> ExamplesPreview:
        """The first examples as they would be trained on. See AsyncFineTuningClient.preview."""
        return self._thread.run(self._client.preview(recipe, overrides, num_examples))

    def create(self, recipe: AnyRecipe, overrides: Iterable[str] = (), *, request_id: str | None = None) -> FineTuning:
        """Begin a fine-tuning, once. See AsyncFineTuningClient.create."""
        return self._thread.run(self._client.create(recipe, overrides, request_id=request_id))

    def list(self) -> list[FineTuning]:
        """All fine-tunings, newest first."""
        return self._thread.run(self._client.list())

    def get(self, name: str | None = None) -> FineTuning:
        """One fine-tuning; the newest when no name is given."""
        return self._thread.run(self._client.get(name))

    def watch(self, name: str | None = None) -> Iterator[FineTuningWatchItem]:
        """The fine-tuning as it changes, and its job's history. See AsyncFineTuningClient.watch."""
        return self._thread.iterate(self._client.watch(name))

    def wait(
        self,
        name: str | None = None,
        on_progress: Callable[[FineTuning], None] | None = None,
        *,
        until: Callable[[FineTuning], bool] | None = None,
        poll_seconds: float = 1.0,
    ) -> FineTuning:
        """Wait until a fine-tuning has ended. See AsyncFineTuningClient.wait."""
        return self._thread.run(self._client.wait(name, on_progress, until=until, poll_seconds=poll_seconds))

    def pause(self, name: str) -> FineTuning:
        """Pause the job at its next step boundary."""
        return self._thread.run(self._client.pause(name))

    def resume(self, name: str) -> FineTuning:
        """Go on with a paused, failed or cancelled one."""
        return self._thread.run(self._client.resume(name))

    def cancel(self, name: str) -> FineTuning:
        """End it at once; its checkpoints stay."""
        return self._thread.run(self._client.cancel(name))

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
        """What a fine-tuning's best version continues a prompt with. See AsyncFineTuningClient.generate."""
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
        """Write a result as a directory. See AsyncFineTuningClient.export."""
        return self._thread.run(
            self._client.export(name, directory, kind=kind, version=version, on_progress=on_progress)
        )
