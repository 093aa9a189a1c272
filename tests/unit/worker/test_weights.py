"""Arriving weights: a unit's forward pass waits for its own bundles alone, and no wait is endless."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.core.codecs.payloads import BundleCodec, CodecBook
from gradstream.core.errors import ProtocolError
from gradstream.core.model.model import build, forward_units, initial_weights
from gradstream.core.plan.downlink import downlink
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.attempt import AbandonedError
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Arrival, Inbox, WeightInstaller

MODEL = MICRO_LLAMA


IDS = torch.arange(8)[None]
BOUND_SECONDS = 20
"""Longer than anything here takes: what reaches it is a hang."""


class HeldTimeline(Timeline):
    """Holds a decoding before it begins, to look at what happens meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    @contextmanager
    def span(
        self, kind: SpanKind, slot: int | None = None, item: int | None = None, num_bytes: int = 0
    ) -> Iterator[None]:
        assert kind is SpanKind.DECODE
        self.inside.set()
        assert self.go_on.wait(BOUND_SECONDS)
        with super().span(kind, slot, item, num_bytes):
            yield


class Bench:
    """A model with gates, and a thread to run it in."""

    def __init__(self, pull: str) -> None:
        self.plan = micro_plan(codec={"pull": pull})
        self.timeline = HeldTimeline()
        self.model = build(MODEL)
        by_name = dict(self.model.named_parameters())
        self.parameters = [by_name[tensor.name] for tensor in self.plan.tensors]
        self.passed = [threading.Event() for _ in forward_units(self.model)]
        self.installer = WeightInstaller(
            self.plan, [self.model], {(number, 0): found for number, found in enumerate(self.parameters)}, self.timeline
        )
        # After the installer's: called when the gate is open.
        for event, (_, unit) in zip(self.passed, forward_units(self.model), strict=True):
            unit.register_forward_pre_hook(lambda *_, event=event: event.set())
        self.thread = ThreadPoolExecutor(1)
        self._book = CodecBook(self.plan.tensors, self.plan.recipe.codec.embedding)
        self._form = downlink(pull)

    def whole(self, seed: int, version: int = 0) -> list[Arrival]:
        """A whole version with the initial weights of a seed, bundle by bundle in forward order."""
        weights = dict(initial_weights(MODEL, seed))
        return [
            self._arrival(self._book.of(bundle, self._form.full), self._slices(weights, bundle.index), version, False)
            for bundle in self.plan.bundles
        ]

    def delta(self, version: int, value: float) -> list[Arrival]:
        """A difference of `value` everywhere."""
        assert self._form.delta is not None
        return [
            self._arrival(
                self._book.delta(bundle, self._form.delta),
                [torch.full((fragment.num_elements,), value) for fragment in bundle.fragments],
                version,
                True,
            )
            for bundle in self.plan.bundles
        ]

    def _slices(self, weights: dict[str, torch.Tensor], bundle: int) -> list[torch.Tensor]:
        return [
            weights[self.plan.tensors[f.tensor].name].reshape(-1)[f.begin : f.end]
            for f in self.plan.bundles[bundle].fragments
        ]

    @staticmethod
    def _arrival(codec: BundleCodec, values: list[torch.Tensor], version: int, delta: bool) -> Arrival:
        payloads = codec.encode(values, version)
        header = pb.WeightsHeader(
            version=version,
            bundle=codec.bundle.index,
            codec=codec.codec.wire,
            payload_bytes=sum(map(len, payloads)),
            fragment_bytes=[len(payload) for payload in payloads],
            delta=delta,
        )
        return Arrival(header, np.concatenate(payloads))

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=IDS, use_cache=False).logits

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        return self.thread.submit(function)

    def units_of(self, arrival: Arrival) -> set[int]:
        bundle = self.plan.bundles[arrival.header.bundle]
        return {self.plan.tensors[fragment.tensor].unit for fragment in bundle.fragments}

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def inbox_of(version: int, arrivals: list[Arrival] | None = None) -> Inbox:
    inbox = Inbox(version, "bf16")
    for arrival in arrivals or []:
        inbox.put(arrival)
    return inbox


@pytest.fixture
def bench() -> Iterator[Bench]:
    with made("fp32") as found:
        yield found


@contextmanager
def made(pull: str) -> Iterator[Bench]:
    bench = Bench(pull)
    try:
        yield bench
    finally:
        bench.timeline.go_on.set()
        bench.installer.close()
        bench.thread.shutdown()


