"""Streams results as files: peft's adapter directory or a Hugging Face model."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf.json_format import ParseDict

from gradstream.core.checkpoint.manifest import read_manifest
from gradstream.core.checkpoint.weights_files import WeightsFile, sent_pieces
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.core.storage import files
from gradstream.core.storage.pool import BULK_SECONDS, StorageThreads
from gradstream.proto.v1 import fine_tuning_pb2
from gradstream.services.fine_tuning.export.card import CardFacts, DataFacts, Score, model_card
from gradstream.services.fine_tuning.export.directories import export_adapter, export_merged
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.store import Completions, Record
from gradstream.services.fine_tuning.views import perplexity

MAX_EXPORTS = 2


class Exports:
    """Makes exports. Each export under way holds one tensor of a model in memory."""

    def __init__(self, fine_tunings: FineTunings):
        self._fine_tunings = fine_tunings
        self._slots = asyncio.Semaphore(MAX_EXPORTS)
        self._storage = StorageThreads(BULK_SECONDS)

    async def pieces(
        self, name: str, kind: fine_tuning_pb2.ExportKind.ValueType, version: int | None
    ) -> AsyncIterator[tuple[str, int, bytes]]:
        """Stream the files of an export, in the form of core.files.directory_pieces.

        Raises ConfigError or CheckpointError when there is no result of that kind to export.
        """
        record = self._fine_tunings.find(name)
        asked = parse_fine_tuning_recipe(record.recipe_json)
        if kind == fine_tuning_pb2.EXPORT_KIND_ADAPTER and asked.method != "lora":
            raise ConfigError(f"{record.name} is a full fine-tuning and has no adapter; export it with --merged")
        adapter = asked.method == "lora" and kind != fine_tuning_pb2.EXPORT_KIND_MERGED
        self._fine_tunings.checkpoint(record.name, version)  # raises before the wait if there is no result
        async with self._slots, self._fine_tunings.held_checkpoint(record.name, version) as (version, checkpoint):
            temporary = Path(tempfile.mkdtemp(prefix="export-", dir=self._fine_tunings.store.temporary))
            try:
                weights = await self._storage.call(
                    checkpoint, _export, record, version, checkpoint, temporary / "export", adapter
                )
                async for piece in files.directory_pieces(temporary / "export"):
                    yield piece
            finally:
                await asyncio.to_thread(shutil.rmtree, temporary, True)
            async for piece in sent_pieces(weights, self._storage, checkpoint):
                yield piece


def _export(record: Record, version: int, checkpoint: str, destination: Path, adapter: bool) -> list[WeightsFile]:
    """Write an export's files except a whole model's weights, which are returned and made while they are sent."""
    progress = read_manifest(checkpoint).progress
    card = model_card(card_facts(record, version, progress.get("num_tokens")), kind="adapter" if adapter else "merged")
    chat = ParseDict(record.examples or {}, fine_tuning_pb2.ExamplesReport()).format == "chat"
    if adapter:
        export_adapter(checkpoint, destination, card, chat)
        return []
    return export_merged(checkpoint, destination, card, chat, weights=False)


def card_facts(record: Record, version: int, num_target_tokens: int | None) -> CardFacts:
    """Collect the facts for a version's card. Raises CheckpointError when the fine-tuning has no base yet."""
    asked = parse_fine_tuning_recipe(record.recipe_json)
    if record.base is None:
        raise CheckpointError(f"{record.name} is {record.state} and has no base yet; wait until it trains")
    report = ParseDict(record.examples or {}, fine_tuning_pb2.ExamplesReport())
    return CardFacts(
        name=record.name,
        version=version,
        base=record.base,
        method=asked.method,
        recipe=asked.model_dump(mode="json", exclude_none=True),
        data=DataFacts(report.num_train, report.num_validation, tuple(report.sha256)),
        num_trained_parameters=record.num_trained_parameters or None,
        num_target_tokens=num_target_tokens,
        before=_score(record, 0, record.before),
        after=_score(record, version, record.after if version == record.best_version else None),
        description=asked.description,
    )


def _score(record: Record, version: int, completions: Completions | None) -> Score | None:
    loss = record.losses.get(version)
    if loss is None:
        return None
    made = completions or Completions()
    return Score(loss, perplexity(loss), made.num_prompts, made.num_exact)
