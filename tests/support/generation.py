"""Tiny models, adapters and tokenizers that generate text at once, and functions to generate with them."""

from __future__ import annotations

import hashlib
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, trainers
from torch import nn

from gradstream.core.errors import GradstreamError
from gradstream.core.model.model import build
from gradstream.core.recipe.fine_tuning import Base, LoraConfig
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.generation.batching import Batcher, EngineLimits, EngineStatus
from gradstream.services.fine_tuning.generation.models import ResidentLimits, ServedModels
from gradstream.services.fine_tuning.generation.rows import GenerationRequest, Piece, Row
from support.tiny import GPT2, LLAMA

TEXT = ["the cat sat on the mat, and the dog sat by the door", "Zoë said: naïve 東京 🎉", "2+3=5 and 4+4=8"]
MISTRAL: dict[str, Any] = {**LLAMA, "model_type": "mistral", "sliding_window": 4, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 1},
    "gpt2": GPT2,
    "mistral": MISTRAL,
}


def byte_level_tokenizer() -> Any:
    """Make a tokenizer like GPT-2's: every byte has a token, so a character may take four. Token 0 ends a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback_tokenizer() -> Any:
    """Make a tokenizer like Llama 2's.

    Blanks belong to words, a text's first blank is removed, and unknown characters are bytes.
    """
    letters = "▁abcdefghijklmnopqrstuvwxyzHé"
    words = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def random_model(config: dict[str, Any], seed: int = 0) -> Any:
    """Make a model with random weights, so large that each token leads to a different one."""
    model = build(config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


def adapter_weights(bare_model: nn.Module, lora: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    """Make random adapter weights, with the names that they have in a job's checkpoint."""
    from gradstream.core.model.lora import add_adapters

    generator = torch.Generator().manual_seed(seed)
    with_adapters = build(bare_model.config.to_dict(), "meta")
    add_adapters(with_adapters, lora)
    return {
        name: torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
        for name, parameter in with_adapters.named_parameters()
        if ".lora_" in name
    }


def with_adapters(bases: MemoryBases, models: ServedModels, *names: str) -> Any:
    bare = random_model(CONFIGS["llama"])
    base = bases.add("base", bare)
    models.add_base("base", base)
    for seed, name in enumerate(names):
        lora = LoraConfig(rank=2)
        models.add_adapter(name, base, lora, adapter_weights(bare, lora, seed))
    return bare


class MemoryBases:
    """Bases that are in memory. Counts how often each was read."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.num_reads: dict[str, int] = {}
        self.missing: set[str] = set()
        self.tokenizer = byte_level_tokenizer()

    def add(self, title: str, model: Any) -> Base:
        self.models[title] = model
        sha256 = hashlib.sha256(title.encode()).hexdigest()
        return Base(kind="huggingface", path=f"memory/{title}", title=title, files=(), sha256=sha256)

    def open(self, base: Base) -> MemoryTensors:
        return MemoryTensors(self, base.title)

    def served(self, limits: ResidentLimits | None = None) -> ServedModels:
        return ServedModels(self.open, lambda base: self.tokenizer, limits)


class MemoryTensors:
    """A BaseReader of a base in memory."""

    def __init__(self, bases: MemoryBases, title: str):
        self._bases, self._title = bases, title
        self._tensors = dict(bases.models[title].named_parameters())

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._bases.models[self._title].config.to_dict()
        return config

    def names(self) -> list[str]:
        return [name for name in self._tensors if name not in self._bases.missing]

    def tensor(self, name: str) -> torch.Tensor:
        if name == self.names()[0]:
            self._bases.num_reads[self._title] = self._bases.num_reads.get(self._title, 0) + 1
        return self._tensors[name].detach().clone()


class Asked:
    """A request, the pieces delivered for it, and its row."""

    def __init__(self, models: ServedModels, request: GenerationRequest, patient: bool = False):
        served = models.find(request.model)
        self.delivered: list[Piece | GradstreamError] = []
        self.row = Row(request, served, models.facts(served), self.delivered.append, patient)

    @property
    def pieces(self) -> list[Piece]:
        assert not any(isinstance(piece, GradstreamError) for piece in self.delivered), self.delivered
        return [piece for piece in self.delivered if isinstance(piece, Piece)]

    @property
    def text(self) -> str:
        assert self.finished
        return "".join(piece.text for piece in self.pieces)

    @property
    def finished(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].finish_reason != pb.FINISH_REASON_UNSPECIFIED

    @property
    def error(self) -> GradstreamError:
        (error,) = self.delivered
        assert isinstance(error, GradstreamError)
        return error


def submit(batcher: Batcher, models: ServedModels, *requests: GenerationRequest) -> list[Asked]:
    asked = [Asked(models, request) for request in requests]
    for one in asked:
        batcher.submit(one.row)
    return asked


def drain(batcher: Batcher) -> None:
    for _ in range(1000):
        if batcher.status() == EngineStatus(0, 0):
            return
        batcher.step()
    raise AssertionError(f"still {batcher.status()}")


def generated(models: ServedModels, *requests: GenerationRequest, **limits: int) -> list[Asked]:
    batcher = Batcher(models, EngineLimits(**limits))
    asked = submit(batcher, models, *requests)
    drain(batcher)
    return asked


def ask(model: str, prompt: list[int], count: int = 12, **settings: Any) -> GenerationRequest:
    return GenerationRequest(model, tuple(prompt), count, **settings)


def greedy_of(model: Any, prompt: list[int], count: int = 12) -> list[int]:
    """Generate greedily with transformers; return the ids without the token that ends a text."""
    ids_BT = torch.tensor([prompt])
    out_BT = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    ids: list[int] = out_BT[0, len(prompt) :].tolist()
    return ids[: ids.index(0)] if 0 in ids else ids


def text_of(bases: MemoryBases, prompt: list[int], ids: list[int]) -> str:
    whole: str = bases.tokenizer.decode(prompt + ids, skip_special_tokens=True)
    # A prompt of a few bytes may itself end inside a character.
    before: str = bases.tokenizer.decode(prompt, skip_special_tokens=True)
    at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
    return whole[at:]


def last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_V: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return logits_V
