"""Recipes: the settings of a job. Each section is a pydantic model, and an unknown key is an error.

A recipe file is YAML. `base: other.yaml` starts from another recipe (mappings merge, everything else replaces), and
`key.sub=value` overrides come last. `load_recipe` resolves bases and overrides. The coordinator stores the resolved
recipe, which determines, with the seed and the data, every bit of the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from gradstream.core.recipe import defaults
from gradstream.core.recipe.defaults import (
    PRETRAINING,
    check_batch,
    fit_batch,
    fit_recipe,
    longest_sequence,
    text_section,
)
from gradstream.core.recipe.files import is_url
from gradstream.core.recipe.fine_tuning import FineTuning, LoraConfig, with_new_key
from gradstream.core.recipe.local import LocalConfig, check_local
from gradstream.core.recipe.model_config import check_fields, check_special_ids
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.recipe.section import NonNegative, Positive, Section, derived
from gradstream.core.recipe.start_from import StartFrom

Beta = Annotated[float, Field(ge=0, lt=1)]
S = TypeVar("S", bound=Section)


RESIDUAL_CODECS = {"topk": 1.0, "sign": 1.0, "powersgd": 1.0, "sparse": 0.95}
"""Codecs that keep a residual unless a recipe says otherwise, with its decay."""
NEVER_RESIDUAL = frozenset({"fp32", "bf16", "fp32-zstd", "bf16-zstd", "auto"})
"""Push codecs that leave out too little for a residual, or that may change from step to step."""


class ModelConfig(Section):
    """The model: a Hugging Face config.json, written out or by path."""

    config: dict[str, Any] = Field(description="a Hugging Face config.json as a mapping, or its path")

    @field_validator("config")
    @classmethod
    def _is_json(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            # The text must be valid UTF-8 too: pydantic would change half of a surrogate pair in a key.
            json.dumps(config, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"model.config has a value that JSON cannot express ({error})") from None
        check_fields(config)
        return config


class EarlierSteps(Section):
    """A part of the trajectory that was computed when the job had another number of steps."""

    until_version: NonNegative = Field(
        description="the steps before this one belong to it; with local steps it counts inner steps too"
    )
    num_steps: Positive = Field(description="the number of steps that the job had")


class TrainingConfig(Section):
    """The batch and how a worker computes it. Every key shapes the trajectory.

    Where global_batch, num_slots or microbatch is left out, it follows from the others
    (gradstream.core.recipe.defaults).
    """

    num_steps: Positive = Field(description="optimizer updates")
    num_slots: Positive = Field(
        default=PRETRAINING.num_slots,
        description="fixed parts of the global batch; most workers that can share a step; where left out, as many of 4 "
        "as divide the batch",
    )
    global_batch: Positive = Field(default=PRETRAINING.global_batch, description="samples a step, over all slots")
    microbatch: Positive = Field(
        default=PRETRAINING.microbatch,
        description="samples that go through the model at once; where left out, as many of 8 as divide a slot's",
    )
    sequence_length: Positive = Field(
        default=defaults.SEQUENCE_LENGTH, description="target tokens a sample; at most the model's positions"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="fp32, or bf16 autocast")
    recompute: bool = Field(default=False, description="recompute activations in the backward pass to save memory")
    num_threads: Positive = Field(default=1, description="threads that a worker on a CPU computes with")
    max_consecutive_skips: Positive = Field(
        default=10, description="steps in a row with a non-finite gradient after which the job fails"
    )
    earlier: tuple[EarlierSteps, ...] = Field(
        default=(),
        description="written by `gradstream resume --steps` and `replay`: the numbers of steps that the job had "
        "before, oldest first; the steps under them keep the learning-rate schedule of their time",
    )

    @property
    def slot_batch(self) -> int:
        """Number of samples of a slot."""
        return self.global_batch // self.num_slots

    def schedule_steps(self, step: int) -> int:
        """The number of steps that the learning-rate schedule of a step is made for."""
        return next((part.num_steps for part in self.earlier if step < part.until_version), self.num_steps)

    @property
    def submitted_num_steps(self) -> int:
        """The number of steps that the job was submitted with."""
        return self.earlier[0].num_steps if self.earlier else self.num_steps

    def extended(self, step: int, num_steps: int) -> TrainingConfig:
        """The same with `num_steps` steps in all from step `step` on; earlier steps stay as they are."""
        parts = [part for part in self.earlier if part.until_version < step]
        before = next((part.num_steps for part in self.earlier if part.until_version >= step), self.num_steps)
        last = EarlierSteps(until_version=step, num_steps=before)
        return self.model_copy(update={"num_steps": num_steps, "earlier": (*parts, last)})

    @model_validator(mode="before")
    @classmethod
    def _fit(cls, tree: Any) -> Any:
        return {**tree, **fit_batch(tree, PRETRAINING)} if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _divisible(self) -> TrainingConfig:
        check_batch(self.global_batch, self.num_slots, self.microbatch)
        versions = [part.until_version for part in self.earlier]
        # A replay may end where its job was stopped, in the schedule of the steps that the job was to have.
        was_cut = bool(versions) and versions[-1] == self.num_steps < self.earlier[-1].num_steps
        if versions != sorted(set(versions)) or (versions and versions[-1] >= self.num_steps and not was_cut):
            raise ValueError(
                f"training.earlier ends at versions {', '.join(map(str, versions))}; they must rise, up to less than "
                f"training.num_steps {self.num_steps}; leave training.earlier out of a recipe that you write"
            )
        return self


class MuonConfig(Section):
    """Muon's own settings."""

    momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(default=True, description="Nesterov's form")


