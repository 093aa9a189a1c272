"""Generates with bases and with the results of fine-tunings, through the engine."""

from __future__ import annotations

import asyncio
import importlib
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, ItemsView, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import torch

from gradstream.core.checkpoint.manifest import WEIGHT, read_manifest
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.pretrained.base import BaseReader, load_tokenizer
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.storage.pool import LOAD_SECONDS, StorageThreads
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.bases import find_base, looked_at
from gradstream.services.fine_tuning.examples.dataset import chat_prompt_ids
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.examples.rendering import Prompt
from gradstream.services.fine_tuning.generation.engine import Engine, EngineLimits, GenerationRequest
from gradstream.services.fine_tuning.generation.evaluation import exact_match
from gradstream.services.fine_tuning.generation.models import ResidentLimits, ServedModels
from gradstream.services.fine_tuning.store import Completed, Completions
from gradstream.services.fine_tuning.threads import in_thread

DEFAULT_NEW_TOKENS = 128
MAX_SERVED = 64
MAX_TOKENIZERS = 8
CACHE_SHARE = 0.25


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """The trained tensors of a checkpoint, read on access. Raises CheckpointError when the checkpoint is damaged.

    To read all of them, use `items`: it opens the checkpoint, and verifies each file, once and not for each tensor.
    """

    def __init__(self, directory: str):
        self._directory = directory
        self._names = [entry.name for entry in read_manifest(directory).tensors]

    def __getitem__(self, name: str) -> torch.Tensor:
        return _read_weight(CheckpointReader(self._directory), name)

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Read all tensors into memory."""
        reader = CheckpointReader(self._directory)
        return {name: _read_weight(reader, name) for name in self._names}.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_weight(reader: CheckpointReader, name: str) -> torch.Tensor:
    shape = reader.shape(name)
    return torch.from_numpy(reader.read(WEIGHT, name, 0, math.prod(shape))).reshape(shape)


class Serving:
    """Generates with bases, and with the checkpoints of fine-tunings."""

    def __init__(self, device: str, memory_bytes: int):
        """`memory_bytes`: the memory for models, and for the keys and values of texts that are being generated."""
        chosen = torch.device(resolve_device(device))
        cache_bytes = int(memory_bytes * CACHE_SHARE)
        limits = ResidentLimits(
            bases_bytes=memory_bytes - cache_bytes,
            # bf16 saves a GPU's scarce memory and is fast there. On a CPU it is slow, and memory is not scarce.
            dtype=torch.float32 if chosen.type == "cpu" else torch.bfloat16,
            device=chosen,
        )
        self._models = ServedModels(BaseReader, load_tokenizer, limits)
        self.engine = Engine(self._models, EngineLimits(cache_bytes=cache_bytes, memory_bytes=memory_bytes))
        self._storage = StorageThreads(LOAD_SECONDS)
        self._served: OrderedDict[str, None] = OrderedDict()
        self._tokenizers: OrderedDict[str, tuple[Any, Encoder]] = OrderedDict()

    async def close(self) -> None:
        """End all generations."""
        await self.engine.close()

    async def tokenizer(self, base: Base) -> tuple[Any, Encoder]:
        """Load a base's tokenizer and the encoder made of it. Raises ConfigError when the base has no usable one."""
        known = self._tokenizers.get(base.tokenizer_key)
        if known is None:
            known = await self._storage.call(base.path, _load_tokenizer, base)
            self._tokenizers[base.tokenizer_key] = known
            while len(self._tokenizers) > MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        return known

    async def complete(self, base: Base, checkpoint: str | None, prompts: Sequence[Prompt]) -> Completions:
        """Have a model complete held-out prompts."""
        model = await self._serve(base, checkpoint)
        found = await exact_match(self.engine, model, prompts)
        samples = tuple(
            Completed(prompt=sample.prompt, expected=sample.expected, generated=sample.generated)
            for sample in found.samples
        )
        return Completions(num_prompts=found.num_prompts, num_exact=found.num_exact, samples=samples)

    async def generate(
        self, base: Base, checkpoint: str | None, request: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield a completion in pieces. Raises ConfigError, CheckpointError and UnreachableError as the engine does."""
        ids = await self._prompt_ids(base, request)
        model = await self._serve(base, checkpoint)
        num_new = request.max_new_tokens
        if not request.HasField("max_new_tokens"):
            # The default number of new tokens is lowered to the room that the prompt leaves.
            longest = (await self.engine.facts(model)).max_positions
            num_new = DEFAULT_NEW_TOKENS if longest is None else max(1, min(DEFAULT_NEW_TOKENS, longest - len(ids)))
        asked = GenerationRequest(
            model,
            tuple(ids),
            max_new_tokens=num_new,
            temperature=request.temperature,
            top_p=request.top_p if request.HasField("top_p") else 1.0,
            seed=request.seed,
            stop=tuple(request.stop),
        )
        async with aclosing(self.engine.generate(asked)) as pieces:
            async for piece in pieces:
                yield pb.GenerateResponse(
                    text=piece.text, num_tokens=piece.num_tokens, finish_reason=piece.finish_reason
                )

    async def _prompt_ids(self, base: Base, request: pb.GenerateRequest) -> list[int]:
        if request.prompt and request.messages:
            raise ConfigError("give a prompt or messages, not both")
        tokenizer, encoder = await self.tokenizer(base)
        if request.messages:
            messages = [{"role": message.role, "content": message.content} for message in request.messages]
            return await asyncio.to_thread(chat_prompt_ids, messages, tokenizer, encoder)
        ids, _ = await asyncio.to_thread(encoder.pieces, [(request.prompt, False)], True)
        return ids

    async def _serve(self, base: Base, checkpoint: str | None) -> str:
        """Make a model available for generation; return its name in the engine.

        Raises UnreachableError when the model's storage does not answer: the one compute thread must not wait for it.
        """
        for path in filter(None, (base.path, checkpoint)):
            await self._storage.call(path, looked_at, path)
        name = checkpoint if checkpoint is not None else f"{base.sha256} {base.tokenizer_key}"
        if name not in self._served:
            if checkpoint is None:
                self._models.add_base(name, base)
            else:
                await in_thread(self._add_checkpoint, checkpoint)
            self._served[name] = None
        self._served.move_to_end(name)
        while len(self._served) > MAX_SERVED:
            self._models.remove(self._served.popitem(last=False)[0])
        return name

    def _add_checkpoint(self, directory: str) -> None:
        fine_tuning = read_manifest(directory).fine_tuning
        if fine_tuning is None:
            raise CheckpointError(f"checkpoint {directory} is not of a fine-tuning; name it as a base instead")
        if fine_tuning.lora is None:
            self._models.add_base(directory, find_base(directory, directory)[0])
        else:
            self._models.add_adapter(directory, fine_tuning.base, fine_tuning.lora, CheckpointWeights(directory))


def import_libraries() -> None:
    """Import the libraries that load models. They take about a second of processor time."""
    for name in ("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "peft"):
        importlib.import_module(name)


def resolve_device(device: str) -> str:
    """Replace "auto" by "cpu" or "cuda". Raises ConfigError when a GPU is requested and there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that torch can use; use --device cpu")
    return device


def _load_tokenizer(base: Base) -> tuple[Any, Encoder]:
    tokenizer = load_tokenizer(base)
    return tokenizer, Encoder(tokenizer)
