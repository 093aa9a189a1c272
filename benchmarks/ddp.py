"""The rival of bench-step: one process of PyTorch DistributedDataParallel on gloo. Not a benchmark by itself.

It trains as gradstream does, with the same initial weights, samples, optimizer, clipping and learning rates. Rank 0
prints one line of JSON a step, {"step": …, "seconds": …, "loss": …}, after a barrier at the step's end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from plain import adamw, initial_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gradstream.core.data.manifest import parse_manifest
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.recipe.loading import parse_recipe
from gradstream.worker.samples.data import SlotReader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fp16", action="store_true")
    arguments = parser.parse_args()
    recipe = parse_recipe(arguments.recipe.read_text(encoding="utf-8"))
    training, optimizer_config = recipe.training, recipe.optimizer
    torch.set_num_threads(training.num_threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{arguments.address}:{arguments.port}",
        rank=arguments.rank,
        world_size=training.num_slots,
        timeout=timedelta(seconds=300),
    )
    model = initial_model(recipe)
    model.train()
    parallel = DistributedDataParallel(model)
    if arguments.fp16:
        parallel.register_comm_hook(None, fp16_compress_hook)
    optimizer = adamw(model, optimizer_config, fused=True)
    reader = SlotReader(
        manifest=parse_manifest((Path(recipe.data.path) / "manifest.json").read_text(encoding="utf-8")),
        path=recipe.data.path,
        cache_directory="",
        slot=arguments.rank,
        num_slots=training.num_slots,
        sequence_length=training.sequence_length,
        seed=recipe.seed,
    )
    asyncio.run(reader.prepare())
    for step in range(training.num_steps):
        began = time.perf_counter()
        tokens_BT = torch.from_numpy(reader.batch(step, training.slot_batch).tokens)
        logits_BTV = parallel(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training.num_steps, optimizer_config, recipe.schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        # Not timed: the mean of the ranks' losses, which is the loss over the global batch.
        mean = loss.detach()
        dist.all_reduce(mean)
        if arguments.rank == 0:
            line = {"step": step, "seconds": seconds, "loss": float(mean) / training.num_slots}
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
