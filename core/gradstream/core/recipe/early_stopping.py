"""The best version of a fine-tuning, and early stopping: pure functions of the validation losses."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


def best_version(losses: Mapping[int, float], checkpoints: Collection[int] | None = None) -> int | None:
    """The version with the lowest finite validation loss, the earliest of equal ones; None when there is none.

    Version 0 does not count. With `checkpoints`, only versions that have a checkpoint count.
    """
    found = [
        (loss, version)
        for version, loss in losses.items()
        if version > 0 and math.isfinite(loss) and (checkpoints is None or version in checkpoints)
    ]
    return min(found)[1] if found else None


def stops_early(losses: Mapping[int, float], patience: int) -> tuple[int | None, str]:
    """Decide if training ends early: (best version, reason) to stop, (None, "") to continue.

    Training ends when `patience` validation passes in a row have not improved on the best loss so far. The loss of
    version 0 counts as one.

    Passes count in the order of their versions, and passes after the one that ends the job do not count. The result
    therefore does not depend on when this function is called.
    """
    if not patience:
        return None, ""
    best, since = math.inf, 0
    found: tuple[float, int] | None = None  # the best after version 0
    for version, loss in sorted(losses.items()):
        since = 0 if loss < best else since + 1
        best = min(best, loss)
        if version > 0 and math.isfinite(loss) and (found is None or loss < found[0]):
            found = (loss, version)
        if since >= patience and found is not None:
            return found[1], f"the validation loss was not below {best:.4f} in {since} passes up to version {version}"
    return None, ""
