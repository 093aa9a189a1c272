"""A server at rest has imported neither torch nor transformers, and one with a job no transformers."""

from __future__ import annotations

import subprocess
import sys

MODULES = ["gradstream.services.parameter_server.server", "gradstream.services.parameter_server.shard"]


def test_only_a_server_with_a_job_imports_torch_and_none_imports_transformers() -> None:
    code = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module)
    print(*(name for name in ("numba", "torch", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "numba torch"]
