"""Weights arriving: a unit's forward pass waits for its own fragments alone, and nobody waits for what never comes."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.core.codecs import Codec, Payload, codec_named
from gradstream.core.errors import ProtocolError
from gradstream.core.model import build, forward_units, initial_weights
from gradstream.worker.compute import AbandonedError
from gradstream.worker.weights import Inbox, WeightInstaller

MODEL = MICRO_LLAMA


IDS = torch.arange(8)[None]
BOUND_SECONDS = 20
"""Longer than anything here takes: what reaches it is a hang."""


class HeldCodec(Codec):
    """fp32 that can be held inside `decode`, to look at what happens meanwhile."""

    name = "held"
    wire = codec_named("fp32").wire

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self._fp32 = codec_named("fp32")

    def encoded_bytes(self, num_elements: int) -> int:
        return self._fp32.encoded_bytes(num_elements)

    def encode(self, values_N: torch.Tensor) -> Payload:
        return self._fp32.encode(values_N)

    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        self.inside.set()
        assert self.go_on.wait(BOUND_SECONDS)
        self._fp32.decode(payload, out_N)


class Bench:
    """A model with gates, and a thread to run it in."""

    def __init__(self, codec: Codec) -> None:
        self.plan = micro_plan()
        self.codec = codec
        self.model = build(MODEL)
        by_name = dict(self.model.named_parameters())
        self.parameters = [by_name[tensor.name] for tensor in self.plan.tensors]
        self.passed = [threading.Event() for _ in forward_units(self.model)]
        self.installer = WeightInstaller(self.plan, self.model, self.parameters, codec)
        # After the installer's: called when the gate is open.
        for event, (_, unit) in zip(self.passed, forward_units(self.model), strict=True):
            unit.register_forward_pre_hook(lambda *_, event=event: event.set())
        self.thread = ThreadPoolExecutor(1)

    def payloads(self, seed: int) -> list[tuple[int, Payload]]:
        """A whole version, fragment by fragment in forward order."""
        weights = dict(initial_weights(MODEL, seed))
        return [
            (f.index, self.codec.encode(weights[self.plan.tensors[f.tensor].name].reshape(-1)[f.begin : f.end]))
            for f in self.plan.fragments
        ]

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=IDS, use_cache=False).logits

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        return self.thread.submit(function)

    def unit_of(self, fragment: int) -> int:
        return self.plan.tensors[self.plan.fragments[fragment].tensor].unit


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench(HeldCodec())
    yield found
    found.installer.close()
    found.thread.shutdown()


def expected_logits(seed: int) -> torch.Tensor:
    model = build(MODEL)
    weights = dict(initial_weights(MODEL, seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return model(input_ids=IDS, use_cache=False).logits


def test_the_forward_pass_goes_exactly_as_far_as_the_weights(bench: Bench) -> None:
    inbox = Inbox(0)
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    payloads = bench.payloads(1)
    with_tensors = sorted({tensor.unit for tensor in bench.plan.tensors})
    for unit, after in zip(with_tensors, [*with_tensors[1:], None], strict=True):
        mine = [(fragment, payload) for fragment, payload in payloads if bench.unit_of(fragment) == unit]
        for fragment, payload in mine[:-1]:
            inbox.put(fragment, payload)
        assert not bench.passed[unit].is_set(), "its last fragment is missing"
        inbox.put(*mine[-1])
        assert bench.passed[unit].wait(BOUND_SECONDS)
        if after is not None:
            assert not bench.passed[after].is_set()
            assert not result.done()
    assert torch.equal(result.result(BOUND_SECONDS), expected_logits(1))


def test_what_arrived_before_the_install_counts_and_touches_nothing_until_then(bench: Bench) -> None:
    first, second = Inbox(0), Inbox(1)
    bench.installer.install(first)
    for fragment, payload in bench.payloads(1):
        first.put(fragment, payload)
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    for fragment, payload in reversed(bench.payloads(2)):
        second.put(fragment, payload)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(1))
    bench.installer.install(second)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_half_before_and_half_after_the_install(bench: Bench) -> None:
    inbox = Inbox(0)
    payloads = bench.payloads(1)
    for fragment, payload in payloads[::2]:
        inbox.put(fragment, payload)
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    for fragment, payload in payloads[1::2]:
        inbox.put(fragment, payload)
    assert torch.equal(result.result(BOUND_SECONDS), expected_logits(1))


@pytest.mark.parametrize("wait", ["forward", "wait_all"])
@pytest.mark.parametrize("when", ["before the install", "before the wait", "during the wait"])
def test_who_waits_for_what_will_not_come_is_sent_away(bench: Bench, wait: str, when: str) -> None:
    inbox = Inbox(0)
    payloads = bench.payloads(1)
    embedding = [(fragment, payload) for fragment, payload in payloads if bench.unit_of(fragment) == 0]
    for fragment, payload in embedding:
        inbox.put(fragment, payload)
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
    following = Inbox(1)
    for fragment, payload in bench.payloads(2):
        following.put(fragment, payload)
    bench.installer.install(following)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_a_version_that_is_complete_may_fail_afterwards(bench: Bench) -> None:
    inbox = Inbox(0)
    bench.installer.install(inbox)
    for fragment, payload in bench.payloads(1):
        inbox.put(fragment, payload)
    bench.submit(bench.installer.wait_all).result(BOUND_SECONDS)
    inbox.fail()
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(1))


def test_a_fragment_that_is_decoded_while_the_next_version_is_installed_is_not_counted_for_it(bench: Bench) -> None:
    """Else the gate would open one fragment early, or never."""
    assert isinstance(bench.codec, HeldCodec)
    old, new = Inbox(0), Inbox(1)
    bench.codec.go_on.clear()
    bench.installer.install(old)
    old.put(*bench.payloads(1)[0])
    assert bench.codec.inside.wait(BOUND_SECONDS)
    old.fail()
    bench.installer.install(new)
    bench.codec.go_on.set()
    payloads = bench.payloads(2)
    for fragment, payload in payloads:
        new.put(fragment, payload)
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_late_fragments_of_an_old_version_are_ignored(bench: Bench) -> None:
    old, new = Inbox(0), Inbox(1)
    bench.installer.install(old)
    bench.installer.install(new)
    for fragment, payload in bench.payloads(2):
        new.put(fragment, payload)
    for fragment, payload in bench.payloads(1):
        old.put(fragment, payload)
    bench.installer.close()  # everything is decoded or dropped
    assert torch.equal(bench.submit(bench.forward).result(BOUND_SECONDS), expected_logits(2))


def test_a_payload_that_cannot_be_decoded_reaches_the_one_who_waits(bench: Bench) -> None:
    inbox = Inbox(0)
    bench.installer.install(inbox)
    result = bench.submit(bench.forward)
    fragment, payload = bench.payloads(1)[0]
    inbox.put(fragment, payload[:-1])
    with pytest.raises(ProtocolError, match="payload of"):
        result.result(BOUND_SECONDS)
