"""The optimizer: torch's bits, slice by slice, and learning rates at the edges of the schedule."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from gradstream.core.optimizer.optimizer import Optimizer
from gradstream.core.optimizer.rule import Slice
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.recipe.recipe import LearningRateScheduleConfig, OptimizerConfig

PEAK = 2.0
OPTIMIZER = OptimizerConfig(learning_rate=PEAK)
# As fragments are cut: on multiples of 256. The last one ends off the vector width, where torch runs other code.
SLICES = [0, 256, 768, 1003]
RATES = [1e-3, 5e-4, 2e-3, 0.0, 1e-4]
CONFIGS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "weight_decay": 0.1},
    "adamw-betas": {"kind": "adamw", "weight_decay": 0.01, "betas": (0.5, 0.6), "eps": 1e-6},
    "sgd": {"kind": "sgd", "weight_decay": 0.1, "momentum": 0.9, "nesterov": False},
    "sgd-nesterov": {"kind": "sgd", "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    "sgd-plain": {"kind": "sgd", "weight_decay": 0.0, "momentum": 0.0, "nesterov": True},
}
every_rule = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def rate(step: int, num_steps: int = 100, **schedule: Any) -> float:
    return learning_rate(step, num_steps, OPTIMIZER, LearningRateScheduleConfig(**schedule))


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SLICES[-1], generator=generator) for _ in range(count)]


def initial() -> torch.Tensor:
    return torch.randn(SLICES[-1], generator=torch.Generator().manual_seed(0))


def reference(config: OptimizerConfig, decay: bool, weights_N: torch.Tensor) -> torch.optim.Optimizer:
    """What someone would write who trains the whole tensor with torch."""
    weight_decay = config.weight_decay if decay else 0.0
    if config.kind == "adamw":
        return torch.optim.AdamW([weights_N], betas=config.betas, eps=config.eps, weight_decay=weight_decay, fused=True)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(
        [weights_N], lr=1.0, momentum=config.momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
    )


def tensor_of(decay: bool) -> Tensor:
    return Tensor("weights", (SLICES[-1],), decay, 0)


class Slices:
    """A tensor's slices under one Optimizer, end to end in flat memory as a server holds them."""

    def __init__(self, config: OptimizerConfig, decay: bool = True, first: int = 0):
        """`first` elements of something else lie before them, so that they begin where they happen to."""
        self.weights_N = torch.cat([torch.zeros(first), initial()])
        self._gradient_N = torch.zeros_like(self.weights_N)
        bounds = [(first + begin, first + end) for begin, end in pairwise(SLICES)]
        self.optimizer = Optimizer(
            [Slice(self.weights_N[begin:end], self._gradient_N[begin:end], tensor_of(decay)) for begin, end in bounds],
            config,
        )
        self._first = first

    @property
    def whole_N(self) -> torch.Tensor:
        return self.weights_N[self._first :]

    def step(self, gradient_N: torch.Tensor, step_rate: float) -> None:
        self._gradient_N[self._first :] = gradient_N
        self.optimizer.step(step_rate)


@every_rule
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_slices_are_updated_as_the_whole_bit_for_bit(config: dict[str, Any], decay: bool, first: int) -> None:
    """Wherever a bundle puts them: what a slice is bundled with depends on the number of servers."""
    rule = OptimizerConfig(**config)
    whole_N = initial()
    optimizer = reference(rule, decay, whole_N)
    ours = Slices(rule, decay, first)
    for gradient_N, step_rate in zip(gradients(len(RATES)), RATES, strict=True):
        whole_N.grad = gradient_N.clone()
        optimizer.param_groups[0]["lr"] = step_rate
        optimizer.step()
        ours.step(gradient_N, step_rate)
    assert torch.equal(ours.whole_N, whole_N.detach())
    assert not torch.equal(whole_N.detach(), initial())
    assert not ours.weights_N[:first].any()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_decay_is_used_where_asked_for_alone(kind: Any) -> None:
    """In one bundle, in any order; without it, a gradient of zeros moves nothing."""
    rule = OptimizerConfig(kind=kind, weight_decay=0.5)
    weights = [torch.ones(4), torch.ones(3), torch.ones(5), torch.ones(1)]
    decays = [True, False, True, False]
    gradients = [torch.zeros_like(weights_N) for weights_N in weights]
    Optimizer(list(map(Slice, weights, gradients, map(tensor_of, decays))), rule).step(0.1)
    for weights_N, decay in zip(weights, decays, strict=True):
        if not decay:
            assert (weights_N == 1).all()
        elif kind == "adamw":
            assert weights_N.tolist() == pytest.approx([0.95] * len(weights_N))
        else:
            assert (weights_N < 1).all()


