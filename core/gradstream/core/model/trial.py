"""Checks that a model can be trained as a recipe asks, made on its twin, a small model of the same family and choices.

The family's code is run with random weights, because with initial weights a check may pass by chance. The checks:

1. every parameter and buffer gets its value from a constructor or from `_init_weights`;
2. the model is causal: when tokens from position k on change, logits before k do not change;
3. transformers' training loss is the cross-entropy of the logits, with or without an added router loss;
4. for a pipeline, segments computed one by one give the logits of the whole model;
5. for packed rows, an example's logits are the same as alone in a row, with windows and chunks too;
6. for adapters, held frozen modules with adapters give the logits of merged weights.

torch is imported inside the functions, because its import is slow.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradstream.core.errors import ConfigError, one_line
from gradstream.core.model.check import check_shapes, padding_ids, positions, unknown_keys
from gradstream.core.model.construction import GENERATOR_LOCK, check_set, initialize, restore_values, seed_generators
from gradstream.core.model.lora import adapted_module, factors, frozen_name, merged_weight, target_modules
from gradstream.core.model.model import (
    UnitDraws,
    build,
    check_units,
    initialize_buffers,
    inventory_of,
    router_loss_factor,
)
from gradstream.core.model.twin import twin_config
from gradstream.core.recipe.fine_tuning import LoraConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradstream.core.recipe.recipe import Recipe

NUM_TOKENS = 24
EXAMPLES = (9, 6, 7, 2)
"""Lengths in tokens of the examples in the packed row of the check; the last one stands for padding."""
MAX_PARAMETERS = 20_000_000
"""Size limit of a model without a twin, on which the checks themselves run."""
TOLERANCE = 2e-4
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class ModelUse:
    """The use of a model in a recipe: whether it is cut into pipeline stages, and whether rows are packed."""

    has_pipeline: bool = False
    packs_examples: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> ModelUse:
        """The use in a recipe."""
        return cls(recipe.pipeline.stages != 1, recipe.fine_tuning is not None)


PLAIN_USE = ModelUse()
"""The use of a model that is trained whole, on rows of one text."""


def try_model(
    model_config: Mapping[str, Any], use: ModelUse = PLAIN_USE, lora: LoraConfig | None = None
) -> tuple[bool, str]:
    """Check a model; return (whether it is refused, reason).

    The reason is one line that says what to do; it is empty for a model that is accepted. With `lora`, adapters are
    checked too. Raises ConfigError for an invalid config.
    """
    try:
        trial = Trial(model_config)
        trial.check_causal()
        trial.check_loss(use)
        if use.has_pipeline:
            trial.check_stages()
        if use.packs_examples:
            trial.check_packing()
        if lora is not None:
            trial.check_adapters(_twin_adapters(model_config, lora, trial.model))
    except ConfigError as error:
        return True, str(error)
    except Exception as error:  # the family's code is used in a way that it was not made for
        return True, f"model.config: a small model of this family cannot be tried: {one_line(error)[:200]}"
    return False, ""


class Trial:
    """A model's twin with random weights. Raises ConfigError for a model without a twin, and for values left unset."""

    def __init__(self, model_config: Mapping[str, Any], seed: int = 0):
        import torch

        self.config, self.model = _small_model(model_config)
        self.name = type(self.model).__name__
        check_units(self.model)
        self._generator = torch.Generator().manual_seed(seed)
        _draw_weights(self.model, self._generator)
        config: Any = self.model.config
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or NUM_TOKENS
        self.num_tokens = min(NUM_TOKENS, int(longest))
        self.vocabulary = int(text.vocab_size)
        self.ids = self.draw_ids()
        self._draws = UnitDraws(self.model, seed)

    def draw_ids(self) -> torch.Tensor:
        """Draw token ids, (2, T)."""
        import torch

        return torch.randint(0, self.vocabulary, (2, self.num_tokens), generator=self._generator)

    def logits(self, ids_BT: torch.Tensor, **layout: torch.Tensor) -> torch.Tensor:
        """The model's logits, (B, T, V). Dropout is the same in every call."""
        return self.output(ids_BT, **layout).logits  # type: ignore[no-any-return]

    def output(self, ids_BT: torch.Tensor, **told: torch.Tensor) -> Any:
        """The model's output."""
        import torch

        with GENERATOR_LOCK, torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            found = self.model(input_ids=ids_BT, use_cache=False, **told)
        if getattr(found, "logits", None) is None or found.logits.shape[:2] != ids_BT.shape:
            raise ConfigError(f"model.config: {self.name} gives no logits for each token, so it cannot be trained")
        return found

    def check_causal(self) -> None:
        """Raise ConfigError when a token's logits depend on later tokens."""
        import torch

        middle = self.num_tokens // 2 + 1
        for training, firsts in ((False, (1, middle, self.num_tokens - 1)), (True, (middle,))):
            self.model.train(training)
            before = self.logits(self.ids)
            if not bool(before.isfinite().all()):
                raise ConfigError(f"model.config: {self.name} gives logits that are not finite at drawn weights")
            for first in firsts:
                changed = torch.where(torch.arange(self.num_tokens) < first, self.ids, self.draw_ids())
                after = self.logits(changed)
                if _differ(before[:, :first], after[:, :first]):
                    raise ConfigError(
                        f"model.config: {self.name} is not causal as configured: tokens from position {first} on "
                        f"change the logits before it; only causal language models can be trained (check is_decoder "
                        f"and flags of bidirectional attention)"
                    )

    def check_loss(self, use: ModelUse) -> None:
        """Raise ConfigError when transformers' training loss differs from the loss that workers compute."""
        import torch

        self.model.train()
        found = self.output(self.ids, labels=self.ids)
        own = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())
        factor = router_loss_factor(self.model)
        router = getattr(found, "aux_loss", None) if factor else None
        added = own if router is None else own + factor * router
        # Decoders of encoder-decoder models take labels as the targets of the same positions.
        beside = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1).float(), self.ids.flatten())
        given = found.loss
        if given is None or not any(torch.allclose(given, loss, rtol=1e-4, atol=1e-5) for loss in (added, beside)):
            raise ConfigError(
                f"model.config: the training loss of {self.name} is not the cross-entropy of the next tokens alone "
                f"(transformers gives {_shown(given)}, the cross-entropy is {float(own):.4f}), and the added "
                f"loss is unknown; set the key that switches it on to false or 0"
            )
        if router is not None and use.has_pipeline:
            raise ConfigError(
                f"model.config: output_router_logits adds {self.name}'s router loss, which spans all layers and cannot "
                f"be computed by pipeline stages; use stages: 1, or set output_router_logits to false, which leaves "
                f"that loss out"
            )

    def check_stages(self) -> None:
        """Raise ConfigError when segments, computed one after the other, do not give the whole model's logits."""
        import torch

        from gradstream.core.model.stage_module import StageModule, segments_of

        self.model.eval()
        wanted = self.logits(self.ids)
        weights = dict(self.model.named_parameters())
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        segments = segments_of(self.model)
        found = self.ids
        for number, segment in enumerate(segments):
            try:
                stage = StageModule(self.config, range(number, number + 1)).eval()
                with torch.no_grad():
                    for name, parameter in stage.model.named_parameters():
                        parameter.copy_(weights[name if name in weights else tied[name]])
                    found = stage(found)
            except ConfigError:
                raise
            except Exception as error:  # as of `try_model`
                raise ConfigError(self._uncut(f"'{segment.name}' alone fails ({one_line(error)[:200]})")) from None
        if found.shape != wanted.shape or _differ(found, wanted):
            raise ConfigError(self._uncut("its segments one after the other give other logits than the whole model"))

    def _uncut(self, cause: str) -> str:
        return f"model.config: {self.name} cannot be cut into pipeline stages: {cause}; use stages: 1"

    def check_packing(self) -> None:
        """Raise ConfigError when an example's logits depend on other examples in its row."""
        import torch

        self.model.eval()
        lengths = list(EXAMPLES)
        if sum(lengths) > self.num_tokens:
            raise ConfigError(f"model.config: {self.name} has {self.num_tokens} positions, too few for packed rows")
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
        try:
            packed = self.logits(self.ids, position_ids=positions)
        except ConfigError:
            raise
        except Exception as error:  # as of `try_model`
            raise ConfigError(self._unpacked(one_line(error)[:200])) from None
        begin = 0
        for length in lengths:
            alone = self.logits(self.ids[:, begin : begin + length])
            if _differ(packed[:, begin : begin + length], alone):
                raise ConfigError(self._unpacked("an example's logits depend on the examples before it in its row"))
            begin += length

    def check_adapters(self, lora: LoraConfig) -> None:
        """Raise ConfigError when adapters on held weights, as workers use them, give other logits than merged weights.

        This check changes the weights, so it must be the last one of a trial.
        """
        import torch

        from gradstream.core.model.frozen_modules import HeldMatrix, replace_frozen

        adapted = build(self.config, "meta", lora)
        initialize_buffers(adapted, "cpu")
        weights = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        matrices: dict[str, HeldMatrix] = {}

        def source(name: str, _: nn.Parameter) -> str:
            name = frozen_name(name)
            return name if name in weights else tied[name]

        def matrix(name: str) -> HeldMatrix:
            if name not in matrices:
                matrices[name] = HeldMatrix.of(weights[name], "int8")
                weights[name].copy_(matrices[name].whole(torch.float32))
            return matrices[name]

        plain, self.model = self.model, adapted.eval()
        try:
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=parameter.shape[1] ** -0.5, generator=self._generator)
                replace_frozen(adapted, source, matrix, lambda name: weights[name])
            found = self.logits(self.ids)
        except Exception as error:  # as of `try_model`
            raise ConfigError(self._unadapted(one_line(error)[:200])) from None
        finally:
            self.model = plain.eval()
        trained = dict(adapted.named_parameters())
        with torch.no_grad():
            for module in {module for name in trained if (module := adapted_module(name)) is not None}:
                weight = weights[f"{module}.weight"]
                a, b = (trained[factor] for factor in factors(module))
                weight.copy_(merged_weight(weight, a, b, lora, plain.get_submodule(module)))
        if _differ(found, self.logits(self.ids)):
            raise ConfigError(self._unadapted("its logits differ from those with the adapters merged into the weights"))

    def _unadapted(self, cause: str) -> str:
        return (
            f"model.config: {self.name} cannot be trained with adapters on these modules: {cause}; name others in "
            f"lora.target_modules, or use method: full"
        )

    def _unpacked(self, cause: str) -> str:
        return f"model.config: {self.name} cannot be trained on packed examples: {cause}"


