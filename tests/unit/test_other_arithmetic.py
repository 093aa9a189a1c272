"""Tests of bits pass with another processor's arithmetic: MKL and torch are told to add in other orders.

A clone on another machine must pass. So a test must not expect the order in which one BLAS adds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FILES = ("unit/core/model/test_weight_gradients.py", "unit/worker/test_compute.py")
ARITHMETIC = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""SSE kernels. Their blocks are smaller: MKL's sums of 128 products already have other bits when they are added in
place, which those of AVX2 and AVX-512 have from some hundred on."""


def test_tests_of_bits_pass_with_another_order_of_sums() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in FILES)],
        env={**os.environ, **ARITHMETIC},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
