"""Generate the Python stubs that are committed beside the .proto files.

Run as `make protos`; with --check DIR the stubs go to DIR, so that a test can compare them with the committed ones.
"""

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write `_pb2.py`, `_pb2.pyi` and `_pb2_grpc.py` for every .proto file under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}"]
    arguments += [f"--{plugin}_out={out}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main([*arguments, *sources]) != 0:
        raise SystemExit("protoc failed; its message is above")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="DIR", help="write the stubs to DIR instead of beside the sources")
    options = parser.parse_args()
    generate(Path(options.check) if options.check else ROOT)
    sys.exit(0)
