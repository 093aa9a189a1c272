"""The leader's part of `codec: auto`: collects the workers' measurements and the step times."""

from __future__ import annotations

import math

from gradstream.core.plan.bundles import codec_for
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server import autocodec
from gradstream.services.parameter_server.autocodec import AutoState, Speeds

MAX_MEASURED = 4096
"""Connections whose measurements of a step are kept."""


class Tuner:
    """Chooses each step's codec. `push` and `pull` tell in which direction the codec may change."""

    def __init__(self, plan: Plan):
        codec = plan.recipe.codec
        self.push = codec.push == "auto"
        self.pull = codec.pull == "auto"
        self._state = AutoState()
        self._committed_at: float | None = None
        self._measured: dict[str, pb.LinkMeasurement] = {}
        embedding = codec.embedding
        self._sizes = {
            name: float(
                sum(
                    self.push * encoded_bytes(codec_for(kind, name, embedding), fragment.shape)
                    + self.pull * encoded_bytes(codec_for(kind, name, name), fragment.shape)
                    for fragment in plan.fragments
                    for kind in (plan.tensors[fragment.tensor].kind,)
                )
            )
            for name in autocodec.LADDER
        }

    @property
    def codec(self) -> str:
        """The codec of the step under way."""
        return self._state.codec

    def codecs(self, push: str, pull: str) -> tuple[str, str]:
        """The push and pull codecs of the step under way: the tuner's where it may change them, else those given."""
        return self.codec if self.push else push, self.codec if self.pull else pull

    @property
    def reason(self) -> str:
        """The reason for the codec."""
        return self._state.reason

    def measured(self, peer: str, measurement: pb.LinkMeasurement) -> None:
        """Take the measurements of the worker behind `peer` over its last step, if all of them are positive."""
        seen = (measurement.compute_seconds, measurement.push_bytes_per_second, measurement.pull_bytes_per_second)
        room = len(self._measured) < MAX_MEASURED or peer in self._measured
        if room and all(math.isfinite(value) and value > 0 for value in seen):
            self._measured[peer] = measurement

    def committed(self, now: float) -> None:
        """Decide the next step's codec, after a commit at `now` in seconds of a monotonic clock."""
        before, self._committed_at = self._committed_at, now
        seen = list(self._measured.values())
        self._measured.clear()
        if before is None or not seen:
            return
        speeds = Speeds(
            max(measurement.compute_seconds for measurement in seen),
            min(measurement.push_bytes_per_second for measurement in seen),
            min(measurement.pull_bytes_per_second for measurement in seen),
        )
        self._state = autocodec.after_step(self._state, now - before, speeds, self._sizes)
