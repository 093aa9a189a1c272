"""The residuals of slots' codecs: kept per step, written to each checkpoint, loaded on resuming.

A slot's residual at version t and the residual that step t leaves behind are kept separately. So a slot that is
computed again, after a pause or a pull that broke off, is encoded from the same residual, to the same bytes. The
residual of version t can also be copied for its checkpoint while step t is being encoded.

A slot continues from its residual only on the worker that encoded all of its last step. On any other worker the
residual starts from zero. In a job with rounds after ordinary steps it also starts from zero at the first round: what
gradients left behind is of another scale than differences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial

import torch

from gradstream.core.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    FileEntry,
    directory_of,
    read_manifest,
)
from gradstream.core.checkpoint.residual_files import read_residual, residual_file_name, write_residual
from gradstream.core.codecs import Payload, State
from gradstream.core.codecs.payloads import BundleCodec
from gradstream.core.errors import CheckpointError
from gradstream.core.log import get_logger
from gradstream.core.node.session import NodeSession
from gradstream.core.optimizer.rules import kept_arrays
from gradstream.core.plan.bundles import WEIGHTS
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.kept_moments import KeptMoments

log = get_logger()

States = dict[int, State]
"""A slot's codec states by fragment."""


@dataclass
class _Slot:
    """One slot at `step`. `before` is its residual at that version, `after` what the step leaves behind so far."""

    codec: str
    step: int
    fresh: bool  # `before` is zero because this worker had no residual to continue from
    before: States = field(default_factory=dict)
    after: States = field(default_factory=dict)
    encoded: set[int] = field(default_factory=set)  # bundles of `step`


class SlotResiduals:
    """The residuals of the slots that this worker computes. All methods run in the encode thread.

    `on_fresh(version, slot)` is called when a slot starts from zero in the middle of a plan.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._decay = plan.recipe.codec.decay
        self._slots: dict[int, _Slot] = {}
        self.on_fresh: Callable[[int, int], None] = lambda version, slot: None

    def encode(self, codec: BundleCodec, slices: Sequence[torch.Tensor], step: int, slot: int) -> list[Payload]:
        """Encode a bundle of a slot's gradient. Idempotent: the same step gives the same payloads again."""
        if not self._decay or codec.bundle.array != WEIGHTS:
            return codec.encode(slices, step)
        held = self._at(step, slot, codec.codec.name)
        for fragment in codec.bundle.fragments:
            _restore(held.before, held.after, fragment.index)
        payloads = codec.encode_with(slices, held.after, step, self._decay)
        held.encoded.add(codec.bundle.index)
        return payloads

    def adopt(self, slot: int, states: States) -> None:
        """Continue from the residual in the checkpoint of the plan's start version."""
        self._slots[slot] = _Slot(self._plan.recipe.codec.push, self._plan.start_version, False, states)

    def settle(self, version: int, slots: Iterable[int]) -> None:
        """Bring slots' residuals to a version. Those that cannot continue from an earlier one start from zero there."""
        for slot in slots:
            self._at(version, slot, self._plan.recipe.codec.push)

    def snapshot(self, version: int) -> dict[int, States]:
        """Copy to the CPU the residuals at a version, of all slots that have one there."""
        found = {}
        for slot, held in self._slots.items():
            if held.step == version and not held.fresh:
                found[slot] = _copied(held.before)
            elif self._continues(held, version):
                found[slot] = _copied(held.after)
        return found

    def _at(self, step: int, slot: int, codec: str) -> _Slot:
        held = self._slots.get(slot)
        if held is not None and (held.step, held.codec) == (step, codec):
            return held
        if held is not None and held.codec == codec and self._continues(held, step):
            held.before, held.after = held.after, held.before
            held.step, held.fresh = step, False
            held.encoded.clear()
            return held
        self._slots[slot] = held = _Slot(codec, step, True)
        if step > self._plan.start_version:
            reason = "the first round begins" if self._begins_rounds(step) else "its last step was not encoded here"
            log.info(f"a slot's residual starts from zero: {reason}", slot=slot, version=step)
            self.on_fresh(step, slot)
        return held

    def _continues(self, held: _Slot, version: int) -> bool:
        """Whether a slot's residual at `version` is what its step before left behind."""
        whole = len(held.encoded) == len(self._plan.bundles)
        return held.step + 1 == version and whole and not self._begins_rounds(version)

    def _begins_rounds(self, version: int) -> bool:
        rounds = self._plan.rounds
        return rounds.is_round(version) and not rounds.is_round(version - 1)