def _twin_adapters(model_config: Mapping[str, Any], lora: LoraConfig, twin: nn.Module) -> LoraConfig:
    """Small adapters for the twin, on modules that correspond, in any layer, to the model's modules with adapters."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    if lora.target_modules != targets:
        kinds = {_LAYER.sub(".", name) for name in target_modules(build(model_config, "meta"), lora)}
        every = target_modules(twin, LoraConfig())
        targets = tuple(name for name in every if _LAYER.sub(".", name) in kinds)
    return LoraConfig(rank=4, alpha=4, target_modules=targets)


def _small_model(model_config: Mapping[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """The twin's config and the twin; or the model itself, if it is small and its family has no twin."""
    try:
        config = twin_config(model_config)
        return config, _filled(build(config, "meta"))
    except Exception as error:  # the family's code gets other sizes than its own
        if isinstance(error, ConfigError) and "nothing sets" in str(error):
            raise
        whole = build(model_config, "meta")
        num_parameters = sum(parameter.numel() for parameter in whole.parameters())
        if num_parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"model.config: no small model of this family could be made to try it, and with {num_parameters:,} "
                f"parameters this one is too large; this model family is not supported ({one_line(error)[:150]})"
            ) from None
    return copy.deepcopy(dict(model_config)), _filled(whole)


