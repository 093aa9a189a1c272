"""How fast a device is: workers say it when they register, so that a slow one gets a smaller stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_SIZE, GPU_SIZE = 384, 4096
NUM_ATTEMPTS = 7
PAUSE_SECONDS = 0.03
"""Between attempts: one moment of what else the machine does shall not slow down them all."""


def measure_flops(device: torch.device) -> float:
    """fp32 operations a second of a matrix product on `device`: the best of a few, as whatever else the machine does
    only slows it down. On a CPU with one thread, by its processor time: services that start together take each other's
    turns. Takes a fifth of a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if device.type == "cuda":
            return matrix_flops(device, GPU_SIZE, NUM_ATTEMPTS, PAUSE_SECONDS)
        return matrix_flops(device, CPU_SIZE, NUM_ATTEMPTS, PAUSE_SECONDS, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def matrix_flops(
    device: torch.device | str,
    size: int,
    num_attempts: int,
    pause_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Operations a second of the product of two square matrices, under the threads and autocast in force: the best of
    several attempts, `pause_seconds` apart, by a clock in seconds."""
    import torch

    left_NN = torch.ones(size, size, device=device)
    best = float("inf")
    with torch.no_grad():
        for number in range(num_attempts):
            if number:
                time.sleep(pause_seconds)
            begin = clock()
            _ = left_NN @ left_NN
            if left_NN.is_cuda:
                torch.cuda.synchronize(left_NN.device)
            best = min(best, clock() - begin)
    return 2 * size**3 / best