def expected_logits(seed: int) -> torch.Tensor:
    model = build(MODEL)
    weights = dict(initial_weights(MODEL, seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return model(input_ids=IDS, use_cache=False).logits


def test_the_forward_pass_goes_exactly_as_far_as_the_weights(bench: Bench) -> None:
    inbox = inbox_of(0)
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    arrivals = bench.whole(1)
    with_tensors = sorted({tensor.unit for tensor in bench.plan.tensors})
    assert any(len(bench.units_of(arrival)) > 1 for arrival in arrivals), "the test must reach a bundle of two units"
    missing = {unit: {a.header.bundle for a in arrivals if unit in bench.units_of(a)} for unit in with_tensors}
    for arrival in arrivals:
        held_up = next(unit for unit in with_tensors if missing[unit])
        assert not bench.passed[held_up].is_set(), "its last bundle is missing"
        assert not result.done()
        inbox.put(arrival)
        for unit in with_tensors:
            missing[unit].discard(arrival.header.bundle)
            if missing[unit]:
                break
            assert bench.passed[unit].wait(BOUND_SECONDS)
    assert torch.equal(result.result(BOUND_SECONDS), expected_logits(1))


def test_what_arrived_before_the_install_counts_and_touches_nothing_until_then(bench: Bench) -> None:
    bench.installer.install(inbox_of(0, bench.whole(1)))
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    second = inbox_of(1, bench.whole(2, 1)[::-1])
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(1))
    bench.installer.install(second)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_half_before_and_half_after_the_install(bench: Bench) -> None:
    arrivals = bench.whole(1)
    inbox = inbox_of(0, arrivals[::2])
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    for arrival in arrivals[1::2]:
        inbox.put(arrival)
    assert torch.equal(result.result(BOUND_SECONDS), expected_logits(1))


@pytest.mark.parametrize("wait", ["forward", "wait_all"])
@pytest.mark.parametrize("when", ["before the install", "before the wait", "during the wait"])
def test_who_waits_for_what_will_not_come_is_sent_away(bench: Bench, wait: str, when: str) -> None:
    inbox = inbox_of(0, [arrival for arrival in bench.whole(1) if 0 in bench.units_of(arrival)])
    if when == "before the install":
        inbox.fail()
    bench.installer.install(inbox)
    if when == "before the wait":
        inbox.fail()
    result = bench.submit(bench.forward if wait == "forward" else bench.installer.wait_all)
    if wait == "forward" and when == "during the wait":
        assert bench.passed[0].wait(BOUND_SECONDS)
    inbox.fail()
    with pytest.raises(AbandonedError):
        result.result(BOUND_SECONDS)
    # A new version works again.
    bench.installer.install(inbox_of(1, bench.whole(2, 1)))
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_the_wait_for_a_bundle_names_its_server(bench: Bench) -> None:
    *first, last = bench.whole(1)
    inbox = inbox_of(0, first)
    bench.installer.install(inbox)
    forward = bench.submit(bench.forward)
    named = f"weights of version 0 from {bench.plan.servers[bench.plan.bundles[last.header.bundle].server].name}"
    deadline = time.monotonic() + BOUND_SECONDS
    seen = None
    while (seen is None or seen[0] != named) and time.monotonic() < deadline:
        time.sleep(0.005)
        seen = bench.installer.waiting
    inbox.put(last)
    assert seen is not None
    assert seen[0] == named
    forward.result(BOUND_SECONDS)
    assert bench.installer.waiting is None


def test_a_version_that_is_complete_may_fail_afterwards(bench: Bench) -> None:
    inbox = inbox_of(0, bench.whole(1))
    bench.installer.install(inbox)
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    inbox.fail()
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(1))


def test_a_bundle_that_is_decoded_while_the_next_version_is_installed_is_not_counted_for_it(bench: Bench) -> None:
    """Else the gate would open one bundle early, or never."""
    old, new = inbox_of(0), inbox_of(1)
    bench.timeline.go_on.clear()
    bench.installer.install(old)
    old.put(bench.whole(1)[0])
    assert bench.timeline.inside.wait(BOUND_SECONDS)
    old.fail()
    bench.installer.install(new)
    bench.timeline.go_on.set()
    for arrival in bench.whole(2, 1):
        new.put(arrival)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_late_bundles_of_an_old_version_are_ignored(bench: Bench) -> None:
    old, new = inbox_of(0), inbox_of(1)
    bench.installer.install(old)
    bench.installer.install(new)
    for arrival in bench.whole(2, 1):
        new.put(arrival)
    for arrival in bench.whole(1, 0):
        old.put(arrival)
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    result = bench.submit(bench.forward)
    bench.installer.close()  # everything is decoded or dropped
    result.result(BOUND_SECONDS)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_a_payload_that_cannot_be_decoded_reaches_the_one_who_waits(bench: Bench) -> None:
    inbox = inbox_of(0)
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    arrival = bench.whole(1)[0]
    inbox.put(Arrival(arrival.header, arrival.payload[:-1]))
    with pytest.raises(ProtocolError, match="payload of"):
        result.result(BOUND_SECONDS)


