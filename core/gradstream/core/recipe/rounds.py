"""The rounds of a job with local steps: which inner steps each version stands for. Pure arithmetic on the recipe.

A version is one commit. Without local steps a commit is one step. With them a job first takes `after` ordinary steps,
one a version, and then rounds: from a version each slot takes `length` inner steps on its own samples before the
servers combine them to the next version. Intervals, schedules and totals of a recipe count steps, where an inner step
counts like an ordinary one; the protocol counts versions.

A slot on a slow machine may take fewer inner steps in a round than `length`. They are spread over the round's steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InnerStep:
    """A step of a slot: the step of the job at which it takes place, and how many steps the slot has taken before.

    The learning rate and the draws of dropout follow `step`, the samples follow `number`. So each sample of a data
    epoch is used once.
    """

    step: int
    number: int


@dataclass(frozen=True)
class Rounds:
    """The versions of a job of `num_steps` steps. `length` 0: there are no rounds, and a version is a step.

    `slot_lengths` has the inner steps of each slot in a round; empty: all slots take `length`.
    """

    num_steps: int
    length: int = 0
    after: int = 0
    slot_lengths: tuple[int, ...] = ()

    @property
    def last_version(self) -> int:
        """The version at which all steps are done."""
        return self.version_at(self.num_steps)

    def is_round(self, version: int) -> bool:
        """Whether the commit after `version` ends a round, and not an ordinary step."""
        return self.length > 0 and version >= self.after

    def steps_at(self, version: int) -> int:
        """Number of steps that are done at a version."""
        if not self.length or version <= self.after:
            return version
        return self.after + (version - self.after) * self.length

    def version_at(self, step: int) -> int:
        """The first version at which at least `step` steps are done."""
        if not self.length or step <= self.after:
            return step
        return self.after - (self.after - step) // self.length

    def steps_from(self, version: int) -> range:
        """The steps between a version and the next one, by their numbers from 0."""
        return range(self.steps_at(version), self.steps_at(version + 1))

    def slot_steps(self, version: int, slot: int) -> list[InnerStep]:
        """The steps that a slot takes between a version and the next one, in order."""
        steps = self.steps_from(version)
        if not self.is_round(version) or not self.slot_lengths:
            return [InnerStep(step, step) for step in steps]
        count = self.slot_lengths[slot]
        first = self.after + self.rounds_at(version) * count
        return [InnerStep(steps[place * self.length // count], first + place) for place in range(count)]

    def num_slot_steps(self, version: int, slot: int) -> int:
        """Number of steps that a slot takes between a version and the next one."""
        return (
            self.slot_lengths[slot] if self.is_round(version) and self.slot_lengths else len(self.steps_from(version))
        )

    def title(self, version: int) -> str:
        """The steps between a version and the next one, for people."""
        steps = self.steps_from(version)
        return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"

    @property
    def num_rounds(self) -> int:
        """Number of rounds in all; 0 without local steps."""
        return self.last_version - self.after if self.length else 0

    def rounds_at(self, version: int) -> int:
        """Number of rounds that are done at a version."""
        return max(0, version - self.after) if self.length else 0

    def commit_text(self, version: int) -> str:
        """The commit after a version for people: "step 12", or "round 3". Steps count from 0, rounds from 1."""
        if self.is_round(version):
            return f"round {self.rounds_at(version) + 1}"
        return f"step {self.steps_at(version)}"

    def version_text(self, version: int) -> str:
        """A version for people: "version 12", or, where it is not the number of steps, "version 3 (step 90)"."""
        step = self.steps_at(version)
        return f"version {version}" if step == version else f"version {version} (step {step})"

    def passes(self, version: int, interval_steps: int) -> bool:
        """Whether the commit that made `version` passed a multiple of `interval_steps`; with 0 never.

        Version 0, which no commit made, counts as one that did.
        """
        if not interval_steps:
            return False
        return version == 0 or self.steps_at(version) // interval_steps > self.steps_at(version - 1) // interval_steps
