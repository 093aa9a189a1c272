"""Every parser on damaged bytes: it accepts them or raises an error of one line."""

from __future__ import annotations

import pytest
from fuzz.atheris_targets import TARGETS
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import fuzzed, mutated_bytes

SLOW = {"base": 0.2, "checkpoint_manifest": 0.5, "store": 0.5, "examples_parquet": 0.5}
"""Share of the examples, for targets that write many files."""


@pytest.mark.parametrize("name", TARGETS)
def test_valid_bytes_are_taken(name: str) -> None:
    for seed in TARGETS[name].seeds():
        assert TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes_are_taken_or_refused(name: str) -> None:
    target = TARGETS[name]

    @fuzzed(SLOW.get(name, 1.0))
    @given(st.one_of(mutated_bytes(target.seeds()), mutated_bytes(target.seeds(), 1), st.binary(max_size=60)))
    def check(data: bytes) -> None:
        target.check(data)

    check()