@every_rule
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_saved_and_loaded_state_goes_on_bit_for_bit(config: dict[str, Any], after: int) -> None:
    rule = OptimizerConfig(**config)
    through, saved = Slices(rule), Slices(rule)
    steps = list(zip(gradients(len(RATES)), RATES, strict=True))
    for gradient_N, step_rate in steps[:after]:
        through.step(gradient_N, step_rate)
        saved.step(gradient_N, step_rate)
    states = [{name: array.copy() for name, array in state.items()} for state in saved.optimizer.state()]
    assert len(states) == len(SLICES) - 1
    for state, (begin, end) in zip(states, pairwise(SLICES), strict=True):
        assert sorted(state) == sorted(saved.optimizer.names(0))
        assert all(array.dtype == np.float32 for array in state.values())
        assert all(array.shape == ((1,) if name == "step" else (end - begin,)) for name, array in state.items())
    arrays = [array for state in states for name, array in state.items() if name != "step"]
    assert sum(array.nbytes for array in arrays) == saved.optimizer.state_bytes
    loaded = Slices(rule)
    loaded.weights_N.copy_(saved.weights_N)
    loaded.optimizer.load(states)
    for state in states:
        for array in state.values():
            array.fill(np.nan)  # what was loaded must be a copy
    for gradient_N, step_rate in steps[after:]:
        through.step(gradient_N, step_rate)
        loaded.step(gradient_N, step_rate)
    assert torch.equal(loaded.weights_N, through.weights_N)
    for ours, theirs in zip(loaded.optimizer.state(), through.optimizer.state(), strict=True):
        for name, array in theirs.items():
            assert np.array_equal(ours[name], array), name


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_never_zero(kind: str) -> None:
    rates = [rate(step, kind=kind, warmup_steps=4, decay_steps=5) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ({"kind": "cosine", "min_ratio": 0.1}, 0, PEAK),
        ({"kind": "cosine", "min_ratio": 0.1}, 99, 0.1 * PEAK),
        ({"kind": "cosine", "min_ratio": 0.0}, 99, 0.0),
        ({"kind": "cosine", "min_ratio": 0.1}, 100, 0.1 * PEAK),  # beyond the end it stays
        ({"kind": "cosine", "min_ratio": 0.0, "warmup_steps": 1}, 50, PEAK / 2),  # the middle
        ({"kind": "cosine", "warmup_steps": 100}, 99, PEAK),  # nothing but warm-up
        ({"kind": "wsd", "decay_steps": 10, "min_ratio": 0.1}, 89, PEAK),
        ({"kind": "wsd", "decay_steps": 10, "min_ratio": 0.0}, 94, PEAK / 2),
        ({"kind": "wsd", "decay_steps": 10, "min_ratio": 0.1}, 99, 0.1 * PEAK),
        ({"kind": "wsd", "decay_steps": 10, "min_ratio": 0.1}, 150, 0.1 * PEAK),
        ({"kind": "wsd", "decay_steps": 0}, 99, PEAK),
        ({"kind": "constant"}, 0, PEAK),
        ({"kind": "constant"}, 99, PEAK),
    ],
)
def test_rates_at_the_edges(schedule: dict[str, Any], step: int, expected: float) -> None:
    assert rate(step, **schedule) == pytest.approx(expected, abs=1e-12)


def test_a_job_of_one_step_has_a_rate() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert rate(0, num_steps=1, kind=kind) == PEAK


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_after_the_warm_up_the_rate_never_rises(kind: str) -> None:
    rates = [rate(step, kind=kind, warmup_steps=7, decay_steps=20) for step in range(7, 100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == PEAK
    assert rates[-1] == pytest.approx(0.1 * PEAK)