class OptimizerConfig(Section):
    """The update rule that the servers apply."""

    kind: Literal["adamw", "sgd", "muon"] = Field(
        default="adamw",
        description="AdamW, SGD with momentum, or Muon, as torch has them; with muon the matrices of hidden layers "
        "follow Muon's rule, and the embedding, the head, norms and biases AdamW's, at the same learning rate",
    )
    learning_rate: float = Field(
        default=1e-3, gt=0, description="highest rate, which the learning-rate schedule scales"
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), description="adamw and muon: decay of both of AdamW's moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="adamw and muon: added to the root of the second moment")
    moments: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="adamw only: type of both moments on the servers; bf16 takes 4 bytes a parameter less, with "
        "stochastic rounding from the job's seed",
    )
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices only, not on norms and biases")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only: decay of the momentum")
    nesterov: bool = Field(default=True, description="sgd only: Nesterov's form")
    muon: MuonConfig = MuonConfig()
    clip_norm: float = Field(default=1.0, gt=0, description="global gradient norm above which the gradient is scaled")

    @model_validator(mode="after")
    def _has_moments(self) -> OptimizerConfig:
        if self.moments != "fp32" and self.kind != "adamw":
            raise ValueError(f"optimizer.moments {self.moments} is for adamw, not {self.kind}; leave it out")
        return self


