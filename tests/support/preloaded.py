"""What a coordinator, a parameter server and a worker import; the fork server imports it once for all of them."""

# ruff: noqa: E402, F401
import asyncio
import os
import time
from pathlib import Path

import numpy


def num_threads() -> int:
    """Threads of this process, those of libraries too."""
    return len(os.listdir("/proc/self/task"))


# OpenBLAS ends its threads before a fork and starts them after it.
_NUM_BEFORE = num_threads()

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

import gradstream.coordinator.cli.serve
import gradstream.coordinator.server
import gradstream.services.parameter_server.server
import gradstream.worker.job
import gradstream.worker.process
from gradstream.coordinator.planning.inventory import take_inventory, take_profile
from gradstream.core.model import model
from support.tiny import GPT2, LLAMA, tiny_recipe

model.preload()


async def look_at_models() -> None:
    """A coordinator has a child process import transformers for each new model: here once for those of most tests."""
    recipe = tiny_recipe(Path("data"), Path("runs"))
    await take_inventory(GPT2)
    await take_profile(LLAMA, recipe.training)  # alone: it measures times


asyncio.run(look_at_models())

# A fork takes along only the thread that forks: what others held would be held for ever. One that has ended may be
# listed for a moment more.
_DEADLINE = time.monotonic() + 10
while num_threads() > _NUM_BEFORE and time.monotonic() < _DEADLINE:
    time.sleep(0.02)
if num_threads() > _NUM_BEFORE:
    raise SystemExit("error: an import has started a thread; this process cannot be forked")
