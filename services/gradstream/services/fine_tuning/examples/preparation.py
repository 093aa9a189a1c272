"""Finds or receives a task's data, and makes its rows."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, BinaryIO

from gradstream.core.data.sources import find_files
from gradstream.core.errors import DataError, GradstreamError, ProtocolError, UnreachableError, one_line
from gradstream.core.model import model
from gradstream.core.pretrained import base as base_model
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig, FineTuningRecipe
from gradstream.core.storage import files
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import fine_tuning_pb2
from gradstream.services.fine_tuning.bases import looked_at
from gradstream.services.fine_tuning.examples.dataset import Prepared, prepare_examples
from gradstream.services.fine_tuning.store import Store

MAX_UPLOAD_BYTES = 2 << 30
SPARE_BYTES = 1 << 30
"""Bytes that uploads leave free on their disk."""
IDLE_SECONDS = 60.0
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_data(config: ExamplesConfig) -> None:
    """Check that the service can see the files of examples.

    Raises DataError when there is no such file, ConfigError when a directory or a glob has none.
    """
    for key, path in (("path", config.path), ("validation_path", config.validation_path)):
        if path is None:
            continue
        try:
            fs, inner = files.file_system(path)
            found = fs.isfile(inner)
            if not found and (fs.isdir(inner) or any(character in inner for character in "*?[")):
                found = bool(find_files([path]).files)
        except GradstreamError:
            raise
        except Exception as error:  # fsspec backends raise errors of their own
            raise DataError(f"data.{key} {path} cannot be accessed ({one_line(error)}); correct it") from None
        if not found:
            raise DataError(
                f"there is no file {path} where the fine-tuning service can see it; correct data.{key}, or send "
                f"the file with --upload"
            )


async def answered(
    storage: StorageThreads, base: str, config: ExamplesConfig, on_wait: Callable[[str], object]
) -> None:
    """Access a base's directory and the examples until their storage answers.

    `on_wait` is called while the storage does not answer. Raises the errors of `check_data`.
    """
    await storage.patiently(base, partial(looked_at, base), on_wait)
    await storage.patiently(config.path, partial(check_data, config), on_wait)


def prepare(asked: FineTuningRecipe, base: Base, config: dict[str, Any], directory: str) -> tuple[Prepared, int]:
    """Make the rows in `directory`, which must not exist; return them and the number of parameters to train.

    Raises ConfigError or DataError with one line.
    """
    # First the check that needs no data: an error about a target module that matches nothing comes at once.
    tensors = model.inventory(config, asked.lora if asked.method == "lora" else None)
    prepared = prepare_examples(
        asked.data,
        base_model.load_tokenizer(base),
        asked.training.row_length(),
        asked.training.num_slots,
        directory,
        asked.seed,
    )
    return prepared, sum(tensor.num_elements for tensor in tensors)


class Upload:
    """A file of examples as it arrives. Use `write` for each piece, then `finish`; `discard` in any case."""

    def __init__(self, store: Store, file: str):
        """Raises ProtocolError when the name is not a plain file name."""
        if not _FILE_NAME.fullmatch(file):
            raise ProtocolError(f"the file name {file[:80]!r} is not a plain one; rename the file")
        self._store = store
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._path = store.temporary / f"upload-{secrets.token_hex(8)}"
        self._stream: BinaryIO = self._path.open("xb")

    def write(self, payload: bytes) -> None:
        """Append a piece. Raises DataError when the file is too large or the disk is full."""
        if shutil.disk_usage(self._store.uploads).free < SPARE_BYTES + len(payload):
            raise DataError(f"{self._file} cannot be stored (the disk is nearly full); free disk space")
        self._num_bytes += len(payload)
        if self._num_bytes > MAX_UPLOAD_BYTES:
            raise DataError(
                f"{self._file} is larger than the {MAX_UPLOAD_BYTES >> 30} GiB that may be sent; put it where the "
                f"service can see it and name its path"
            )
        self._digest.update(payload)
        try:
            self._stream.write(payload)
        except OSError as error:
            raise DataError(f"{self._file} cannot be stored ({error.strerror}); free disk space") from None

    def finish(self) -> tuple[str, str]:
        """Move the file into place; return its path and sha256."""
        sha256 = self._digest.hexdigest()
        path = self._store.uploads / f"{sha256}-{self._file}"
        self._stream.close()
        self._path.replace(path)
        return str(path), sha256

    def discard(self) -> None:
        """Remove the temporary file, unless the upload is finished."""
        self._stream.close()
        self._path.unlink(missing_ok=True)


async def _next(
    messages: AsyncIterator[fine_tuning_pb2.UploadExamplesRequest],
) -> fine_tuning_pb2.UploadExamplesRequest | None:
    """Read the next piece, None at the end. Raises UnreachableError when none comes, as other uploads wait."""
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await anext(messages, None)
    except TimeoutError:
        raise UnreachableError(f"nothing of the file came for {IDLE_SECONDS:.0f} s; send it again") from None


async def receive(store: Store, messages: AsyncIterator[fine_tuning_pb2.UploadExamplesRequest]) -> tuple[str, str]:
    """Store a file that arrives in pieces; return its path and sha256. Raises ProtocolError or DataError."""
    upload: Upload | None = None
    try:
        while (message := await _next(messages)) is not None:
            if upload is None:
                upload = Upload(store, message.file)
            await asyncio.to_thread(upload.write, message.payload)
        if upload is None:
            raise ProtocolError("no file was sent")
        return await asyncio.to_thread(upload.finish)
    finally:
        if upload is not None:
            upload.discard()
