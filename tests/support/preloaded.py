"""Imports the modules of coordinator, parameter server and worker, once for all in the fork server."""

# ruff: noqa: E402, F401
import asyncio
import os
import time
from pathlib import Path

import numpy


def num_threads() -> int:
    """The number of threads of this process, libraries' included."""
    return len(os.listdir("/proc/self/task"))


# OpenBLAS ends its threads before a fork and starts them again after it.
_NUM_BEFORE = num_threads()

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

import gradstream.coordinator.cli.serve
import gradstream.coordinator.server
import gradstream.services.parameter_server.server
import gradstream.services.parameter_server.shard
import gradstream.worker.job
import gradstream.worker.process
from gradstream.coordinator.planning.inventory import take_inventory, take_profile
from gradstream.core.model import model
from support.tiny import GPT2, LLAMA, tiny_recipe

model.preload()


async def look_at_models() -> None:
    """Measure the models of most tests once here. Otherwise a coordinator starts a child process for each new model."""
    recipe = tiny_recipe(Path("data"), Path("runs"))
    await take_inventory(GPT2)
    await take_profile(LLAMA, recipe.training)  # alone: it measures times


asyncio.run(look_at_models())

# A fork copies only the thread that forks, so locks of other threads would stay locked without end. A thread that has
# ended may still be listed for a moment.
_DEADLINE = time.monotonic() + 10
while num_threads() > _NUM_BEFORE and time.monotonic() < _DEADLINE:
    time.sleep(0.02)
if num_threads() > _NUM_BEFORE:
    raise SystemExit("error: an import has started a thread; this process cannot be forked")
