"""The speed of a device. Workers report it when they register; a slow one gets a smaller stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_SIZE, GPU_SIZE = 384, 4096
NUM_ATTEMPTS = 7
PAUSE_SECONDS = 0.03
"""Pause between attempts. A short burst of other work on the machine then slows down only some of them."""


def measure_flops(device: torch.device) -> float:
    """Measure the fp32 operations a second of a matrix product on `device`, in a fifth of a second.

    The best of a few attempts counts, because other work on the machine can only slow them down. On a CPU the product
    has one thread and is timed by processor time, because services that start together compete for cores.
    """
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
    """Measure the operations a second of the product of two square matrices: the best of `num_attempts`.

    Attempts are `pause_seconds` apart. Threads and autocast are those in force. `clock` is in seconds.
    """
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
