"""Print a forecast: stages, memory, bytes on links, the time of a step, and each decision with its reason.

Tables of a large cluster are summed up, so that a plan of 512 workers is read on two screens of 80 columns; `-o json`
has every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.core.plan.forecast import ExchangeOption, Forecast, LinkForecast, PlaceForecast, StageForecast
    from gradstream.core.recipe.recipe import Recipe

MAX_ROWS = 8
"""A table with more stages, places or servers sums up those that are alike."""
MAX_LINKS = 16
MAX_NAMES = 2

Row = tuple[str, ...]


def print_forecast(told: Forecast, recipe: Recipe, link_reason: str) -> None:
    """Print a forecast. `link_reason` is the origin of the links' rate."""
    where = f"{len(told.servers)} servers, {told.num_replicas * len(told.places)} workers"
    terminal.print_line(f"{recipe.name}: {terminal.format_count(told.num_parameters)} parameters on {where}")
    print()
    if told.stages:
        columns = ["STAGE", "PLACE", "SEGMENTS", ">PARAMETERS", ">FORWARD", ">BACKWARD", "?"]
        terminal.print_table(columns, list(_stages(told.stages)))
        print()
    terminal.print_table(["NODE", "NAMES?", ">NEEDS", ">OFFERS"], [*_places(told.places), *_servers(told)])
    print()
    terminal.print_table(
        ["LINK", "FROM", "TO", f">BYTES A {'ROUND' if told.round_steps else 'STEP'}"], list(_links(told))
    )
    print()
    if any(option.steps for option in told.options):
        columns = ["EXCHANGE", "PUSH", "PULL", ">WORKERS COMPUTE", ">BYTES A STEP", "?"]
        terminal.print_table(columns, list(_options(told.options)))
        print()
    terminal.print_table(
        ["DECISION", "CHOICE, AND WHY"], [*_times(told, recipe, link_reason), *_advice(told, recipe), *_reasons(told)]
    )


def _stages(stages: Sequence[StageForecast]) -> Iterator[Row]:
    """A row for each stage, or, of many, for each run of stages that are alike."""
    many = len(stages) > MAX_ROWS

    def alike(stage: StageForecast) -> object:
        return (len(stage.segments), stage.num_parameters, stage.measured) if many else stage.stage

    for _, found in groupby(stages, alike):
        group = list(found)
        segments = tuple(name for stage in group for name in stage.segments)
        each = f", {len(group[0].segments)} each" if len(group) > 1 else ""
        yield (
            _numbers(group[0].stage, group[-1].stage),
            _numbers(group[0].place, group[-1].place),
            _span(segments, each),
            terminal.format_count(group[0].num_parameters),
            _seconds(max(stage.forward_seconds for stage in group)),
            _seconds(max(stage.backward_seconds for stage in group)),
            "" if group[0].measured else "estimated",
        )


def _places(places: Sequence[PlaceForecast]) -> Iterator[Row]:
    """A row for each place, or, of many, for each run of places whose needs differ by less than a tenth."""
    groups: list[list[PlaceForecast]] = []
    for place in places:
        first = groups[-1][0] if groups else None
        if first is None or len(places) <= MAX_ROWS or abs(place.need_bytes - first.need_bytes) > first.need_bytes / 10:
            groups.append([])
        groups[-1].append(place)
    for group in groups:
        yield (
            f"worker{'s' * (len(group) > 1)} in place {_numbers(group[0].place, group[-1].place)}",
            _some([name for place in group for name in place.workers]),
            *_memory([place.need_bytes for place in group], min(place.offered_bytes for place in group)),
        )


def _servers(told: Forecast) -> Iterator[Row]:
    servers = told.servers
    if len(servers) <= MAX_ROWS:
        for server in servers:
            yield ("parameter server", server.server, *_memory([server.need_bytes], server.offered_bytes))
        return
    names = _some([server.server for server in servers])
    needs = [server.need_bytes for server in servers]
    yield (f"{len(servers)} servers", names, *_memory(needs, min(server.offered_bytes for server in servers)))


def _links(told: Forecast) -> Iterator[Row]:
    """A row for each link, or, of many, the busiest node of each kind of transfer."""
    if len(told.links) <= MAX_LINKS:
        for link in told.links:
            yield (link.kind, link.sender, link.receiver, terminal.format_bytes(link.step_bytes))
        return
    servers, workers = f"{len(told.servers)} servers", f"{told.num_replicas * len(told.places)} workers"
    replicas = told.num_replicas
    for kind, links in groupby(told.links, lambda link: link.kind):
        found = list(links)
        if kind == "push":
            yield _busiest(found, kind, of_sender=True, other=servers)
            yield _busiest(found, kind, of_sender=False, other=workers, times=replicas)
        elif kind == "pull":
            yield _busiest(found, kind, of_sender=True, other=workers, times=replicas)
            yield _busiest(found, kind, of_sender=False, other=servers)
    for kind in ("activations", "gradients", "tied gradients"):
        between = [link for link in told.links if link.kind == kind]
        if between:
            most = max(between, key=lambda link: link.step_bytes)
            yield (kind, most.sender, most.receiver, terminal.format_bytes(most.step_bytes))


