"""Recipe files: YAML with its `base:` files merged and `key.sub=value` overrides applied, not yet validated."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gradstream.core.errors import ConfigError, one_line

MAX_VALUES = 100_000
"""Maximum number of values in a recipe file, with its YAML aliases written out."""


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.1 in which numbers with an exponent need no dot: 2e-2 is a number, as in JSON and YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_tree(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a recipe file, merge its bases and apply overrides, without validation. Raises ConfigError."""
    tree = _load_tree(Path(path), seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{override}' is not of the form key.sub=value")
        try:
            value = _parse_yaml(text, f"override '{override}'")
        except yaml.YAMLError:
            value = text
        if key.strip() == "model.config" and isinstance(value, str):
            value = _load_model_config(Path(value).expanduser())
        _set(tree, key.strip().split("."), value, override)
    return tree


def is_url(path: str) -> bool:
    """Whether a path has a scheme."""
    return re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]*:", path) is not None


def absolute_path(path: str) -> str:
    """Make a local path absolute; a path with a scheme stays as it is. Raises ConfigError for an impossible path."""
    if is_url(path):
        return path
    if "\0" in path:
        raise ConfigError(f"'{path}' is not a path: it holds a zero byte")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise ConfigError(f"'{path}' cannot be found ({one_line(error)}); write the path out") from None


def _load_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = Path(absolute_path(str(path))).resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: 'base' leads back to this file; remove one of the 'base' lines")
    try:
        tree = _parse_yaml(resolved.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        if seen:
            raise ConfigError(
                f"{seen[-1]}: its base {path} does not exist; copy it, or correct the 'base' line"
            ) from None
        raise ConfigError(f"{path}: no such recipe; `gradstream recipes ls` lists the ones that come along") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values")
    base = tree.pop("base", None)
    config = tree.get("model", {}).get("config") if isinstance(tree.get("model"), dict) else None
    if isinstance(config, str):
        tree["model"]["config"] = _load_model_config(resolved.parent / config)
    if base is None:
        return tree
    return _merge(_load_tree(resolved.parent / str(base), (*seen, resolved)), tree)


def _parse_yaml(text: str, origin: str) -> Any:
    """Parse a YAML text.

    Raises ConfigError when it is nested too deeply or, with its aliases written out, too large, and yaml.YAMLError when
    it is not YAML.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # _Loader derives from SafeLoader
    except RecursionError:
        raise ConfigError(f"{origin}: lists and mappings are nested too deeply") from None
    except (TypeError, ValueError, AttributeError) as error:  # an impossible date, or a list as a key
        raise ConfigError(f"{origin}: not YAML ({one_line(error)})") from None
    left = [value]
    for _ in range(MAX_VALUES):
        if not left:
            return value
        item = left.pop()
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    raise ConfigError(f"{origin}: with its aliases written out it has more than {MAX_VALUES} values")


def _load_model_config(path: Path) -> dict[str, Any]:
    try:
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.config: {path} is not a readable config.json ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"model.config: {path} does not hold a JSON object")
    return config


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _set(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{key}' holds a value, not a section")
        tree = child
    tree[keys[-1]] = value
