"""A stand-in for `gradstream` in tests of the local cluster: reports that it is ready, then waits for SIGTERM."""

import os
import signal
import sys
from pathlib import Path

from gradstream.coordinator.cli.serve import die_with_parent


def main() -> None:
    arguments = sys.argv[1:]
    role = arguments[1]
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    die_with_parent(int(options["--die-with-parent"]))
    print(f"{role} starts", file=sys.stderr, flush=True)
    if os.environ.get("FAKE_BROKEN") == role:
        sys.exit("error: no memory left")
    if os.environ.get("FAKE_STUBBORN") == role:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready = Path(options["--ready-file"])
    line = "127.0.0.1:4711" if role == "coordinator" else options["--name"]
    temporary = ready.with_name(f".{ready.name}")
    temporary.write_text(line + "\n")
    temporary.replace(ready)
    while True:
        signal.pause()


main()
