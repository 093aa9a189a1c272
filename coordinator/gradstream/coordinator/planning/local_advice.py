"""Whether a job needs local steps, how many a round, and in which codecs: a decision on forecast costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from gradstream.coordinator.planning.exchange import Exchange
from gradstream.core.errors import ConfigError
from gradstream.core.plan.forecast import ExchangeOption
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.local import LocalConfig
from gradstream.core.recipe.recipe import Recipe

TARGET = 0.95
"""The share of the time in which workers should compute."""
STEPS = (5, 10, 30, 100)
"""The numbers of inner steps of a round to choose from."""
EVERY_STEP = (("int8", "delta-int8"), ("int4", "delta-int4"))
"""Codecs (push, pull) of ordinary steps, finest first."""
ROUNDS = (("int4", "delta-int4"), ("int2", "delta-int2"))
"""Codecs (push, pull) of rounds, finest first."""


def advise(options: Sequence[ExchangeOption]) -> tuple[ExchangeOption, str]:
    """Choose one of `exchange_options`; return it and its reason, whose parts are separated by semicolons.

    Ordinary steps come first, because they learn more from each token. Else the fewest inner steps that reach the
    target are chosen, and for these the finest codec. Shared moments are always chosen: zeros cost far more loss than
    the moments cost bytes.
    """
    ordinary = [option for option in options if not option.steps]
    reached = [option for option in ordinary if option.utilisation >= TARGET]
    if reached:
        title = f"ordinary steps with {_codecs(reached[0])}: {_computes(reached[0])}"
        return reached[0], f"{title}; local steps are not needed"
    shared = [option for option in options if option.inner_state == "shared"]
    best = max(ordinary, key=lambda option: option.utilisation)
    without = f"ordinary steps with {_codecs(best)}: {_computes(best)}"
    enough = [option for option in shared if option.utilisation >= TARGET]
    chosen = enough[0] if enough else max(shared, key=lambda option: option.utilisation)
    title = f"rounds of {chosen.steps} steps with {_codecs(chosen)}: {_computes(chosen)}"
    numbers = f"{', '.join(map(str, STEPS[:-1]))} and {STEPS[-1]} steps"
    why = f"none of {numbers} reaches {100 * TARGET:.0f} %"
    if enough:
        why = f"of {numbers} the fewest that reach {100 * TARGET:.0f} %"
    return chosen, "; ".join([title, why, *_inner_state(options, chosen), without])


def _inner_state(options: Sequence[ExchangeOption], chosen: ExchangeOption) -> Iterator[str]:
    """Say what shared moments cost in bytes and in time, if the optimizer has moments."""
    key = (chosen.steps, chosen.push, chosen.pull, "reset")
    reset = next(option for option in options if (option.steps, option.push, option.pull, option.inner_state) == key)
    all_bytes, moments = chosen.worker_step_bytes, chosen.worker_step_bytes - reset.worker_step_bytes
    if moments:
        yield (
            f"inner_state shared: {100 * moments / all_bytes:.0f} % of the bytes are moments. Without them (reset) "
            f"{_computes(reset)}, but each round begins with zeros, which costs loss"
        )


def _codecs(option: ExchangeOption) -> str:
    return f"{option.push} and {option.pull}"


def _computes(option: ExchangeOption) -> str:
    return f"workers compute {100 * option.utilisation:.1f} % of the time"


def exchange_options(plan: Plan, exchange: Callable[[Plan], Exchange]) -> list[ExchangeOption]:
    """List the ways to exchange: ordinary steps, rounds with shared moments, and rounds without.

    Rounds are listed only if no ordinary steps reach the target. `exchange` has the costs of a plan. The list is empty
    if times are not known, or if the pipeline of a job with rounds has no schedule for ordinary steps.
    """
    recipe = plan.recipe

    def options(pair: tuple[str, str], local: LocalConfig | None, steps: Sequence[int]) -> Iterator[ExchangeOption]:
        found = exchange(replace(plan, recipe=_with(recipe, *pair, local)))
        for count in steps:
            share = found.pace.utilisation(count or 1) if found.pace is not None else None
            if share is not None:
                state = local.inner_state if local is not None else ""
                yield ExchangeOption(count, *pair, state, share, found.worker_bytes / (count or 1))

    try:
        listed = [option for pair in EVERY_STEP for option in options(pair, None, [0])]
    except ConfigError:
        return []
    if not listed or any(option.utilisation >= TARGET for option in listed):
        return listed
    for state in ("shared", "reset"):
        local = (recipe.local or LocalConfig(steps=1)).model_copy(update={"inner_state": state})
        rounds = [option for pair in ROUNDS for option in options(pair, local, STEPS)]
        listed += sorted(rounds, key=lambda option: option.steps)
    return listed


def _with(recipe: Recipe, push: str, pull: str, local: LocalConfig | None) -> Recipe:
    """The recipe with other codecs, with rounds or without. Only its bytes are of interest, so it is not validated."""
    codec = recipe.codec.model_copy(update={"push": push, "pull": pull})
    return recipe.model_copy(update={"codec": codec, "local": local})
