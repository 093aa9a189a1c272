"""Keeps slots' progress within long rounds on this machine's disk, so that a worker that starts again goes on there.

A file has what a slot's round is after some inner steps: the slot's weights and moments, and its totals so far. It is a
hint, never the truth: another worker computes the slot from the version, to the same bits, and a file that does not fit
is left aside. So files need no fsync, and workers on one machine may share a directory.

In a pipeline no progress is kept: a slot's round would be on the disks of several workers, each with other inner steps.

The copy that is written in the background belongs to the store and is bounded: while one is being written, the next is
left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gradstream.core.codecs import Payload
from gradstream.core.log import get_logger
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.local import progress_interval
from gradstream.core.wire.frames import checksum
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.proto.v1 import coordinator_pb2

log = get_logger()

FORGET_SECONDS = 86_400.0
"""The age at which the files of other jobs are removed."""
MAX_HEAD_BYTES = 1 << 20
MAX_REPORTED = 64
"""Maximum number of slots whose progress a heartbeat names."""
SUFFIX = ".round"


class ProgressFiles:
    """The progress of one job's slots, in `directory`/rounds. `load` and `save` run in the compute thread."""

    def __init__(self, plan: Plan, directory: Path, now: Callable[[], float] = time.time):
        self.interval_steps = progress_interval(plan.recipe.local, plan.recipe.pipeline)
        """Inner steps after which progress is kept; 0: never."""
        self._plan = plan
        self._root = directory / "rounds"
        self._directory = self._root / plan.job_id
        self._now = now
        self._thread = ThreadPoolExecutor(1, "progress")
        self._writing: Future[None] | None = None
        self._copies: list[torch.Tensor] = []
        self._kept: dict[tuple[int, int], int] = {}  # inner steps by (version, slot)
        self._settings = ""
        """What a slot's round depends on besides its version's arrays."""
        if self.interval_steps:
            recipe = plan.recipe.model_dump(mode="json", exclude={"run_root"})
            self._settings = json.dumps([recipe, plan.data_manifest.model_dump(mode="json")])
            self._thread.submit(self._find_kept)
            self._thread.submit(self._forget_other_jobs)

    @property
    def kept(self) -> list[coordinator_pb2.KeptProgress]:
        """The progress on the disk of the newest slots, at most MAX_REPORTED. On the event loop.

        It is found by name and head; it may turn out not to fit the version.
        """
        return [
            coordinator_pb2.KeptProgress(version=version, slot=slot, num_done=num_done)
            for (version, slot), num_done in sorted(self._kept.copy().items())[-MAX_REPORTED:]
        ]

    def due(self, num_done: int, num_steps: int) -> bool:
        """Whether progress is kept after `num_done` of a round's inner steps."""
        return bool(self.interval_steps) and num_done % self.interval_steps == 0 and num_done < num_steps

    def key(self, version: int, slot: int, held: Sequence[torch.Tensor]) -> str:
        """What a slot's round from a version depends on, as a digest. `held` are the version's arrays."""
        digest = hashlib.sha256(f"{self._settings} {torch.__version__} {version} {slot}".encode())
        for array in held:
            digest.update(checksum(_bytes(array)).to_bytes(4, "little"))
        return digest.hexdigest()

    def load(self, version: int, slot: int, key: str, arrays: Sequence[torch.Tensor]) -> list[SlotTotals]:
        """Fill `arrays` with a slot's progress; return the totals of the inner steps that are done.

        Returns an empty list, and leaves `arrays` as they are, when there is no progress of this key, or a damaged one.
        """
        path = self._path(version, slot)
        try:
            with path.open("rb") as stream:
                head = json.loads(stream.readline(MAX_HEAD_BYTES))
                if head["key"] != key:
                    return []
                return _read(stream, head, arrays)
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.info("progress of a round is left aside", file=str(path), cause=str(error))
            return []

    def save(
        self, version: int, slot: int, key: str, arrays: Sequence[torch.Tensor], totals: Sequence[SlotTotals]
    ) -> None:
        """Copy a slot's progress and write it in the background, unless an earlier one is still being written."""
        if self._writing is not None and not self._writing.done():
            return
        if [copy.shape for copy in self._copies] != [array.shape for array in arrays]:
            self._copies = [torch.empty_like(array, device="cpu") for array in arrays]
        for copy, array in zip(self._copies, arrays, strict=True):
            copy.copy_(array)
        self._writing = self._thread.submit(self._write, self._path(version, slot), key, list(totals))

    def forget_before(self, version: int) -> None:
        """Remove the progress of rounds that are over, in the background."""
        if self.interval_steps:
            self._thread.submit(self._forget_before, version)

    def close(self) -> None:
        """Finish what is being written."""
        self._thread.shutdown(wait=True)

    # -- in the background -----------------------------------------------------------------------------------------

    def _write(self, path: Path, key: str, totals: Sequence[SlotTotals]) -> None:
        pieces = [_bytes(copy) for copy in self._copies]
        head: dict[str, Any] = {
            "key": key,
            "totals": [[one.num_tokens, one.num_samples, one.loss_sum.hex()] for one in totals],
            "crc32c": checksum(*pieces),
        }
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                stream.write(json.dumps(head).encode() + b"\n")
                for piece in pieces:
                    stream.write(piece.data)
            part.replace(path)
            self._kept[_numbers_of(path)] = len(totals)
        except OSError as error:
            log.warning("progress of a round is not kept: its file cannot be written", file=str(path), cause=str(error))
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _find_kept(self) -> None:
        """Learn what an earlier process has kept."""
        for path in self._directory.glob(f"*-*{SUFFIX}"):
            with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as stream:
                self._kept[_numbers_of(path)] = len(json.loads(stream.readline(MAX_HEAD_BYTES))["totals"])

    def _forget_before(self, version: int) -> None:
        self._kept = {key: num_done for key, num_done in self._kept.items() if key[0] >= version}
        for path in self._directory.glob("*-*"):  # also files that a killed worker has begun
            number = path.name.split("-")[0]
            if number.isdigit() and int(number) < version:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        if version >= self._plan.last_version:
            with suppress(OSError):
                self._directory.rmdir()

    def _forget_other_jobs(self) -> None:
        with suppress(OSError):
            for directory in self._root.iterdir():
                if directory != self._directory and self._now() - directory.stat().st_mtime > FORGET_SECONDS:
                    shutil.rmtree(directory, ignore_errors=True)

    def _path(self, version: int, slot: int) -> Path:
        return self._directory / f"{version}-{slot}{SUFFIX}"