def _busiest(links: Sequence[LinkForecast], kind: str, of_sender: bool, other: str, times: int = 1) -> Row:
    """The row of the node that sends, or receives, most bytes of a kind; each link counts `times` times."""
    sums: dict[str, int] = {}
    for link in links:
        node = link.sender if of_sender else link.receiver
        sums[node] = sums.get(node, 0) + times * link.step_bytes
    node = max(sums, key=lambda name: sums[name])
    ends = (node, other) if of_sender else (other, node)
    return (kind, *ends, terminal.format_bytes(sums[node]))


def _times(told: Forecast, recipe: Recipe, link_reason: str) -> Iterator[Row]:
    rate = terminal.format_bit_rate(told.link_bits_per_second / 8)
    if told.step_seconds is not None and told.compute_seconds is not None and told.bubble is not None:
        idle = f", {100 * told.bubble:.0f} % of it idle in the pipeline" if len(told.places) > 1 else ""
        step, step_seconds, inner = "a step", told.step_seconds, ""
        if told.round_steps:
            step, step_seconds = f"a round of {told.round_steps} steps", told.round_steps * told.step_seconds
            inner = " in each inner step of a slot" if len(told.places) > 1 else " in each inner step"
        yield (
            "time",
            f"{step} takes about {_seconds(step_seconds)}: compute {_seconds(told.compute_seconds)} for "
            f"{told.num_microbatches} microbatches a replica{inner}{idle}; push {_seconds(told.push_seconds)} and pull "
            f"{_seconds(told.pull_seconds)} at {rate}, of which {_seconds(told.exposed_seconds or 0)} are not hidden",
        )
        if told.round_steps and told.utilisation is not None:
            yield (
                "",
                f"that is {1 / told.step_seconds:.3g} steps/s; a worker sends and receives "
                f"{terminal.format_bytes(told.worker_step_bytes)} an inner step, and computes "
                f"{100 * told.utilisation:.1f} % of the time",
            )
        steps = recipe.training.num_steps
        yield (
            "",
            f"that is {terminal.format_count(told.tokens_per_second or 0)} tokens/s; {steps} steps take about "
            f"{terminal.format_duration(steps * told.step_seconds)}, without validation and checkpoints",
        )
    yield ("link", f"{rate} a node, {link_reason}")


def _options(options: Sequence[ExchangeOption]) -> Iterator[Row]:
    """A row for each way to exchange, but for rounds that begin with zeros: what a worker sends and receives a step."""
    for option in options:
        if option.inner_state != "reset":
            yield (
                f"every {option.steps} steps" if option.steps else "every step",
                option.push,
                option.pull,
                f"{100 * option.utilisation:.1f} %",
                f"{option.worker_step_bytes / (1 << 20):.2f} MiB",
                "advised" if option.advised else "",
            )


def _advice(told: Forecast, recipe: Recipe) -> Iterator[Row]:
    """The advised way to exchange with its reasons, and the settings for it where it has rounds."""
    for number, part in enumerate(told.advice.split("; ") if told.advice else []):
        yield ("" if number else "exchange", part)
    for option in told.options:
        if option.advised and option.steps:
            yield ("", f"settings: {settings_text(option, recipe)}")


def settings_text(option: ExchangeOption, recipe: Recipe) -> str:
    """The overrides with which a recipe has the rounds of an option, and a number of steps that is whole rounds."""
    after = recipe.local.after if recipe.local is not None else 0
    rounds = max(1, -(-(recipe.training.num_steps - after) // option.steps))
    settings = {
        "local.steps": option.steps,
        "codec.push": option.push,
        "codec.pull": option.pull,
        "training.num_steps": after + rounds * option.steps,
    }
    if recipe.optimizer.moments != "fp32":
        settings["optimizer.moments"] = "fp32"
    if recipe.local is not None and recipe.local.inner_state != option.inner_state:
        settings["local.inner_state"] = option.inner_state
    return " ".join(f"-s {key}={value}" for key, value in settings.items())


def _reasons(told: Forecast) -> Iterator[Row]:
    """Each decision, with a line for each part of its reason."""
    for subject, text in told.reasons.items():
        for number, part in enumerate(text.removeprefix(f"{subject}: ").split("; ")):
            yield ("" if number else subject, part)


# --- cells ------------------------------------------------------------------------------------------------------------


def _numbers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _span(names: tuple[str, ...], each: str = "") -> str:
    if len(names) == 1:
        return names[0]
    prefix = names[0].rpartition(".")[0]
    last = names[-1].removeprefix(f"{prefix}.") if prefix else names[-1]
    return f"{names[0]} to {last} ({len(names)}{each})"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _memory(needs: Sequence[int], offered: int) -> tuple[str, str]:
    low, high = terminal.format_bytes(min(needs)), terminal.format_bytes(max(needs))
    return low if low == high else f"{low} to {high}", terminal.format_bytes(offered) if offered else "not said"


def _seconds(seconds: float) -> str:
    if seconds >= 1000:
        return terminal.format_duration(seconds)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
