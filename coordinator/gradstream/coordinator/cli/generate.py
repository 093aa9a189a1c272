"""`gradstream generate`: continue a prompt with a job's model or an exported directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from gradstream.coordinator.cli.options import CoordinatorOption, OutputFormat, OutputOption, open_client
from gradstream.coordinator.cli.views import terminal


def generate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="An exported directory, or a job's id; the newest job when left out.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1, help="Sample from the likeliest share p.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same text.")] = 0,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="HOST:PORT",
            help="With a job: the fine-tuning service that generates, instead of this machine.",
            show_default="this machine, if PyTorch is installed",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Continue a prompt with a job's model (its last checkpoint) or an exported directory.

    The text appears as it is generated.
    """
    import tempfile

    from gradstream.core.errors import ConfigError
    from gradstream.core.extras import installed, require

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    path = Path(source).expanduser() if source is not None else None
    if path is not None and path.is_dir():
        require("`gradstream generate DIRECTORY`", "node")
        if service is not None:
            raise ConfigError(f"{source} is a directory, and a service generates with jobs; leave out --service")
        with terminal.WorkingLine() as working, _Printer(prompt, working, output) as printer:
            text = generate_text(path, prompt, **settings, on_progress=working, on_text=printer)
    elif source is not None and (os.sep in source or source.startswith(".")):
        raise ConfigError(f"{source}: no such directory; export a checkpoint with `gradstream ckpt export`")
    elif service is not None or "node" not in installed():
        text = ""
        with (
            open_client(coordinator) as client,
            terminal.WorkingLine() as working,
            _Printer(prompt, working, output) as printer,
        ):
            working("waiting for the first token: the service may have to load the model …")
            for piece in client.generate(source, prompt, service=service, **settings):
                text += piece.text
                printer(piece.text)
    else:
        from gradstream.coordinator.cli.ckpt import ExportReporter

        with tempfile.TemporaryDirectory(prefix="gradstream-generate-") as temporary:
            with open_client(coordinator) as client:
                exported = client.export(source, Path(temporary) / "export", None, ExportReporter())
            with terminal.WorkingLine() as working, _Printer(prompt, working, output) as printer:
                text = generate_text(exported, prompt, **settings, on_progress=working, on_text=printer)
    if output is OutputFormat.json:
        terminal.print_json({"prompt": prompt, "text": text, **settings})


class _Printer:
    """Prints the prompt and then each piece of the text as it is generated; with JSON output nothing."""

    def __init__(self, prompt: str, working: terminal.WorkingLine, output: OutputFormat):
        self._prompt: str | None = prompt  # None once printed
        self._working = working
        self._prints = output is not OutputFormat.json

    def __call__(self, piece: str) -> None:
        if self._prints and piece:
            self._print(piece, end="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """End the line; without an error print the prompt, if no text followed it."""
        if self._prints and (error is None or self._prompt is None):
            self._print("", end="\n")

    def _print(self, piece: str, end: str) -> None:
        if self._prompt is not None:
            self._working("")
        terminal.print_text((self._prompt or "") + piece, end)
        self._prompt = None


def generate_text(
    directory: Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
    on_text: Callable[[str], None] = lambda piece: None,
) -> str:
    """Continue `prompt` with the model in `directory` (config.json, safetensors, tokenizer.json); return the new text.

    `on_progress` is called with a text on the current phase, `on_text` with each piece of the new text as it is
    generated, a word or more.

    Raises ConfigError when the directory has no model, and CheckpointError when the model cannot be loaded.
    """
    from gradstream.core.errors import CheckpointError, ConfigError
    from gradstream.core.foreign import parsing
    from gradstream.core.machine.openmp import sleep_while_waiting
    from gradstream.core.pretrained.tokenizer import end_ids, load_tokenizer
    from gradstream.core.recipe.fine_tuning import Base

    if (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"{directory} is an adapter; generate with `gradstream finetune generate`, or write a whole model with "
            f"`gradstream finetune export --merged`"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} has no {name}; name a directory that `gradstream ckpt export` wrote")
    on_progress("loading PyTorch and transformers …")
    # Work offline: the directory has all files that are needed.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sleep_while_waiting()
    import torch
    import transformers

    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    on_progress(f"loading the model ({terminal.format_bytes(size)}) …")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(Base(kind="huggingface", path=str(directory), title="", files=(), sha256="0" * 64))
    with parsing(lambda cause: CheckpointError(f"{directory} cannot be loaded ({cause}); export it again")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        ids = prompt_ids(tokenizer, prompt)
    model.eval()
    ends = sorted(end_ids(tokenizer))
    if not ids:
        start = model.config.bos_token_id
        ids = [start if start is not None else ends[0]]
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    if longest is not None and len(ids) >= longest:
        raise ConfigError(f"the prompt's {len(ids)} tokens fill the model's {longest} positions; shorten the prompt")
    if longest is not None:
        max_new_tokens = min(max_new_tokens, longest - len(ids))
    on_progress(f"generating, {max_new_tokens} tokens at most …")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    input_ids_BT = torch.tensor([ids])

    def decode(new_ids: list[int]) -> str:
        with parsing(
            lambda cause: CheckpointError(f"{directory}: its tokenizer cannot decode ({cause}); export it again")
        ):
            text: str = tokenizer.decode(new_ids, skip_special_tokens=True)
        return text

    streamer = WordStreamer(decode, on_text)
    with torch.no_grad():
        model.generate(
            input_ids_BT,
            attention_mask=torch.ones_like(input_ids_BT),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=streamer,
            **sampling,
        )
    return streamer.finish()


class WordStreamer:
    """Takes tokens from transformers' `generate`, which calls `put` and `end`, and passes their text on in whole words.

    The last word is held back until the next one begins: the tokens after it may change it.
    """

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]):
        self._decode = decode
        self._on_text = on_text
        self._ids: list[int] | None = None  # None until the prompt, which comes first, was put
        self._passed_on = ""

    def put(self, ids: Any) -> None:
        """Take the prompt's tokens, and then each new token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.reshape(-1).tolist()
        text = self._decode(self._ids)
        self._pass_on(text[: max(text.rfind(" "), text.rfind("\n"), 0)])

    def end(self) -> None:
        """Do nothing: `finish` passes the last word on."""

    def finish(self) -> str:
        """Pass the rest of the text on; return the whole text."""
        text = self._decode(self._ids or [])
        self._pass_on(text)
        return text

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._passed_on):
            self._on_text(text[len(self._passed_on) :])
            self._passed_on = text


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt as transformers' tokenizer does, with bos if the tokenizer adds one.

    Tokens that the tokenizer appends, usually the end of text, are left out, because no text follows an end. A bos that
    the prompt already has is not added again.
    """
    text: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(prompt)["input_ids"]
    before = next((at for at in range(len(whole)) if whole[at : at + len(text)] == text), 0) if text else len(whole)
    added = whole[:before] if text else [token for token in whole if token == tokenizer.bos_token_id]
    return text if text[: len(added)] == added else [*added, *text]
