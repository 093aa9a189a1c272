"""Safetensors files written tensor by tensor: the library's bytes without its second copy in memory."""

from __future__ import annotations

import hashlib
import io
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from gradstream.core.storage.tensor_files import TensorSpec, write_tensors

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)


def written(arrays: dict[str, np.ndarray]) -> tuple[bytes, int, str]:
    stream = io.BytesIO()
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    num_bytes, sha256 = write_tensors(stream, specs, lambda name: arrays[name], {"format": "gradstream"})
    return stream.getvalue(), num_bytes, sha256


@given(st.dictionaries(NAMES, SHAPES, max_size=6))
def test_the_bytes_are_the_librarys(shapes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(len(shapes))
    arrays = {name: np.asarray(rng.standard_normal(shape), dtype=np.float32) for name, shape in shapes.items()}
    data, num_bytes, sha256 = written(arrays)
    assert data == save(arrays, metadata={"format": "gradstream"})
    assert (num_bytes, sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_an_array_whose_elements_do_not_lie_end_to_end() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(load(written({"t": array})[0])["t"], array)


def test_contents_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor 't' has 8 bytes instead of the 12 announced"):
        write_tensors(io.BytesIO(), [TensorSpec("t", "F32", (3,))], lambda name: np.zeros(2, np.float32), {})


class Sink(io.RawIOBase):
    """Takes bytes and keeps none; another thread gets its turn at each write."""

    num_bytes = 0

    def __init__(self) -> None:
        self.wanted, self.done = threading.Event(), threading.Event()

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        self.done.clear()
        self.wanted.set()
        assert self.done.wait(10)
        self.num_bytes += len(data)
        return len(data)


def test_no_second_copy_is_made_and_other_threads_run_between_tensors() -> None:
    """The library's writer takes the tensors' size once more and holds the interpreter for the whole file."""
    arrays = {f"weight/{index}": np.zeros(1 << 18, np.float32) for index in range(16)}
    sink, ending, num_turns = Sink(), threading.Event(), 0

    def other() -> None:
        nonlocal num_turns
        while True:
            sink.wanted.wait()
            sink.wanted.clear()
            if ending.is_set():
                return
            num_turns += 1
            sink.done.set()

    thread = threading.Thread(target=other)
    thread.start()
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    tracemalloc.start()
    try:
        write_tensors(sink, specs, lambda name: arrays[name], {})  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        ending.set()
        sink.wanted.set()
        thread.join()
    total = sum(array.nbytes for array in arrays.values())
    assert num_turns >= len(arrays)
    assert sink.num_bytes > total
    assert peak < total / 16