def _filled(model: nn.Module) -> nn.Module:
    """Move a model that was built on the meta device to the CPU, with its initial values."""
    import torch

    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]  # to_empty has untied them
    for module in model.modules():
        restore_values(module)
    with GENERATOR_LOCK, torch.random.fork_rng(devices=[]), torch.no_grad():
        seed_generators(0)
        initialize(model, model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_set(name, tensor)
    return model


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw random weights for every parameter. Matrices are scaled so that activations keep their magnitude."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # a constant
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(noise, alpha=scale)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    size = max(1.0, float(other.abs().max()))
    return not bool(((one - other).abs().max() <= TOLERANCE * size).item())


def _shown(loss: Any) -> str:
    return "none" if loss is None else f"{float(loss):.4f}"


# --- the child process ------------------------------------------------------------------------------------------------


def describe(
    model_config: Mapping[str, Any], lora: LoraConfig | None = None, use: ModelUse = PLAIN_USE
) -> dict[str, Any]:
    """Describe a model for the coordinator, as a JSON object: its inventory and the limits that a recipe must fit.

    Raises ConfigError, also for a model that cannot be trained as `use` asks.
    """
    model = build(model_config, "meta", lora)
    unknown, misspelt = unknown_keys(model_config, model.config, model)
    check_shapes(model_config)
    is_refused, reason = try_model(model_config, use, lora)
    if is_refused:
        raise ConfigError(reason)
    return {
        "tensors": [astuple(tensor) for tensor in inventory_of(model)],
        "architecture": type(model).__name__,
        "num_frozen_parameters": sum(
            parameter.numel() for parameter in model.parameters() if not parameter.requires_grad
        ),
        "positions": positions(model.config),
        "padding_ids": padding_ids(model),
        "unknown_keys": unknown,
        "misspelt": misspelt,
    }


def _main() -> None:
    """Run `python -m gradstream.core.model.trial`.

    Reads config.json, adapters and use from stdin, and writes the inventory to stdout, all as JSON.
    """
    try:
        asked = json.load(sys.stdin)
        lora = LoraConfig.model_validate(asked["lora"]) if asked["lora"] else None
        answer = describe(asked["config"], lora, ModelUse(**asked["use"]))
    except ConfigError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
