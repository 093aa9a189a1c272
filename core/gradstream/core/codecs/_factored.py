"""The factored codec, for second moments: the means of a matrix's rows and columns, and their outer product.

Adafactor (Shazeer and Stern, 2018) keeps second moments in this form. A matrix of R x C takes R + C numbers instead of
R C. The product has the same means of rows and columns, and is the best approximation of rank 1 in the generalized
Kullback-Leibler divergence. It is for values that are not negative: of a matrix of others the magnitudes are encoded.
"""

from __future__ import annotations

import numpy as np
import torch

from gradstream.core.codecs._base import Codec, Payload
from gradstream.core.codecs._dense import Bf16
from gradstream.core.plan.sizes import is_factored
from gradstream.proto.v1 import plan_pb2


class Factored(Codec):
    """fp32 means of the rows, then of the columns; a slice that is not whole rows of a matrix is sent as bf16."""

    name = "factored"
    wire = plan_pb2.CODEC_FACTORED
    _whole = Bf16()

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        if not is_factored(tuple(values.shape)):
            return self._whole.encode(values)
        # numpy adds on one thread, in one order: the bits do not depend on the number of threads.
        magnitudes_RC = np.abs(values.detach().cpu().numpy().astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):
            means = np.concatenate([magnitudes_RC.mean(axis=1), magnitudes_RC.mean(axis=0)]).astype("<f4")
        return means.view(np.uint8)

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        if not is_factored(tuple(out.shape)):
            self._whole.decode(payload, out)
            return
        rows = out.shape[0]
        means = payload.view("<f4")
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            mean = means[:rows].astype(np.float64).mean()
            # Of zeros alone the mean is 0, and so are the values.
            rows_R = (means[:rows] / mean if mean else np.zeros(rows)).astype(np.float32)
        columns_C = torch.from_numpy(means[rows:].astype(np.float32)).to(out.device)
        torch.outer(torch.from_numpy(rows_R).to(out.device), columns_C, out=out)
