"""The recipe's section for local steps: rounds of inner steps between exchanges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstream.core.recipe.section import NonNegative, Positive, Section, derived

GRACE_SECONDS = 10.0
"""The seconds for which a round waits for the slots beyond its quorum, unless a recipe says otherwise."""

if TYPE_CHECKING:
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningTraining
    from gradstream.core.recipe.recipe import CodecConfig, OptimizerConfig, PipelineConfig, TrainingConfig


class OuterConfig(Section):
    """The rule by which servers apply a round's mean difference: SGD with momentum. Default: the mean of the slots."""

    learning_rate: float = Field(default=1.0, gt=0, description="factor on the mean difference")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="decay of the momentum; 0: none")
    nesterov: bool = Field(default=True, description="Nesterov's form of the momentum")


class MomentsConfig(Section):
    """The codecs in which slots share the moments of their inner optimizers. none: a round begins with zeros.

    A second moment that is coarse where it is small would make a step there far too large, so it has no integer codec.
    """

    exp_avg: Literal["none", "fp32", "bf16", "int8", "int4", "int2"] = Field(
        default="int4", description="AdamW's first moment"
    )
    exp_avg_sq: Literal["fp32", "bf16", "factored"] = Field(
        default="factored", description="AdamW's second moment; factored: means of rows and columns"
    )
    momentum_buffer: Literal["none", "fp32", "bf16", "int8", "int4", "int2"] = Field(
        default="int8", description="the momentum of SGD, and of Muon's matrices"
    )

    @model_validator(mode="before")
    @classmethod
    def _for_all(cls, value: Any) -> Any:
        return dict.fromkeys(cls.model_fields, value) if value in ("fp32", "bf16") else value

    def codec(self, moment: str) -> str:
        """The codec of a moment, by its name; "none" if it is not shared."""
        return str(getattr(self, moment))


class LocalConfig(Section):
    """Local steps (DiLoCo, Douillard et al. 2023): slots exchange only at the end of a round of inner steps.

    Every key but `progress_steps` shapes the trajectory.
    """

    steps: Positive = Field(description="inner steps of a round")
    after: NonNegative = Field(default=0, description="ordinary steps before the first round")
    inner_state: Literal["shared", "reset", "keep"] = Field(
        default="shared",
        description="the optimizer's moments at the beginning of a round: the mean of all slots at the end of the "
        "round before, zeros, or those that the slot itself had",
    )
    moments: MomentsConfig = Field(
        default=MomentsConfig(),
        description="inner_state: shared only: codecs of the moments, both ways; fp32 or bf16 stands for all of them",
    )
    outer: OuterConfig = OuterConfig()
    slot_steps: tuple[Positive, ...] | Literal["auto"] | None = Field(
        default=None,
        description="inner steps that each slot takes in a round, at most local.steps; auto: by the measured speeds of "
        "the workers of the job's first plan; none: local.steps for every slot",
    )
    chosen_slot_steps: tuple[Positive, ...] = Field(
        default=(), description="written by the coordinator at the job's first plan: what slot_steps: auto stands for"
    )
    progress_steps: NonNegative = Field(
        default=10,
        description="inner steps after which a worker keeps its slot's progress on its disk, to go on from if it "
        "starts again; 0: never. Not with pipeline stages",
    )
    quorum: Positive | None = Field(
        default=None,
        description="slots that suffice to commit a round: the others are left out if they are late or lost; none: "
        "all slots. Which slots count then depends on time, and the ledger has them",
    )
    grace_seconds: float | None = Field(
        default=None,
        ge=0,
        json_schema_extra=derived(f"{GRACE_SECONDS:g} with a quorum"),
        description="seconds for which a round waits for the other slots once those of the quorum are there",
    )
    replay: str = Field(
        default="", description="written by `gradstream replay`: the job whose rounds are computed again"
    )

    @property
    def slot_lengths(self) -> tuple[int, ...]:
        """The inner steps of each slot in a round; empty if all slots take `steps`, or if auto is not decided yet."""
        return self.chosen_slot_steps if self.slot_steps == "auto" else self.slot_steps or ()

    @property
    def grace(self) -> float:
        """Seconds for which a round waits for the other slots once those of the quorum are there."""
        return GRACE_SECONDS if self.grace_seconds is None else self.grace_seconds

    @property
    def undecided(self) -> bool:
        """Whether the slots' inner steps are still to be decided."""
        return self.slot_steps == "auto" and not self.chosen_slot_steps


