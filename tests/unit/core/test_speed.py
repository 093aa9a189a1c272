"""A device's speed is a number that a machine can have, and taking it leaves torch's threads alone."""

import torch

from gradstream.core.speed import measure_flops


def test_a_cpu_has_a_speed() -> None:
    before = torch.get_num_threads()
    flops = measure_flops(torch.device("cpu"))
    assert 1e8 < flops < 1e13
    assert torch.get_num_threads() == before