class LearningRateScheduleConfig(Section):
    """The learning rate over the steps, as a factor on optimizer.learning_rate."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="cosine decay; wsd: constant, then linear decay; or constant"
    )
    warmup_steps: NonNegative = Field(default=0, description="steps in which the rate rises linearly from 0")
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="the factor at the end (cosine, wsd)")
    decay_steps: NonNegative = Field(default=0, description="wsd only: length of the linear decay at the end")


class CodecConfig(Section):
    """The codecs in which gradients and weights are sent."""

    push: Literal[
        "fp32",
        "bf16",
        "int8",
        "int4",
        "int4-hadamard",
        "int2",
        "fp32-zstd",
        "bf16-zstd",
        "topk",
        "sign",
        "powersgd",
        "sparse",
        "auto",
    ] = Field(default="int8", description="gradients, or differences of weights with local steps, worker to server")
    pull: Literal[
        "fp32",
        "bf16",
        "int8",
        "fp32-zstd",
        "bf16-zstd",
        "delta-bf16",
        "delta-int8",
        "delta-int4",
        "delta-int4-hadamard",
        "delta-int2",
        "xor-fp32",
        "xor-bf16",
        "auto",
    ] = Field(default="delta-int8", description="weights, server to worker")
    embedding: Literal["bf16", "int8", "int4", "int2"] = Field(
        default="int8", description="codec of embeddings, where push or pull is coarser than bf16"
    )
    keyframe_versions: Positive = Field(
        default=1000, description="versions after which workers that pull deltas get whole weights again"
    )
    residual_decay: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="what a contribution leaves out is added to the slot's next one, times this factor; 0: dropped, "
        "and the job gives the same bits on any workers; none: 1 for topk, sign and powersgd, 0.95 for sparse, else 0",
    )

    @property
    def decay(self) -> float:
        """The decay of residuals; 0 if the job keeps none."""
        return RESIDUAL_CODECS.get(self.push, 0.0) if self.residual_decay is None else self.residual_decay


class PrepareConfig(Section):
    """The settings with which `gradstream data prepare` makes the data set if it does not exist yet."""

    sources: list[str] = Field(
        min_length=1,
        description="files, globs, directories on any fsspec path; 'stdlib:' is Python's standard library",
    )
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = Field(
        default="auto", description="what the files hold; auto: by their names, then by their content"
    )
    tokenizer: str | None = Field(
        default=None,
        description="path of a tokenizer.json",
        json_schema_extra=derived("trained on the sources, of vocab_size words"),
    )
    end_of_text: str | int | None = Field(
        default=None,
        description="token, or its id, that ends a document",
        json_schema_extra=derived("what the files beside the tokenizer say; <|endoftext|> of one that is trained"),
    )
    vocab_size: Positive = Field(
        default=defaults.VOCABULARY_SIZE, description="size of the byte-level BPE to train; at most the model's"
    )
    text_field: str = Field(default="text", description="of rows: the field that holds the text; a.b: b in a")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of documents held out",
        json_schema_extra=derived("0.02; of less than 3 MiB of text more, up to 0.1"),
    )
    num_shards: Positive = Field(
        default=defaults.NUM_SHARDS, description="data shards of a split; a split with fewer documents has fewer"
    )
    max_bytes: Positive | None = Field(default=None, description="stop after about this many bytes of text")

    @field_validator("sources")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        if not all(source.strip() for source in value):
            raise ValueError("one of the sources is empty; name a file, a glob or a directory")
        return value

    @field_validator("end_of_text", mode="before")
    @classmethod
    def _token_or_id(cls, value: Any) -> Any:
        if value is not None and type(value) not in (str, int):
            raise ValueError(f"end_of_text {value!r} is neither a token's text nor its id")
        return value


class DataConfig(Section):
    """The data set."""

    path: str = Field(description="directory of manifest.json, on any fsspec path")
    prepare: PrepareConfig | None = Field(default=None, description="how `gradstream data prepare` makes it")


class ValidationConfig(Section):
    """Validation passes. There is also one before the first step and one after the last."""

    interval_steps: NonNegative = Field(default=100, description="0: no validation passes at all")
    num_samples: Positive = Field(
        default=defaults.NUM_VALIDATION_SAMPLES, description="samples a pass, over all slots; a multiple of num_slots"
    )


class CheckpointConfig(Section):
    """Checkpoints. The last version always gets one."""

    interval_steps: NonNegative = Field(default=100, description="0: only the last")
    keep: Positive = Field(default=3, description="how many of the newest to keep")


class PipelineConfig(Section):
    """The stages of the model, which workers compute one after the other.

    Two things shape the trajectory: whether `stages` is 1, and `activations`. With more stages than 1, or auto, a tied
    embedding's gradient comes in two parts.
    """

    stages: Positive | Literal["auto"] = Field(
        default=1, description="pipeline stages of a replica; auto: as few as fit the workers' memory"
    )
    chunks: Positive = Field(default=1, description="stages that each worker has, for interleaved schedules")
    schedule: Literal["auto", "gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "zero-bubble"] = Field(
        default="auto", description="order in which workers compute microbatches; auto: the fastest schedule that fits"
    )
    activations: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32", description="type of activations between stages; with fp32 a cut changes no bit"
    )

    @property
    def min_workers(self) -> int:
        """Smallest number of workers that form a replica."""
        return 1 if self.stages == "auto" else self.stages // self.chunks

    @model_validator(mode="after")
    def _whole(self) -> PipelineConfig:
        if self.chunks > 1 and self.stages == 1:
            raise ValueError(f"pipeline.chunks {self.chunks} needs pipeline.stages, a multiple of it; give that too")
        if self.chunks > 1 and self.schedule not in ("auto", "interleaved-1f1b", "zero-bubble"):
            raise ValueError(
                f"pipeline.schedule {self.schedule} has one chunk a worker, not {self.chunks}; use interleaved-1f1b or "
                f"zero-bubble, or leave pipeline.chunks out"
            )
        if self.chunks == 1 and self.schedule == "interleaved-1f1b":
            raise ValueError(
                "pipeline.schedule interleaved-1f1b needs pipeline.chunks of at least 2; with one it is eager-1f1b"
            )
        if self.stages != "auto" and self.stages % self.chunks:
            raise ValueError(
                f"stages {self.stages} is not divisible by chunks {self.chunks}; every worker has as many stages"
            )
        return self


class ClusterConfig(Section):
    """The job's needs of the cluster.

    Only fragment_bytes shapes the trajectory, because squared norms are summed by fragment.
    """

    min_servers: Positive = Field(default=1, description="parameter servers that the job waits for before it starts")
    min_workers: Positive = Field(default=1, description="workers that the job waits for before it starts")
    fragment_bytes: Positive = Field(default=4 << 20, description="most bytes of fp32 a fragment holds")


def check_sections(run_root: str, pipeline: PipelineConfig, codec: CodecConfig) -> None:
    """Check sections that recipes of both kinds have. Raises ValueError for settings that contradict each other."""
    if is_url(run_root):
        raise ValueError(f"run_root {run_root} is not a directory of this machine; give a local path")
    if pipeline.stages != 1 and codec.decay:
        cure = "codec.push=int8" if codec.residual_decay is None else "codec.residual_decay=0"
        raise ValueError(
            f"codec.push {codec.push} keeps a residual for each slot, which pipeline stages cannot share; use "
            f"{cure} or pipeline.stages=1"
        )
    if codec.decay and codec.push in NEVER_RESIDUAL:
        raise ValueError(
            f"codec.residual_decay {codec.decay:g} has no use with codec.push {codec.push}; leave it out, or use "
            f"codec.push=int4"
        )
    if codec.push == "powersgd" and not codec.decay:
        raise ValueError(
            "codec.residual_decay 0 is not for codec.push powersgd, which carries a basis from step to step; use "
            "codec.push=sparse, or a decay above 0"
        )


class Recipe(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="jobs are called NAME-1, NAME-2, …")
    description: str = Field(default="", description="for people")
    seed: NonNegative = Field(default=0, description="seed of initial weights, samples and dropout")
    run_root: str = Field(
        default="runs",
        description="directory in which each job gets its own directory; the coordinator and all servers share it",
    )
    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: LearningRateScheduleConfig = LearningRateScheduleConfig()
    codec: CodecConfig = CodecConfig()
    data: DataConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    pipeline: PipelineConfig = PipelineConfig()
    local: LocalConfig | None = Field(
        default=None, description="local steps between exchanges; none: every step is exchanged"
    )
    cluster: ClusterConfig = ClusterConfig()
    start_from: StartFrom | None = Field(
        default=None, description="the checkpoint of another job whose weights this job starts with; none: the seed"
    )
    fine_tuning: FineTuning | None = Field(default=None, description="written by the fine-tuning service")

    @model_validator(mode="before")
    @classmethod
    def _fit(cls, tree: Any) -> Any:
        return fit_recipe(with_new_key(tree)) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.fine_tuning is None:  # a base's config is taken as it is
            check_special_ids(self.model.config)
        longest = longest_sequence(self.model.config)
        if longest is not None and self.training.sequence_length > longest[1]:
            raise ValueError(
                f"training.sequence_length {self.training.sequence_length} is longer than the model's "
                f"{longest[1]} positions; lower it or raise model.config.{longest[0]}"
            )
        check_sections(self.run_root, self.pipeline, self.codec)
        if self.local is not None:
            check_local(self.local, self.training, self.optimizer, self.codec, self.pipeline)
        if self.start_from is not None and self.fine_tuning is not None:
            raise ValueError("a fine-tuning starts from its base_model; leave start_from out")
        prepare = self.data.prepare
        num_words = text_section(self.model.config).get("vocab_size")
        trained = prepare.vocab_size if prepare is not None and prepare.tokenizer is None else 0
        if isinstance(num_words, int) and trained > num_words:
            raise ValueError(
                f"data.prepare.vocab_size {trained} is more than the model's {num_words} words; lower it or raise "
                f"model.config.vocab_size"
            )
        if self.validation.num_samples % self.training.num_slots:
            raise ValueError(
                f"validation.num_samples {self.validation.num_samples} is not divisible by training.num_slots "
                f"{self.training.num_slots}"
            )
        return self

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None when all weights are trained."""
        return self.fine_tuning.lora if self.fine_tuning is not None else None

    @property
    def rounds(self) -> Rounds:
        """The steps for which each version stands."""
        if self.local is None:
            return Rounds(self.training.num_steps)
        return Rounds(self.training.num_steps, self.local.steps, self.local.after, self.local.slot_lengths)

    def keeps_slot_state(self, version: int | None = None) -> bool:
        """Whether slots keep something of their own from step to step, which checkpoints contain: the codec's residuals
        or the moments of rounds. At `version`, or at any."""
        if self.codec.decay > 0:
            return True
        keeps = self.local is not None and self.local.inner_state == "keep"
        return keeps and (version is None or version > self.rounds.after)

    @property
    def slot_state_title(self) -> str:
        """What slots keep of their own, for people."""
        moments = self.local is not None and self.local.inner_state == "keep"
        return " and ".join(["residuals"] * (self.codec.decay > 0) + ["moments"] * moments)

    def num_samples(self, version: int) -> int:
        """Number of samples of all slots from a version to the next one, at most where the plan is to decide it."""
        slots = range(self.training.num_slots)
        return self.training.slot_batch * sum(self.rounds.num_slot_steps(version, slot) for slot in slots)

    @property
    def num_samples_in_all(self) -> int:
        """Number of samples of all steps, at most where the plan is to decide it."""
        rounds = self.rounds
        if not rounds.length:
            return rounds.num_steps * self.training.global_batch
        ordinary = rounds.after * self.training.global_batch
        return ordinary + rounds.num_rounds * self.num_samples(rounds.after)

    def validates(self, version: int) -> bool:
        """Whether this version has a validation pass: the first, the last, one every interval, and those that were the
        last before the job got more steps."""
        interval, training, rounds = self.validation.interval_steps, self.training, self.rounds
        ends = [part.num_steps for part in training.earlier if part.until_version == part.num_steps]
        due = rounds.steps_at(version) in (training.num_steps, *ends) or rounds.passes(version, interval)
        return interval > 0 and due and version <= rounds.last_version
