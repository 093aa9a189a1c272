"""bench-fine_tuning: LoRA on a Llama of 135 M parameters (SmolLM's shape, random weights) against peft in one process.

The cluster is a coordinator, a parameter server and two workers of one thread. The rival is peft and torch's AdamW in
one process with two threads, on the same rows, microbatches and adapters. Memory is the peak proportional set size
(shared memory counts once) of all processes of a side together.

    make bench-fine_tuning
    python benchmarks/fine_tuning.py --held int8 --no-peft
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from network import Loopback
from report import Result, arguments_parser, at_most, chosen, report, result
from step import cluster, process

from gradstream.client import Client, Step
from gradstream.core.model.model import inventory
from gradstream.core.pretrained.base import find_base, load_tokenizer
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.services.fine_tuning.examples.dataset import prepare_examples

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMOKE_MODEL = {
    **MODEL,
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ROW_LENGTH, NUM_SLOTS, NUM_STEPS, NUM_WARM_STEPS = 128, 4, 5, 1
NUM_WORKERS = 2
MAX_BYTES = 8 << 30


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--held", action="append", choices=["fp32", "bf16", "int8"], help="default: bf16 and int8")
    parser.add_argument("--no-peft", action="store_true", help="leave the rival out (while working on gradstream)")
    parser.add_argument("--peft-only", metavar="RECIPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft_only:
        run_peft(parse_recipe(Path(arguments.peft_only).read_text(encoding="utf-8")))
        return
    model, size = (SMOKE_MODEL, "tiny") if arguments.smoke else (MODEL, "135m")
    held_as = arguments.held or (["bf16"] if arguments.smoke else ["bf16", "int8"])
    cases = chosen("fine_tuning", {f"{size}_{held}": held for held in held_as}, arguments.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as temporary:
        base, data = Path(temporary) / "base", Path(temporary) / "data"
        make_base(base, model)
        make_rows(base, data, Path(temporary) / "rows.jsonl")
        rival: tuple[float, int, float] | None = None
        if not arguments.no_peft:
            rival = measure_peft(recipe_of(base, data, Path(temporary), "bf16"), Path(temporary))
            say("peft", *rival)
        for case, held in cases.items():
            recipe = recipe_of(base, data, Path(temporary), held)
            seconds, num_bytes, loss, pushed = measure_cluster(recipe, Path(temporary))
            say(held, seconds, num_bytes, loss)
            assert recipe.fine_tuning is not None
            adapters = 4 * sum(tensor.num_elements for tensor in inventory(model, recipe.fine_tuning.lora))
            results.append(
                at_most(f"memory_share_{case}", num_bytes / MAX_BYTES, 1.0, f"{num_bytes / 2**30:.2f} GiB of 8")
            )
            results.append(
                at_most(
                    f"pushed_per_slot_over_adapters_{case}",
                    pushed / NUM_SLOTS / adapters,
                    1.01,
                    f"{pushed / 1e6:.2f} MB a step in {NUM_SLOTS} slots, adapters {adapters / 1e6:.2f} MB",
                )
            )
            if rival is not None:
                results.append(
                    result(
                        f"peft_ratio_{case}",
                        rival[0] / seconds,
                        0.0,
                        f"{rival[0] * 1e3:.0f} / {seconds * 1e3:.0f} ms a step, {rival[1] / 2**30:.2f} / "
                        f"{num_bytes / 2**30:.2f} GiB, loss {rival[2]:.4f} / {loss:.4f}",
                    )
                )
    report("fine_tuning", results)


def say(name: str, seconds: float, num_bytes: int, loss: float) -> None:
    """Print progress on stderr."""
    print(f"{name}: {seconds * 1e3:.0f} ms a step, {num_bytes / 2**30:.2f} GiB, loss {loss:.5f}", file=sys.stderr)


def make_base(directory: Path, model: dict[str, Any]) -> None:
    """Write the model's directory, in bf16 like published models of this size."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    fields = dict(model)
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer.train([str(library / name) for name in ("argparse.py", "ast.py", "typing.py")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)


def make_rows(base: Path, data: Path, rows: Path) -> None:
    """Make the rows: each prompt is a few lines of a module, its completion the line after them."""
    lines = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8").splitlines()
    with rows.open("w", encoding="utf-8") as stream:
        for begin in range(0, len(lines) - 9, 4):
            completion = lines[begin + 8]
            if completion.strip():
                prompt = "\n".join(lines[begin : begin + 8]) + "\n"
                stream.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    found, _ = find_base(str(base))
    config = ExamplesConfig(path=str(rows), too_long="skip")
    prepare_examples(config, load_tokenizer(found), ROW_LENGTH, NUM_SLOTS, str(data), 0)


def recipe_of(base: Path, data: Path, temporary: Path, held: str) -> Recipe:
    """Make the recipe that both sides follow."""
    found, config = find_base(str(base))
    return parse_recipe(
        {
            "name": f"bench-{held}",
            "seed": 1,
            "run_root": str(temporary / "runs"),
            "model": {"config": config},
            "training": {
                "num_steps": NUM_STEPS,
                "num_slots": NUM_SLOTS,
                "global_batch": NUM_SLOTS,
                "microbatch": 1,
                "sequence_length": ROW_LENGTH,
            },
            "optimizer": {"learning_rate": 2e-4, "weight_decay": 0.0},
            "schedule": {"kind": "constant"},
            "codec": {"push": "fp32", "pull": "fp32"},
            "data": {"path": str(data)},
            "validation": {"interval_steps": 0},
            "checkpoint": {"interval_steps": 0},
            "cluster": {"min_workers": NUM_WORKERS},
            "fine_tuning": {
                "base": found.model_dump(mode="json"),
                "method": "lora",
                "lora": {"rank": 16, "alpha": 32},
                "held": held,
            },
        }
    )


# --- the two sides ----------------------------------------------------------------------------------------------------


def measure_cluster(recipe: Recipe, temporary: Path) -> tuple[float, int, float, float]:
    """Train on the cluster; return (seconds a step, peak bytes, last loss, bytes pushed a step)."""
    with (
        tempfile.TemporaryDirectory(dir=temporary) as directory,
        highest_memory() as most,
        cluster(Loopback(), NUM_WORKERS, Path(directory), num_servers=1) as running,
        Client(running.address) as client,
    ):
        job = client.submit(recipe)
        steps = [item for item in client.watch(job.job_id) if isinstance(item, Step)]
        job = client.job(job.job_id)
        if len(steps) < NUM_STEPS:
            raise SystemExit(f"error: the job {job.state} after {len(steps)} steps: {job.reason}")
    times = [step.time.timestamp() for step in steps]
    timed = [after - before for before, after in pairwise(times)][NUM_WARM_STEPS - 1 :]
    return statistics.median(timed), most[0], steps[-1].loss, steps[-1].pushed_bytes


def measure_peft(recipe: Recipe, temporary: Path) -> tuple[float, int, float]:
    """Train with peft; return (seconds a step, peak bytes, last loss)."""
    path = temporary / "recipe.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    steps = []
    with (
        highest_memory() as most,
        process([sys.executable, __file__, "--peft-only", str(path)], {"OMP_NUM_THREADS": "2"}, pipe=True) as running,
    ):
        assert running.stdout is not None
        steps = [json.loads(line) for line in running.stdout]
    if len(steps) != NUM_STEPS:
        raise SystemExit(f"error: peft ended after {len(steps)} of {NUM_STEPS} steps")
    return statistics.median(step["seconds"] for step in steps[NUM_WARM_STEPS:]), most[0], steps[-1]["loss"]


def run_peft(recipe: Recipe) -> None:
    """Run the rival's process, which prints a line of JSON a step."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from gradstream.core.data.manifest import parse_manifest
    from gradstream.core.model.lora import peft_config
    from gradstream.core.model.model import initial_weights
    from gradstream.worker.samples.data import SlotReader
    from gradstream.worker.samples.packing import layout_of

    tuning, training = recipe.fine_tuning, recipe.training
    assert tuning is not None
    assert tuning.lora is not None
    model: Any = AutoModelForCausalLM.from_pretrained(tuning.base.path, dtype=torch.float32)
    model = peft.get_peft_model(model, peft_config(tuning.lora, model))
    with torch.no_grad():
        for name, tensor in initial_weights(recipe.model.config, recipe.seed, lora=tuning.lora):
            model.get_parameter(f"base_model.model.{name}").copy_(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.optimizer.learning_rate, betas=recipe.optimizer.betas, weight_decay=0.0
    )
    manifest = parse_manifest((Path(recipe.data.path) / "manifest.json").read_bytes())
    readers = [
        SlotReader(manifest, recipe.data.path, "", slot, training.num_slots, training.sequence_length, recipe.seed)
        for slot in range(training.num_slots)
    ]
    for reader in readers:
        asyncio.run(reader.prepare())
    for step in range(training.num_steps):
        begin = time.perf_counter()
        num_tokens, loss_sum = 0, 0.0
        for reader in readers:
            batch = reader.batch(step, training.slot_batch)
            assert batch.examples is not None
            logits = model(
                input_ids=torch.from_numpy(batch.inputs), use_cache=False, **layout_of(batch.examples)
            ).logits
            targets = torch.from_numpy(batch.targets).flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
            loss.backward()
            loss_sum, num_tokens = loss_sum + loss.item(), num_tokens + batch.num_targets
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(num_tokens)
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss_sum / num_tokens}), flush=True)


@contextmanager
def highest_memory() -> Iterator[list[int]]:
    """Measure the peak memory in bytes of this process's children together, sampled four times a second."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            total = 0
            for child in psutil.Process(os.getpid()).children(recursive=True):
                try:
                    total += child.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