def _numbers_of(path: Path) -> tuple[int, int]:
    """The version and the slot of a file. Raises ValueError."""
    version, _, slot = path.name.removesuffix(SUFFIX).partition("-")
    return int(version), int(slot)


def _read(stream: BinaryIO, head: dict[str, Any], arrays: Sequence[torch.Tensor]) -> list[SlotTotals]:
    """Read a file's arrays. Raises ValueError for a damaged file, before `arrays` are changed."""
    totals = [SlotTotals(int(tokens), int(samples), float.fromhex(loss)) for tokens, samples, loss in head["totals"]]
    found = [torch.empty_like(array, device="cpu") for array in arrays]
    for array in found:
        if stream.readinto(_bytes(array)) != array.nbytes:  # type: ignore[attr-defined]
            raise ValueError("it ends early")
    if stream.read(1) or checksum(*(_bytes(array) for array in found)) != head["crc32c"]:
        raise ValueError("its checksum is wrong")
    for array, values in zip(arrays, found, strict=True):
        array.copy_(values)
    return totals


def _bytes(array: torch.Tensor) -> Payload:
    """The bytes of an array: of its own memory on a CPU, else of a copy."""
    return array.detach().cpu().reshape(-1).numpy().view(np.uint8)  # type: ignore[no-any-return]
