"""Residuals of slots: a step can be encoded again, and a checkpoint's residual gives the same bytes elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.micro import micro_plan

from gradstream.core.checkpoint.residual_files import read_residual, write_residual
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.plan import Plan
from gradstream.worker.residuals import SlotResiduals, States

CODECS = ["topk", "sign", "powersgd", "sparse", "int2*0.5"]
SLOT = 1


class Encoder:
    """Encodes a slot's gradients, which are a function of step and bundle, as a worker does."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.residuals = SlotResiduals(plan)
        self.fresh: list[tuple[int, int]] = []
        self.residuals.on_fresh = lambda version, slot: self.fresh.append((version, slot))
        self._book = CodecBook(plan.tensors, plan.recipe.codec.embedding)

    def encode(self, step: int, bundles: Iterable[Bundle] | None = None, codec: str = "") -> list[bytes]:
        payloads = []
        for bundle in self.plan.bundles if bundles is None else bundles:
            generator = torch.Generator().manual_seed(step << 16 | bundle.index)
            slices = [torch.randn(fragment.num_elements, generator=generator) for fragment in bundle.fragments]
            found = self.residuals.encode(
                self._book.of(bundle, codec or self.plan.recipe.codec.push), slices, step, SLOT
            )
            payloads += [payload.tobytes() for payload in found]
        return payloads


def plan_of(codec: str) -> Plan:
    """`int2*0.5` is int2 with a residual of this decay."""
    push, _, decay = codec.partition("*")
    return micro_plan(codec={"push": push, "residual_decay": float(decay) if decay else None}, num_steps=10)


def same(left: States, right: States) -> bool:
    return left.keys() == right.keys() and all(
        left[index].keys() == right[index].keys()
        and all(torch.equal(value, right[index][key]) for key, value in left[index].items())
        for index in left
    )


@pytest.mark.parametrize("codec", CODECS)
def test_a_step_that_is_encoded_again_gives_the_same_bytes(codec: str) -> None:
    plan = plan_of(codec)
    undisturbed = Encoder(plan)
    reference = [undisturbed.encode(step) for step in range(4)]
    disturbed = Encoder(plan)
    assert disturbed.encode(0) == reference[0]
    disturbed.encode(1, plan.bundles[-3:])  # the backward pass broke off
    assert disturbed.encode(1) == reference[1]
    assert disturbed.encode(1) == reference[1]  # all of it, again
    assert disturbed.encode(2) == reference[2]
    disturbed.residuals.settle(3, [SLOT])
    assert disturbed.encode(3) == reference[3]
    assert not disturbed.fresh
    # The residual counts: from zero the same gradient gives other bytes.
    assert Encoder(plan).encode(3) != reference[3]


@pytest.mark.parametrize("codec", CODECS)
def test_a_checkpoint_of_a_residual_leads_to_the_same_bytes(codec: str, tmp_path: Path) -> None:
    plan = plan_of(codec)
    undisturbed = Encoder(plan)
    for step in range(3):
        undisturbed.encode(step)
    before = undisturbed.residuals.snapshot(3)
    undisturbed.encode(3, plan.bundles[:2])
    during = undisturbed.residuals.snapshot(3)  # while the next step is being encoded
    assert list(before) == list(during) == [SLOT]
    assert same(before[SLOT], during[SLOT])
    reference = [undisturbed.encode(step) for step in (3, 4)]
    assert same(before[SLOT], during[SLOT]), "a copy must not change"

    entry = write_residual(str(tmp_path), "residual.safetensors", plan, before[SLOT])
    states, reason = read_residual(str(tmp_path), entry, plan)
    assert not reason
    assert same(states, before[SLOT])
    resumed = Encoder(replace(plan, epoch=2, start_version=3))
    resumed.residuals.adopt(SLOT, states)
    assert [resumed.encode(step) for step in (3, 4)] == reference
    assert not resumed.fresh


def test_a_slot_without_its_last_step_starts_from_zero_and_says_so() -> None:
    plan = plan_of("topk")
    encoder = Encoder(plan)
    encoder.encode(0)
    assert not encoder.fresh  # the plan's first step
    encoder.encode(1, plan.bundles[:-1])  # another worker was faster
    assert encoder.residuals.snapshot(2) == {}
    from_zero = Encoder(plan).encode(2)
    assert encoder.encode(2) == from_zero
    assert encoder.residuals.snapshot(2) == {}
    assert list(encoder.residuals.snapshot(3)) == [SLOT]
    encoder.residuals.settle(5, [SLOT])  # steps 3 and 4 were another's
    assert encoder.residuals.snapshot(5) == {}
    assert encoder.fresh == [(2, SLOT), (5, SLOT)]
    assert encoder.encode(5) == Encoder(plan).encode(5)


def test_without_a_decay_nothing_is_kept() -> None:
    for push in ("int2", "sparse*0", "topk*0"):
        encoder = Encoder(plan_of(push))
        encoder.encode(0)
        assert encoder.encode(1) == Encoder(plan_of(push)).encode(1)
        assert encoder.residuals.snapshot(1) == encoder.residuals.snapshot(2) == {}


def test_another_codec_starts_from_zero() -> None:
    plan = plan_of("topk")
    encoder = Encoder(plan)
    encoder.encode(0)
    assert encoder.encode(1, codec="powersgd") == Encoder(plan).encode(1, codec="powersgd")
    assert encoder.encode(2, codec="bf16") == Encoder(plan).encode(2, codec="bf16")
    assert encoder.encode(3) == Encoder(plan).encode(3)


def test_what_gradients_left_behind_is_not_added_to_differences() -> None:
    plan = micro_plan(codec={"push": "topk"}, sections={"local": {"steps": 2, "after": 2}}, num_steps=8)
    encoder = Encoder(plan)
    encoder.encode(0)
    encoder.encode(1)
    assert encoder.residuals.snapshot(2) == {}
    assert encoder.encode(2) == Encoder(plan).encode(2), "version 2 begins the first round"
    assert encoder.fresh == [(2, SLOT)]
    assert encoder.encode(3) != Encoder(plan).encode(3)
    assert encoder.fresh == [(2, SLOT)]
