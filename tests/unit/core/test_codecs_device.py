"""The torch operations for other devices give the kernels' bits, also on a GPU if there is one."""

import numpy as np
import pytest
import torch

from gradstream.core.codecs import CODEC_NAMES, DenseCodec, codec_named
from gradstream.core.codecs._residual import InPlaceCodec

LENGTHS = [1, 2, 255, 256, 257, 600, 4095, 4096, 4097, 9000]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def values_of(length: int, seed: int = 0) -> torch.Tensor:
    """Wide magnitudes, ties, zeros, exact halves of a step, subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    values_N = torch.randn(length, generator=generator) * torch.exp(2 * torch.randn(length, generator=generator))
    values_N[torch.rand(length, generator=generator) < 0.1] = 0.0
    values_N[torch.rand(length, generator=generator) < 0.1] = 1.5
    values_N[600:900] = (torch.arange(300) % 29 - 14)[: max(0, min(300, length - 600))] / 2  # int4: k + 1/2
    values_N[1024:1280] *= 1e-43
    return values_N


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["int8", "int4", "int4-hadamard", "int2"])
def test_scaled_codecs_by_torch_give_the_kernels_bits(name: str, length: int) -> None:
    codec = codec_named(name)
    assert isinstance(codec, DenseCodec)
    values_N = values_of(length)
    for values_N in (values_of(length), torch.full((length,), -3.0885e-42), torch.full((length,), float("nan"))):
        payload = codec.encode(values_N, 9)
        by_torch = codec.encode_by_torch(values_N, 9)
        if values_N.isfinite().all():
            assert np.array_equal(by_torch.numpy(), payload)
        out_N = torch.empty(length)
        codec.decode(payload, out_N, 9)
        decoded_N = codec.decode_by_torch(by_torch, length, 9)
        assert torch.equal(decoded_N.nan_to_num(123.0), out_N.nan_to_num(123.0))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["topk", "sign", "sparse"])
def test_residual_codecs_by_torch_give_the_kernels_bits(name: str, length: int) -> None:
    codec = codec_named(name)
    assert isinstance(codec, InPlaceCodec)
    state = codec.new_state((length,))
    residual_N = torch.zeros(length)
    for step in range(3):
        values_N = values_of(length, step)
        payload = codec.encode_with(values_N, state)
        assert np.array_equal(codec.encode_by_torch(values_N, residual_N).numpy(), payload)
        assert torch.equal(residual_N.view(torch.int32), state["residual"].view(torch.int32))


@needs_gpu
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_gpu_gives_the_cpus_bits_and_decodes_them(name: str) -> None:
    codec = codec_named(name)
    for length in LENGTHS:
        values_N = values_of(length)
        payload = codec.encode(values_N, 9)
        from_gpu = codec.encode(values_N.cuda(), 9)
        if name == "powersgd":  # its matrix products add in another order
            out_N, other_N = torch.empty(length), torch.empty(length)
            codec.decode(payload, out_N)
            codec.decode(from_gpu, other_N)
            torch.testing.assert_close(other_N, out_N, rtol=1e-3, atol=1e-3 * float(values_N.abs().max()))
        else:
            assert np.array_equal(from_gpu, payload)
        sums_N = values_of(length, 1)
        on_gpu_N = sums_N.cuda()
        codec.decode_add(payload, on_gpu_N, 9)
        codec.decode_add(payload, sums_N, 9)
        torch.testing.assert_close(on_gpu_N.cpu(), sums_N, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("name", ["topk", "sign", "powersgd", "sparse", "int2"])
def test_a_state_from_a_checkpoint_follows_the_values_to_the_gpu(name: str) -> None:
    codec = codec_named(name)
    state = codec.new_state((64, 300))
    codec.encode_with(values_of(64 * 300).view(64, 300).cuda(), state)
    assert all(tensor.is_cuda for tensor in state.values())
    assert state["residual"].any()
