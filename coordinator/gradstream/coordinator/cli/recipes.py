"""`gradstream recipes`: list and show the bundled recipes, and check a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.options import (
    OutputFormat,
    OutputOption,
    OverrideOption,
    RecipeArgument,
    bundled_recipes,
    find_recipe,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.core.recipe.section import Section

app = group("Recipes: list, show and validate.")


@app.command()
def ls(output: OutputOption = OutputFormat.table) -> None:
    """List the bundled recipes."""
    from gradstream.core.errors import GradstreamError, one_line
    from gradstream.core.recipe.fine_tuning_recipe import load_any_recipe

    rows = []
    for name, path in bundled_recipes().items():
        try:
            description = load_any_recipe(path).description
        except GradstreamError as error:
            description = f"broken: {one_line(error)}"
        rows.append({"name": name, "description": description, "path": str(path)})
    if output is OutputFormat.json:
        terminal.print_json(rows)
        return
    terminal.print_table(["RECIPE", "DESCRIPTION"], [(row["name"], row["description"]) for row in rows])
    terminal.hint("see one: gradstream recipes show NAME; run one here: gradstream dev NAME")


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With bases, overrides and defaults filled in, instead of the file.")
    ] = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a recipe as its file, or resolved."""
    path = find_recipe(recipe)
    if not resolved and not overrides and output is OutputFormat.table:
        print(path.read_text(encoding="utf-8"), end="")
        return
    from gradstream.coordinator.cli.recipe_checks import with_data
    from gradstream.core.recipe.fine_tuning_recipe import load_any_recipe
    from gradstream.core.recipe.recipe import Recipe

    loaded = load_any_recipe(path, overrides or ())
    if isinstance(loaded, Recipe):
        loaded, _ = with_data(loaded)
    if output is OutputFormat.json:
        terminal.print_json(loaded.model_dump(mode="json"))
        return
    print("\n".join(resolved_lines(loaded)))


def resolved_lines(section: Section, depth: int = 0) -> Iterator[str]:
    """Yield a recipe as YAML lines, with a comment in place of each value that is derived when the job begins."""
    import yaml

    from gradstream.core.recipe.section import DERIVED, Section

    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None:
            extra = field.json_schema_extra
            if isinstance(extra, dict) and DERIVED in extra:
                yield f"{indent}# {name}: derived: {extra[DERIVED]}"
        elif isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from resolved_lines(value, depth + 1)
        else:
            plain = section.model_dump(mode="json", include={name})
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            yield from (f"{indent}{line}" for line in text.splitlines())


@app.command()
def validate(
    recipe: RecipeArgument, overrides: OverrideOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Check a recipe: build its model without weights, and compare it with its data or base if these are here.

    Exit code 2, 3 or 4 and one line when it is wrong. Likely mistakes are warnings.
    """
    from gradstream.coordinator.cli.recipe_checks import check_fine_tuning_recipe, check_recipe
    from gradstream.core.extras import require
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe, load_any_recipe

    require("`gradstream recipes validate`", "node")
    path = find_recipe(recipe)
    loaded = load_any_recipe(path, overrides or ())
    tokens = None
    if isinstance(loaded, FineTuningRecipe):
        warnings = check_fine_tuning_recipe(loaded)
        line = f"{loaded.method} on {loaded.base_model}, examples in {loaded.data.path}"
        hint = f"run it here: gradstream finetune dev {recipe}; with a service: gradstream finetune create {recipe}"
    else:
        warnings = check_recipe(loaded)
        training = loaded.training
        tokens = loaded.num_samples_in_all * training.sequence_length
        lengths = loaded.local.slot_steps if loaded.local is not None else None
        line = (
            f"{training.num_steps} steps of {'at most ' if lengths else ''}{training.global_batch} samples of "
            f"{training.sequence_length} tokens = {'at most ' if lengths == 'auto' else ''}"
            f"{terminal.format_count(tokens)} tokens in {training.num_slots} slots"
        )
        if loaded.local is not None:
            line += f", in rounds of {loaded.local.steps} steps"
        hint = f"run it here: gradstream dev {recipe}; on a cluster: gradstream submit {recipe}"
    if output is OutputFormat.json:
        more = {"num_tokens": tokens} if tokens is not None else {}
        terminal.print_json({"valid": True, "name": loaded.name, "path": str(path), **more, "warnings": warnings})
        return
    for warning in warnings:
        terminal.warn(warning)
    terminal.print_line(f"{loaded.name} is valid: {line}")
    terminal.hint(hint)
