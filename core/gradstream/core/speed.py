"""How fast a device is: workers say it when they register, so that a slow one gets a smaller stage."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_SIZE, GPU_SIZE = 384, 4096
NUM_TRIES = 7


def measure_flops(device: torch.device) -> float:
    """fp32 operations a second of a matrix product on `device`, with one thread on a CPU: the best of a few, as
    whatever else the machine does only slows it down. Takes some tens of milliseconds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
        left_NN = torch.ones(size, size, device=device)
        best = float("inf")
        for _ in range(NUM_TRIES):
            begin = time.perf_counter()
            _ = left_NN @ left_NN
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best
