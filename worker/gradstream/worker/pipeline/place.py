"""A worker's place in a replica, and the shapes of the tensors that it exchanges with its neighbours there."""

from __future__ import annotations

from dataclasses import dataclass

from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import plan_pb2
from gradstream.worker.attempt import Attempt, num_microbatches, num_samples


@dataclass(frozen=True)
class Place:
    """A worker's place in a replica: the replica as in the lease table, and the index among its workers."""

    replica: plan_pb2.Replica
    index: int

    @property
    def is_first(self) -> bool:
        """Whether this is the first worker, which begins attempts."""
        return self.index == 0

    def title(self, index: int) -> str:
        """The name of a member in messages for people."""
        member = self.replica.workers[index]
        return f"worker {member.name} at {member.address} (place {index} of its replica)"


@dataclass(frozen=True)
class Shapes:
    """The shapes of microbatches' activations: samples, tokens and hidden size. Their gradients have the same."""

    plan: Plan
    hidden_size: int

    @property
    def largest(self) -> tuple[int, int, int]:
        """The shape of a whole microbatch."""
        training = self.plan.recipe.training
        return training.microbatch, training.sequence_length, self.hidden_size

    def of(self, attempt: Attempt, microbatch: int) -> tuple[int, int, int]:
        """The shape of an attempt's microbatch. The last one of a validation pass may have fewer samples."""
        training = self.plan.recipe.training
        before = microbatch % num_microbatches(self.plan, attempt) * training.microbatch
        left = num_samples(self.plan, attempt) - before
        return min(training.microbatch, left), training.sequence_length, self.hidden_size
