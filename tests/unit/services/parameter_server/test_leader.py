"""Commit decisions: torch's clipping, counted skips, and the same decision for every grouping of the fragments."""

import asyncio
import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.commit import Decision, decide_commit
from gradstream.services.parameter_server.leader import Leader


def report(server: int, squared_norms: list[float], step: int = 3, num_tokens: int = 64) -> pb.CompleteStepRequest:
    return pb.CompleteStepRequest(
        job_id="job",
        epoch=1,
        step=step,
        server=server,
        squared_norms=squared_norms,
        num_tokens=num_tokens,
        pushed_bytes=10,
    )


def decide(squared: list[list[float]], loss_sum: float = 128.0, clip_norm: float = 1.0, skips: int = 0) -> Decision:
    reports = {server: report(server, norms) for server, norms in enumerate(squared)}
    return decide_commit(3, reports, loss_sum, clip_norm, skips)[0]


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(magnitude: float, clip_norm: float) -> None:
    torch.manual_seed(0)
    num_tokens = 64
    sums = [torch.randn(size) * magnitude * num_tokens for size in (300, 17, 1000)]
    parameters = [torch.nn.Parameter(torch.zeros(len(total))) for total in sums]
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total / num_tokens
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    decision = decide([[float(total.double().norm()) ** 2 for total in sums]], clip_norm=clip_norm)
    assert not decision.skip
    assert decision.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for parameter, total in zip(parameters, sums, strict=True):
        torch.testing.assert_close(total / num_tokens * decision.clip_scale, parameter.grad, rtol=2e-6, atol=0)


def test_a_small_gradient_is_not_scaled_at_all() -> None:
    assert decide([[1e-6]]).clip_scale == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["norm", "loss"])
def test_what_is_not_finite_skips_and_counts(broken: float, where: str) -> None:
    norms, loss = ([[1.0], [broken, 2.0]], 1.0) if where == "norm" else ([[1.0], [2.0]], broken)
    decision = decide(norms, loss, skips=4)
    assert (decision.skip, decision.consecutive_skips) == (True, 5)
    assert decision.to_proto().skip
    assert decision.to_proto().consecutive_skips == 5
    good = decide([[1.0]], skips=5)
    assert (good.skip, good.consecutive_skips) == (False, 0)


@given(
    norms=st.lists(st.floats(0, 1e60), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_the_decision_does_not_depend_on_which_server_holds_what(
    norms: list[float], cuts: list[int], order: "st.random.Random"
) -> None:
    """To the last bit: else the trajectory would depend on the number of servers."""
    together = decide([norms])
    shuffled = norms.copy()
    order.shuffle(shuffled)
    edges = [0, *sorted(cuts), len(norms)]
    apart = decide([shuffled[begin:end] for begin, end in pairwise(edges)])
    assert (apart.clip_scale, apart.grad_norm, apart.loss) == (together.clip_scale, together.grad_norm, together.loss)


def test_totals_add_up() -> None:
    decision = decide([[1.0], [2.0]])
    assert (decision.num_tokens, decision.loss, decision.pushed_bytes) == (64, 2.0, 20)


class Decider:
    """Decides as the leader's shard does, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, step: int, reports: Mapping[int, pb.CompleteStepRequest]) -> Decision:
        self.calls.append(step)
        return decide_commit(step, reports, 1.0, 1.0, 0)[0]


async def waiting(leader: Leader, first: pb.CompleteStepRequest) -> "asyncio.Task[Decision]":
    """A report that was taken and waits for the others."""
    task = asyncio.create_task(leader.complete(first))
    await asyncio.sleep(0)  # one turn: it runs until it waits
    assert leader.missing
    return task


async def test_everyone_gets_the_same_decision_once_all_have_reported() -> None:
    decider = Decider()
    leader = Leader(3, 3, decider)
    assert leader.missing == []
    first = await waiting(leader, report(1, [1.0]))
    assert leader.missing == [0, 2]
    again = asyncio.create_task(leader.complete(report(1, [1.0])))  # a report whose answer was lost
    second = asyncio.create_task(leader.complete(report(0, [2.0])))
    await asyncio.sleep(0)
    assert leader.missing == [2]
    assert not any(task.done() for task in (first, second, again))
    assert decider.calls == []
    decision = await leader.complete(report(2, [3.0]))
    assert await first is await second is await again is decision
    assert await leader.complete(report(0, [2.0])) is decision  # asked again after the commit
    assert decider.calls == [3]


async def test_a_waiter_that_gives_up_does_not_take_the_decision_with_it() -> None:
    leader = Leader(2, 3, Decider())
    task = await waiting(leader, report(0, [1.0]))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await leader.complete(report(1, [1.0]))).step == 3
    assert (await leader.complete(report(0, [1.0]))).step == 3


@pytest.mark.parametrize(
    "wrong",
    [
        report(0, [1.0], step=2),
        report(0, [1.0], step=4),
        report(2, [1.0]),
        report(0, [1.0], num_tokens=0),
    ],
    ids=["an old step", "a later step", "an unknown server", "no tokens"],
)
async def test_a_report_that_does_not_fit_is_refused_and_not_counted(wrong: pb.CompleteStepRequest) -> None:
    decider = Decider()
    leader = Leader(2, 3, decider)
    with pytest.raises(ProtocolError):
        await leader.complete(wrong)
    task = await waiting(leader, report(0, [1.0]))
    assert leader.missing == [1]
    await leader.complete(report(1, [1.0]))
    await task
    assert decider.calls == [3]


async def test_servers_that_count_other_tokens_are_refused() -> None:
    leader = Leader(2, 3, Decider())
    task = await waiting(leader, report(0, [1.0], num_tokens=64))
    with pytest.raises(ProtocolError, match="counted 65 tokens"):
        await leader.complete(report(1, [1.0], num_tokens=65))
    assert leader.missing == [1]
    assert (await leader.complete(report(1, [1.0], num_tokens=64))) is await task


async def test_steps_follow_one_another() -> None:
    decider = Decider()
    leader = Leader(1, 3, decider)
    for step in (3, 4, 5):
        assert (await leader.complete(report(0, [1.0], step=step))).step == step
    with pytest.raises(ProtocolError, match="step 3 while step 6"):
        await leader.complete(report(0, [1.0], step=3))
    assert decider.calls == [3, 4, 5]


async def test_closing_wakes_everyone() -> None:
    leader = Leader(2, 3, Decider())
    task = await waiting(leader, report(0, [1.0]))
    leader.close(ProtocolError("the plan was replaced"))
    with pytest.raises(ProtocolError, match="replaced"):
        await task
