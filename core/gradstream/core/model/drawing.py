"""Draws slices of a model's initial weights in a child process, so that a server need not import transformers.

The import takes seconds and 100 MiB, and a server needs it for nothing else. The child's memory goes back at its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias

from gradstream.core.errors import ConfigError
from gradstream.core.recipe.fine_tuning import LoraConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Wanted: TypeAlias = "Mapping[str, Sequence[tuple[int, int]]]"
"""The slices to draw: (begin, end) among the elements of a tensor, by the tensor's name."""
Drawn: TypeAlias = "Generator[tuple[str, int, npt.NDArray[np.float32]], None, None]"
"""Each slice as (tensor's name, begin, elements). The elements are valid until the next slice is requested."""

MODULE = "gradstream.core.model.drawing"


def draw(model_config: Mapping[str, Any], seed: int, wanted: Wanted, lora: LoraConfig | None = None) -> Drawn:
    """Draw the initial weights as gradstream.core.model.model.initial_weights does, to the same bits.

    A process that has imported transformers draws them itself. Raises ConfigError.
    """
    if "transformers" in sys.modules:
        yield from _draw_here(model_config, seed, wanted, lora)
    elif wanted:
        yield from _draw_in_child(model_config, seed, wanted, lora)


def _draw_here(model_config: Mapping[str, Any], seed: int, wanted: Wanted, lora: LoraConfig | None) -> Drawn:
    from gradstream.core.model.model import initial_weights

    for name, tensor in initial_weights(model_config, seed, set(wanted), lora):
        elements_N = tensor.reshape(-1).numpy()
        for begin, end in wanted[name]:
            yield name, begin, elements_N[begin:end]


def _draw_in_child(model_config: Mapping[str, Any], seed: int, wanted: Wanted, lora: LoraConfig | None) -> Drawn:
    import numpy as np

    adapters = lora.model_dump(mode="json") if lora is not None else None
    asked = {"model_config": model_config, "seed": seed, "wanted": wanted, "lora": adapters}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin:
                child.stdin.write(json.dumps(asked).encode())
            buffer = bytearray(4 * max(end - begin for slices in wanted.values() for begin, end in slices))
            while (head := _read_head(child.stdout)) is not None:
                if "error" in head:
                    raise ConfigError(head["error"])
                view = memoryview(buffer)[: 4 * head["num_elements"]]
                if child.stdout.readinto(view) != len(view):  # type: ignore[attr-defined]
                    raise EOFError
                yield head["name"], head["begin"], np.frombuffer(view, dtype=np.float32)
        except (EOFError, BrokenPipeError, ValueError):
            raise ConfigError(f"model.config: the initial weights cannot be drawn ({_cause(child, errors)})") from None
        finally:
            child.kill()
            child.stdout.close()
            child.wait()


def _read_head(stream: IO[bytes]) -> dict[str, Any] | None:
    """The description of the next slice; None at the end. Raises EOFError when the child ended early."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head: dict[str, Any] = json.loads(line)
    return head or None


def _cause(child: subprocess.Popen[bytes], errors: BinaryIO | IO[bytes]) -> str:
    status = child.wait()
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
    return last or f"the process that does it ended with status {status}"


def _main() -> None:
    """Run `python -m gradstream.core.model.drawing`.

    Reads the model and the slices from stdin as JSON. Writes to stdout a line of JSON and the elements of each slice,
    and at the end an empty object.
    """
    # What libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    import torch

    torch.set_num_threads(1)  # as in a server
    try:
        lora = LoraConfig.model_validate(asked["lora"]) if asked["lora"] else None
        for name, begin, slice_N in _draw_here(asked["model_config"], asked["seed"], asked["wanted"], lora):
            head = {"name": name, "begin": begin, "num_elements": slice_N.size}
            answers.write(json.dumps(head).encode() + b"\n")
            answers.write(slice_N.tobytes())
        answers.write(b"{}\n")
    except ConfigError as error:
        answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
    answers.close()


if __name__ == "__main__":
    _main()
