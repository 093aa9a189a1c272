"""Runs a target under atheris, a fuzzer that is guided by code coverage. `make fuzz` calls it.

`python -m fuzz TARGET SECONDS [LIBFUZZER_OPTION ...]`, with tests/ on the path.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from support.fuzzing import WORDS

MAX_BYTES = 20_000
FINDINGS = Path("fuzz-findings")
# numba compiles these from their bytecode, which must be its own.
KERNELS = ["gradstream.core.kernels.codec", "gradstream.core.kernels.dense", "gradstream.core.kernels.residual"]


def main() -> None:
    """Fuzz one target; an input that breaks it ends the run and is written to FINDINGS."""
    try:
        import atheris
    except ImportError:
        sys.exit("error: atheris is not installed; `.venv/bin/pip install atheris` (Linux, Python 3.11) and try again")
    with atheris.instrument_imports(include=["gradstream"], exclude=KERNELS):
        from fuzz.atheris_targets import TARGETS
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: make fuzz TARGET=… SECONDS=…; targets: {' '.join(TARGETS)}")
    name, seconds, *options = sys.argv[1:]
    target = TARGETS[name]
    FINDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gradstream-corpus-", ignore_cleanup_errors=True) as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            (corpus / str(number)).write_bytes(seed)
        words = Path(directory) / "words"
        lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in WORDS if 0 < len(word) < 60]
        words.write_text("".join(f'"{line}"\n' for line in lines))
        flags = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-dict={words}", "-timeout=20"]
        flags += ["-rss_limit_mb=4096", f"-artifact_prefix={FINDINGS}/{name}-", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, *options, str(corpus)], lambda data: void(target.check(data)))
        atheris.Fuzz()


def void(_: object) -> None:
    """libFuzzer takes what a target returns for its verdict."""


if __name__ == "__main__":
    main()
