"""A base whose storage stops answering delays only its own callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chat_bases import chat_base

from gradstream.core.errors import UnreachableError
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.core.storage import files
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning import bases
from gradstream.services.fine_tuning.examples.preparation import answered
from gradstream.services.fine_tuning.generation.serving import Serving

SOON = 2.0
BOUND_SECONDS = 20.0


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Directories below `hung` answer when the event is set; at the beginning it is."""
    answers, list_names = threading.Event(), files.list_names
    answers.set()

    def listed(directory: str) -> list[str]:
        if directory.startswith(str(tmp_path / "hung")):
            answers.wait(BOUND_SECONDS)
        return list_names(directory)

    monkeypatch.setattr(files, "list_names", listed)
    for module in ("serving", "engine"):
        monkeypatch.setattr(f"gradstream.services.fine_tuning.generation.{module}.LOAD_SECONDS", SOON)
    monkeypatch.setattr("gradstream.core.storage.pool.RETRY_SECONDS", 0.01)
    yield answers
    answers.set()


@pytest.mark.usefixtures("one_thread")
async def test_others_generate_while_a_base_hangs(tmp_path: Path, hung: threading.Event) -> None:
    found = {name: bases.find_base(str(chat_base(tmp_path / name)), name)[0] for name in ("hung", "good")}
    serving = Serving("cpu", 2 << 30)

    async def generate(name: str) -> int:
        request = pb.GenerateRequest(prompt="a b", max_new_tokens=2)
        return len([piece async for piece in serving.generate(found[name], None, request)])

    try:
        # 1. Both before, and after, the tokenizer is known.
        for _ in range(2):
            hung.clear()
            waiting = [asyncio.create_task(generate("hung")) for _ in range(7)]  # a place has eight threads
            assert await asyncio.wait_for(generate("good"), BOUND_SECONDS / 2) > 0
            for error in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(error, UnreachableError), error
            hung.set()
            # 2. Afterwards it generates as if nothing had been.
            assert await asyncio.wait_for(generate("hung"), BOUND_SECONDS) > 0
    finally:
        await serving.close()


async def test_a_preparation_waits_before_others_wait_for_it(tmp_path: Path, hung: threading.Event) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    told: list[str] = []
    hung.clear()
    storage = StorageThreads(call_seconds=SOON)
    waiting = asyncio.create_task(
        answered(storage, str(tmp_path / "hung"), ExamplesConfig(path=str(data)), told.append)
    )
    async with asyncio.timeout(BOUND_SECONDS):
        while not told:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert f"the storage of {tmp_path}/hung has not answered for 2 s" in told[0]
    assert not waiting.done()
    hung.set()
    await asyncio.wait_for(waiting, BOUND_SECONDS)