def progress_interval(local: LocalConfig | None, pipeline: PipelineConfig) -> int:
    """Inner steps after which a worker keeps its slot's progress on its disk; 0 if it never does."""
    if local is None or pipeline.stages != 1 or local.progress_steps >= local.steps:
        return 0
    return local.progress_steps


def whole_rounds_problem(num_steps: int, local: LocalConfig) -> str:
    """Why a job cannot have this number of steps, with the nearest numbers that it can have; "" if it can."""
    rest = (num_steps - local.after) % local.steps
    if num_steps >= local.after + local.steps and not rest:
        return ""
    fewer = num_steps - rest
    more = max(fewer, local.after) + local.steps
    cure = f"{fewer} or {more}" if fewer >= local.after + local.steps else str(local.after + local.steps)
    return f"{num_steps} is not local.after {local.after} plus whole rounds of local.steps {local.steps}; use {cure}"


def whole_rounds(num_steps: int, local: LocalConfig) -> int:
    """The fewest steps, `num_steps` at least, that are `local.after` plus whole rounds."""
    return local.after + local.steps * max(1, -(-(num_steps - local.after) // local.steps))


def check_local(
    local: LocalConfig,
    training: TrainingConfig | FineTuningTraining,
    optimizer: OptimizerConfig,
    codec: CodecConfig,
    pipeline: PipelineConfig,
) -> None:
    """Check local steps against the other sections. Raises ValueError for settings that contradict each other.

    A number of steps that follows from epochs is always one of whole rounds.
    """
    if training.num_steps is not None and (problem := whole_rounds_problem(training.num_steps, local)):
        raise ValueError(f"training.num_steps {problem}")
    if "auto" in (codec.push, codec.pull):
        raise ValueError(
            "codec auto measures every step, but with local steps few are sent; use codec.push=int4 and "
            "codec.pull=delta-int4"
        )
    _check_quorum(local, training, codec)
    if local.slot_steps and pipeline.stages != 1:
        raise ValueError("local.slot_steps needs pipeline.stages=1 so far; leave one of them out")
    if local.inner_state == "keep" and pipeline.stages != 1:
        raise ValueError(
            "local.inner_state keep keeps moments for each slot, which pipeline stages cannot share; use "
            "local.inner_state=shared or pipeline.stages=1"
        )
    if local.chosen_slot_steps and local.slot_steps != "auto":
        raise ValueError("local.chosen_slot_steps is written by the coordinator; set local.slot_steps")
    for key, lengths in (("chosen_slot_steps", local.chosen_slot_steps), ("slot_steps", local.slot_lengths)):
        if lengths and len(lengths) != training.num_slots:
            raise ValueError(
                f"local.{key} has {len(lengths)} numbers, but training.num_slots is {training.num_slots}; give one for "
                f"each slot"
            )
        if lengths and max(lengths) > local.steps:
            raise ValueError(f"local.{key} has {max(lengths)}, more than local.steps {local.steps}; lower it")
    if optimizer.moments != "fp32":
        raise ValueError(
            f"optimizer.moments {optimizer.moments} is for ordinary steps alone; leave it out, and set local.moments "
            f"for what is sent"
        )


def _check_quorum(local: LocalConfig, training: TrainingConfig | FineTuningTraining, codec: CodecConfig) -> None:
    if local.quorum is None:
        for key, value in (("grace_seconds", local.grace_seconds), ("replay", local.replay or None)):
            if value is not None:
                raise ValueError(f"local.{key} {value} has no use without local.quorum; set that too, or leave it out")
        return
    if local.quorum > training.num_slots:
        raise ValueError(f"local.quorum {local.quorum} is more than training.num_slots {training.num_slots}; lower it")
    if codec.decay:
        cure = "codec.push=int4" if codec.residual_decay is None else "codec.residual_decay=0"
        raise ValueError(
            f"local.quorum is not for codec.push {codec.push} with a residual: it also depends on the slots that were "
            f"late, which a replay leaves out; use {cure}, or leave local.quorum out"
        )
    if local.inner_state == "keep":
        raise ValueError(
            "local.quorum is not for local.inner_state keep: the moments also depend on the slots that were late, "
            "which a replay leaves out; use local.inner_state=shared, or leave local.quorum out"
        )
