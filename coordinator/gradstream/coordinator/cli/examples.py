"""The examples at the end of a command's help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "gradstream init tinyshakespeare.txt",
        "gradstream init wikitext/*.txt --size 30M --workers 4 --link 1Gb/s",
    ),
    "dev": (
        "gradstream dev stdlib-gpt",
        "gradstream dev tinyshakespeare.yaml -s optimizer.learning_rate=6e-4 --workers 4",
    ),
    "submit": (
        "gradstream submit gpt2-wikitext.yaml --watch",
        "gradstream submit gpt2-wikitext.yaml -s training.num_steps=5000 -s training.global_batch=64",
    ),
    "watch": ("gradstream watch", "gradstream watch gpt2-wikitext-1"),
    "plan": ("gradstream plan gpt2-wikitext.yaml --workers 8 --servers 2 --link 1Gb/s",),
    "status": ("gradstream status", "gradstream status gpt2-wikitext-1 -o json"),
    "logs": ("gradstream logs -f --tail 20", "gradstream logs --node gpu-3 --level warning"),
    "events": ("gradstream events -f --tail 10",),
    "metrics": ("gradstream metrics gpt2-wikitext-1 -o csv > metrics.csv",),
    "top": ("gradstream top", "gradstream top --count 1 -o json"),
    "pause": ("gradstream pause", "gradstream pause gpt2-wikitext-1"),
    "stop": ("gradstream stop gpt2-wikitext-1", "gradstream stop gpt2-wikitext-1 --now"),
    "generate": ('gradstream generate gpt2-wikitext-1 --prompt "Once upon a time"',),
    "ckpt export": ("gradstream ckpt export gpt2-wikitext-1 --to gpt2-wikitext",),
    "data prepare": (
        "gradstream data prepare tinyshakespeare.txt",
        "gradstream data prepare c4/*.json.gz --to data/c4 --text-field text --tokenizer gpt2/tokenizer.json",
    ),
    "finetune create": (
        "gradstream finetune create alpaca.yaml --dry-run",
        "gradstream finetune create alpaca.yaml -s base_model=models/SmolLM-135M -s lora.rank=16 --wait",
    ),
    "finetune generate": ('gradstream finetune generate alpaca --chat --prompt "Write a haiku."',),
    "finetune export": ("gradstream finetune export alpaca --to adapter",),
}
"""Examples by the words of a command. Users of other tools know the names in them."""


def epilog(words: str) -> str | None:
    """The examples of a command as the end of its help; None when it has none. `\\b` preserves the line breaks."""
    lines = EXAMPLES.get(words)
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)]) if lines else None
