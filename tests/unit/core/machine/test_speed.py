"""The measured speed of a device is plausible, and measuring it does not change torch's number of threads."""

from itertools import count

import torch

from gradstream.core.machine.speed import matrix_flops, measure_flops


def test_a_cpu_has_a_speed() -> None:
    before = torch.get_num_threads()
    flops = measure_flops(torch.device("cpu"))
    assert 1e8 < flops < 1e13
    assert torch.get_num_threads() == before


def test_the_clock_that_is_given_counts() -> None:
    ticks = map(float, count())
    assert matrix_flops("cpu", 8, 3, clock=lambda: next(ticks)) == 2 * 8**3