# -- differences -------------------------------------------------------------------------------------------------------


def install(bench: Bench, version: int, arrivals: list[Arrival]) -> Inbox:
    """Install a whole inbox and wait until it is in place or will not be."""
    inbox = inbox_of(version, arrivals)
    bench.installer.install(inbox)
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    return inbox


@pytest.mark.parametrize("pull", ["delta-bf16", "delta-int8", "delta-int4"])
def test_a_difference_is_added_to_the_version_before(pull: str) -> None:
    with made(pull) as bench:
        install(bench, 3, bench.whole(1, 3))
        before = bench.weights()
        install(bench, 4, bench.delta(4, 0.5))
        for held, found in zip(before, bench.weights(), strict=True):
            assert torch.equal(found, held + 0.5)


def test_a_difference_waits_for_the_one_before_that_is_still_being_decoded() -> None:
    """The next version may be installed as soon as no slot needs this one, in place or not."""
    with made("delta-bf16") as bench:
        install(bench, 0, bench.whole(1))
        before = bench.weights()
        bench.timeline.go_on.clear()
        bench.installer.install(inbox_of(1, bench.delta(1, 0.5)))
        bench.installer.install(inbox_of(2, bench.delta(2, 0.25)))
        waiting = bench.submit(bench.installer.wait_all)
        assert not waiting.done()
        bench.timeline.go_on.set()
        waiting.result(BOUND_SECONDS)
        for held, found in zip(before, bench.weights(), strict=True):
            assert torch.equal(found, held + 0.5 + 0.25)


@pytest.mark.parametrize("held", [None, 0, 2, 4, 5])
def test_a_difference_to_what_is_not_held_is_never_added(held: int | None) -> None:
    """Version 4's difference is to version 3."""
    with made("delta-int8") as bench:
        if held is not None:
            install(bench, held, bench.whole(1, held))
        before = bench.weights()
        with pytest.raises(AbandonedError):
            install(bench, 4, bench.delta(4, 0.5))
        assert all(map(torch.equal, bench.weights(), before))
        install(bench, 6, bench.whole(2, 6))
        install(bench, 7, bench.delta(7, 0.0))
        assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


@pytest.mark.parametrize("pull", ["delta-int8", "xor-fp32"])
def test_a_version_that_broke_off_is_pulled_again_whole(pull: str) -> None:
    """After the break some bundles are at version 1, some at 0: no difference fits all, a whole copy does."""
    with made(pull) as bench:
        install(bench, 0, bench.whole(1))
        arrivals = bench.delta(1, 0.0)
        inbox = inbox_of(1, arrivals[: len(arrivals) // 2])
        bench.installer.install(inbox)
        inbox.fail()
        with pytest.raises(AbandonedError):
            bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
        # Should a difference to version 1 come nevertheless, it is not taken for a version.
        with pytest.raises(AbandonedError):
            install(bench, 2, bench.delta(2, 0.0))
        install(bench, 2, bench.whole(2, 2))
        assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_the_same_version_again_whole_after_half_of_it_came_as_differences() -> None:
    with made("delta-int8") as bench:
        install(bench, 0, bench.whole(1))
        arrivals = bench.delta(1, 0.5)
        inbox = inbox_of(1, arrivals[::2])
        bench.installer.install(inbox)
        inbox.fail()
        with pytest.raises(AbandonedError):
            bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
        install(bench, 1, bench.whole(2, 1))
        assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


@pytest.mark.parametrize(
    ("pull", "codec", "delta"),
    [
        ("fp32", "bf16", False),
        ("fp32", "fp32", True),
        ("delta-int8", "int8", False),
        ("delta-int8", "int4", True),
        ("delta-int8", "fp32", True),
        ("xor-bf16", "bf16", True),
        ("xor-bf16", "bf16-zstd", False),
    ],
)
def test_a_codec_that_the_recipe_does_not_lead_to_is_refused(pull: str, codec: str, delta: bool) -> None:
    with made(pull) as bench:
        bundle = bench.plan.bundles[0]
        wrong = CodecBook(bench.plan.tensors, "bf16").of(bundle, codec)
        zeros = [torch.zeros(fragment.num_elements) for fragment in bundle.fragments]
        install(bench, 0, bench.whole(1))
        bench.installer.install(inbox_of(1, [bench._arrival(wrong, zeros, 1, delta)]))
        with pytest.raises(ProtocolError, match=f"codec {codec}, but the recipe says pull: {pull}"):
            bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
