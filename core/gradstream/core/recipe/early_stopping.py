"""Which version of a fine-tuning is its result, and when no better one is to be expected: pure functions of the
validation losses."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


def best_version(losses: Mapping[int, float], checkpoints: Collection[int] | None = None) -> int | None:
    """The version with the lowest validation loss, the earlier of equal ones, among those after a step (and with a
    checkpoint, when `checkpoints` are given); None when there is none with a finite loss."""
    found = [
        (loss, version)
        for version, loss in losses.items()
        if version > 0 and math.isfinite(loss) and (checkpoints is None or version in checkpoints)
    ]
    return min(found)[1] if found else None


def stops_early(losses: Mapping[int, float], patience: int) -> tuple[int | None, str]:
    """(the best version, reason) when `patience` passes in a row have brought no new best, that of version 0 counting;
    (None, "") to go on.

    Passes count in the order of their versions, and those after the one that ends the job do not: the result does not
    depend on how far the job had got by the time that somebody looked.
    """
    if not patience:
        return None, ""
    best, since = math.inf, 0
    found: tuple[float, int] | None = None  # the best one after a step
    for version, loss in sorted(losses.items()):
        since = 0 if loss < best else since + 1
        best = min(best, loss)
        if version > 0 and math.isfinite(loss) and (found is None or loss < found[0]):
            found = (loss, version)
        if since >= patience and found is not None:
            return found[1], f"the validation loss was not below {best:.4f} in {since} passes up to version {version}"
    return None, ""
