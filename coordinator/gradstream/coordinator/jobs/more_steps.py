"""Extend the recipe of a job that rests or has ended to more steps. Pure functions."""

from __future__ import annotations

from gradstream.core.errors import ConfigError
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.recipe.local import whole_rounds_problem
from gradstream.core.recipe.recipe import Recipe


def with_more_steps(job_id: str, recipe: Recipe, version: int, num_steps: int) -> tuple[Recipe, str]:
    """Extend a job's recipe to `num_steps` steps in all from `version` on; return it and a line on the changes.

    From `version` on the learning rate follows the schedule of `num_steps` steps, as if the job had been submitted with
    this number. The steps before keep their rates. So the rate may rise at `version`. Raises ConfigError when no steps
    are left, the steps are no whole rounds, or the job is a fine-tuning.
    """
    before = recipe.training.num_steps
    if recipe.fine_tuning is not None:
        raise ConfigError(
            f"job {job_id} is a fine-tuning, whose steps follow from its examples; fine-tune its result further with "
            f"base_model: job:{job_id}"
        )
    step = recipe.rounds.steps_at(version)
    if num_steps <= step:
        raise ConfigError(
            f"job {job_id} has done {step} steps; --steps {num_steps} is the number in all, so give more than that"
        )
    problem = whole_rounds_problem(num_steps, recipe.local) if recipe.local is not None else ""
    if problem:
        raise ConfigError(f"job {job_id} has local steps, and --steps {problem}")
    extended = recipe.model_copy(update={"training": recipe.training.extended(step, num_steps)})
    rates = f"{rate_of_step(extended, step):.3g} at step {step}"
    if step:
        rates = f"{rate_of_step(extended, step - 1):.3g} at step {step - 1}, {rates}"
    return extended, (
        f"goes on from {recipe.rounds.version_text(version)} to {num_steps} steps in all ({before} before); its "
        f"learning rate follows the {recipe.schedule.kind} schedule of {num_steps} steps from here on ({rates})"
    )


def as_submitted(recipe: Recipe) -> Recipe:
    """Restore a job's recipe as submitted: before its steps were changed, and its start and slot steps resolved."""
    steps = {"num_steps": recipe.training.submitted_num_steps, "earlier": ()}
    changes: dict[str, object] = {"training": recipe.training.model_copy(update=steps)}
    if recipe.start_from is not None:
        changes["start_from"] = recipe.start_from.model_copy(update={"checkpoint": None, "state_sha256": None})
    if recipe.local is not None:
        changes["local"] = recipe.local.model_copy(update={"chosen_slot_steps": ()})
    return recipe.model_copy(update=changes)
