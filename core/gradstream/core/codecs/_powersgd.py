"""PowerSGD: a slice as the product of two thin matrices (Vogels et al. 2019).

Each call makes one power iteration: P = M Q, orthonormalized; Q = transpose(M) P; the slice is P transpose(Q). Q is
kept, so over the steps the iteration follows the leading subspace. In the paper, all-reduce adds the factors of all
workers. Here each slot has its own factors, and the server adds the products.

Shape legend: R rows, C columns, K the rank.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gradstream.core.codecs import _device
from gradstream.core.codecs._base import Payload, ResidualCodec, State, decayed, residual_of
from gradstream.core.plan.sizes import Shape, powersgd_form
from gradstream.proto.v1 import plan_pb2


class PowerSgd(ResidualCodec):
    """Rank 4. The payload is P, (R, 4), then Q, (C, 4), as fp32.

    A slice without two dimensions is treated as a nearly square matrix. A slice too small to gain is sent as fp32. As
    with all matrix products of torch, the bits are the same only on one kind of processor and number of threads.
    """

    name = "powersgd"
    wire = plan_pb2.CODEC_POWERSGD

    def new_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        rank, _, columns = powersgd_form(shape)
        return {"residual": torch.zeros(shape, device=device), "basis": _first_basis(columns, rank).to(device)}

    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0, decay: float = 1.0) -> Payload:
        values = values.detach()
        shape = tuple(values.shape)
        rank, rows, columns = powersgd_form(shape)
        residual_N = residual_of(values, state)
        sums_N = values.view(-1) + residual_N
        if not rank:
            if _device.is_finite(sums_N):
                residual_N.zero_()
            return _device.to_host(sums_N)
        sums_RC = _as_matrix(sums_N, rows, columns)
        p_RK = torch.linalg.qr(sums_RC @ state["basis"]).Q
        q_CK = (p_RK.T @ sums_RC).T
        left_RC = sums_RC.addmm_(p_RK, q_CK.T, alpha=-1)
        if not _device.is_finite(left_RC):
            payload = np.empty(self.encoded_bytes(shape), dtype=np.uint8)
            payload.view(np.float32)[:] = np.nan
            return payload
        residual_N.copy_(left_RC.view(-1)[: residual_N.numel()])
        decayed(residual_N, decay)
        # Only the directions of Q matter. Scaling Q prevents overflow and underflow.
        largest = float(q_CK.abs().max())
        state["basis"].copy_(q_CK / largest if largest > 0 else _first_basis(columns, rank))
        return _device.to_host(_device.bytes_of(p_RK, q_CK))

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        shape = tuple(out.shape)
        self.check_size(payload.nbytes, shape)
        rank, rows, columns = powersgd_form(shape)
        values_M = torch.from_numpy(payload.view(np.float32)).to(out.device)
        if rank:
            p_RK, q_CK = values_M[: rows * rank].view(rows, rank), values_M[rows * rank :].view(columns, rank)
            values_M = (p_RK @ q_CK.T).view(-1)[: math.prod(shape)]
        out.view(-1).copy_(values_M)


def _as_matrix(values_N: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The values as a matrix (rows, columns), padded with zeros at the end."""
    padding = rows * columns - values_N.numel()
    return (torch.nn.functional.pad(values_N, (0, padding)) if padding else values_N).view(rows, columns)


def _first_basis(columns: int, rank: int) -> torch.Tensor:
    """Numbers in [-1, 1) from a hash of their places, shape (columns, rank), on the CPU."""
    hashes = _device.mix_tensor(torch.arange(columns * rank))
    return (hashes.double() / 2**31 - 1).float().view(columns, rank)
