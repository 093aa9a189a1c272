"""The extras of the package: which modules each brings, and the line for a command that lacks them.

`pip install gradstream` installs the command line and the Python client. What computes, and what draws, is an extra.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence

from gradstream.core.errors import ConfigError

MODULES: Mapping[str, tuple[str, ...]] = {
    "node": (
        "torch",
        "transformers",
        "numba",
        "google_crc32c",
        "jinja2",
        "numpy",
        "peft",
        "prometheus_client",
        "pyarrow",
        "safetensors",
        "tokenizers",
        *(() if sys.platform == "win32" else ("uvloop",)),
        "zstandard",
    ),
    "plot": ("matplotlib",),
}
"""Extra: the modules that its packages bring. A package is called like its module, with a dash for "_"."""
ALL = "all"
"""The extra that is every other one together."""
MAX_NAMES = 3
"""Missing packages that a message names; of more it gives the number."""


def installed() -> list[str]:
    """The extras that are installed: those whose first module is. Nothing is imported."""
    return [extra for extra, names in MODULES.items() if importlib.util.find_spec(names[0]) is not None]


def require(what: str, *extras: str) -> None:
    """Raise ConfigError, with the command that installs them, when a module of `extras` is not installed.

    Nothing is imported. `what` begins the message, as in "`gradstream serve` needs torch, …".
    """
    absent = [name for extra in extras for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if absent:
        raise missing(what, absent)


def missing(what: str, modules: Sequence[str]) -> ConfigError:
    """The error that says which packages `what` needs and how to install them; each of `modules` is of an extra."""
    extras = [extra for extra, names in MODULES.items() if not set(names).isdisjoint(modules)]
    wanted = extras[0] if len(extras) == 1 else ALL
    packages = [name.replace("_", "-") for name in modules]
    named = ", ".join(packages[:MAX_NAMES])
    if len(packages) > MAX_NAMES:
        named += f" and {len(packages) - MAX_NAMES} more packages"
    verb = "is" if len(packages) == 1 else "are"
    return ConfigError(f"{what} needs {named}, which {verb} not installed; run pip install 'gradstream[{wanted}]'")


def explained(what: str, error: ModuleNotFoundError) -> ConfigError | None:
    """The error of `missing` for an import that failed; None when no extra brings the module."""
    module = (error.name or "").partition(".")[0]
    return missing(what, [module]) if any(module in names for names in MODULES.values()) else None