class ResidualKeeper:
    """Writes what slots keep, residuals and moments, to checkpoints and loads it back. Runs on the event loop.

    Does nothing in a job whose slots keep nothing.
    """

    def __init__(self, plan: Plan, session: NodeSession, residuals: SlotResiduals, encode_thread: Executor):
        self.active = plan.recipe.keeps_slot_state()
        self.moments = KeptMoments(plan)
        self._keeps_residuals = plan.recipe.codec.decay > 0
        self._plan = plan
        self._session = session
        self._residuals = residuals
        self._encode_thread = encode_thread
        self._loaded: set[int] = set()
        self._manifest: CheckpointManifest | None = None
        self._saved_version = -1
        self._saving: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        residuals.on_fresh = self.moments.on_fresh = self._fresh

    @property
    def busy(self) -> bool:
        """Whether residuals are being written."""
        return self._saving is not None and not self._saving.done()

    async def drain(self) -> None:
        """Wait until they are written. Copies of one version at a time bound the memory."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

    def arrived(self, version: int, checkpoint: bool, slots: Sequence[int]) -> None:
        """Bring residuals to a version that has arrived, and write them if that version has a checkpoint.

        `slots` are those that this worker holds or held last. Call this before anything of that version is encoded.
        """
        if not self.active:
            return
        if checkpoint and version > self._saved_version:
            self._saved_version = version
            # In the encode thread, after everything of the step before that is still to be encoded.
            copies = self._encode_thread.submit(self._snapshot, version)
            self._saving = asyncio.create_task(self._save(version, copies))
        self.take_up(version, slots)

    def take_up(self, version: int, slots: Sequence[int]) -> None:
        """Bring residuals to a version for slots that this worker will compute from there on."""
        if version <= self._plan.start_version:
            return
        if self._keeps_residuals:
            self._encode_thread.submit(self._residuals.settle, version, list(slots))
        if self.moments.active:
            self.moments.settle(version, slots)

    async def load(self, version: int, slot: int) -> None:
        """Load a slot's residual from the checkpoint, at the plan's start version and if the residual fits.

        Raises CheckpointError when the residual is damaged.
        """
        directory = self._plan.checkpoint_path
        kept = directory and self._plan.recipe.keeps_slot_state(version)
        if not kept or version != self._plan.start_version or slot in self._loaded:
            return
        states, reason = await asyncio.to_thread(self._read, directory, slot)
        self._loaded.add(slot)
        if reason:
            log.info("what a slot keeps starts from zero: " + reason, slot=slot, version=version)
            return
        residuals, moments = self._parts(states)
        if self._keeps_residuals:
            self._encode_thread.submit(self._residuals.adopt, slot, residuals)
        if self.moments.active:
            self.moments.adopt(slot, moments)

    def _parts(self, states: States) -> tuple[States, States]:
        """The codec's part of what a slot keeps, and its moments, by fragment."""
        residuals: States = {}
        moments: States = {}
        for index, state in states.items():
            names = kept_arrays(self._plan.recipe, self._plan.tensors[self._plan.fragments[index].tensor])
            residuals[index] = {key: value for key, value in state.items() if key not in names}
            moments[index] = {name: state[name] for name in names}
        return {index: state for index, state in residuals.items() if state}, moments

    def _snapshot(self, version: int) -> dict[int, States]:
        """What slots keep at a version, by slot. A slot that lacks a part of it has none. In the encode thread."""
        residuals = self._residuals.snapshot(version) if self._keeps_residuals else {}
        if not self.moments.active or not self._plan.recipe.local or version <= self._plan.rounds.after:
            return residuals
        moments = self.moments.snapshot(version)
        if not self._keeps_residuals:
            return moments
        return {
            slot: {
                index: {**residuals[slot].get(index, {}), **moments[slot].get(index, {})}
                for index in residuals[slot].keys() | moments[slot].keys()
            }
            for slot in residuals.keys() & moments.keys()
        }

    def close(self) -> None:
        """Give up residuals that are being written."""
        if self._saving is not None:
            self._saving.cancel()

    def _read(self, directory: str, slot: int) -> tuple[States, str]:
        if self._manifest is None:
            if MANIFEST_NAME not in files.list_names(directory):
                raise CheckpointError(
                    f"this worker cannot see the checkpoint {directory}; codec {self._plan.recipe.codec.push} keeps "
                    f"residuals in it: let workers see the coordinator's run_root, or use a codec without residual"
                )
            self._manifest = read_manifest(directory)
        entry = next((entry for entry in self._manifest.residuals if entry.slot == slot), None)
        if entry is None:
            return {}, "the checkpoint has none of this slot"
        return read_residual(directory, entry, self._plan)

    async def _save(self, version: int, copies: Future[dict[int, States]]) -> None:
        plan = self._plan
        try:
            by_slot = await asyncio.wrap_future(copies)
            while by_slot:
                slot, states = by_slot.popitem()
                entry = await asyncio.to_thread(self._write, version, slot, states)
                if entry is not None:
                    self._report(version, slot, entry)
        except Exception as error:
            await self._session.report_failure(plan.job_id, plan.epoch, error)

    def _write(self, version: int, slot: int, states: States) -> FileEntry | None:
        """Write a slot's file. Returns None when the checkpoint was completed without it in the meantime.

        Raises CheckpointError.
        """
        plan = self._plan
        directory = directory_of(plan.checkpoint_root, version)
        file = residual_file_name(plan.epoch, slot, self._session.node_id)
        try:
            files.make_directory(directory)
            try:
                return write_residual(directory, file, plan, states)
            except FileNotFoundError:
                # The file was removed: another worker took the slot over, and the checkpoint was completed, or
                # removed, without this file.
                log.info("a slot's residual came too late for its checkpoint", slot=slot, version=version)
                return None
        except OSError as error:
            raise CheckpointError(
                f"the residual of slot {slot} cannot be written to {directory} ({error}); codec "
                f"{plan.recipe.codec.push} needs workers that can write to the coordinator's run_root: make room or "
                f"let them, or use a codec without residual"
            ) from None

    def _fresh(self, version: int, slot: int) -> None:
        """Report that a slot's residual starts from zero. Runs in the encode thread."""
        self._loop.call_soon_threadsafe(self._report, version, slot, None)

    def _report(self, version: int, slot: int, entry: FileEntry | None) -> None:
        report = coordinator_pb2.ReportResidualRequest(
            job_id=self._plan.job_id,
            epoch=self._plan.epoch,
            version=version,
            slot=slot,
            file=entry.file if entry else "",
            num_bytes=entry.num_bytes if entry else 0,
            sha256=entry.sha256 if entry else "",
        )
        self._session.report_later(partial(self._session.stub.ReportResidual, report, timeout=UNARY_TIMEOUT_SECONDS))


def _restore(before: States, after: States, index: int) -> None:
    """Copy a fragment's state from `before` to `after`, into the memory that `after` already has."""
    state, spare = before.get(index), after.get(index)
    if state is None:
        after.pop(index, None)
    elif spare is not None and all(spare[key].device == value.device for key, value in state.items()):
        for key, value in state.items():
            spare[key].copy_(value)
    else:
        after[index] = {key: value.clone() for key, value in state.items()}


def _copied(states: States) -> States:
    return {index: {key: value.to("cpu", copy=True) for key, value in state.items()} for index, state in states.items()}
