"""Which versions' timelines a worker reports: the coordinator says so, and the worker follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradstream.proto.v1 import coordinator_pb2


@dataclass(frozen=True, slots=True)
class Sampling:
    """A rule for the timelines of a job. All workers report the same versions, so that their times compare.

    Every `interval_versions`-th version is reported. Of its reports those of one group of slots have spans; the others
    only have the times of the step. The groups, `num_groups` of them, take turns. In a pipeline all workers of a
    replica hold the same slots, so they report the spans of the same versions.
    """

    interval_versions: int = 1
    num_groups: int = 1

    def reports(self, version: int) -> bool:
        """Whether a worker reports this version."""
        return version % self.interval_versions == 0

    def has_spans(self, version: int, slots: Iterable[int]) -> bool:
        """Whether the report of a worker that holds these slots has spans."""
        turn = version // self.interval_versions % self.num_groups
        return any(slot % self.num_groups == turn for slot in slots)

    @classmethod
    def from_proto(cls, message: coordinator_pb2.TimelineSampling) -> Sampling:
        """The rule of a directive. Its zeros count as ones."""
        return cls(max(1, message.interval_versions), max(1, message.num_groups))
