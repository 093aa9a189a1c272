"""Writes docs/screens.md: what `gradstream top`, `status` and `watch` show on terminals of two sizes.

A coordinator with canned answers is served, the real commands run in tmux, and their screens are captured:

.venv/bin/python docs/images/draw_screens.py
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "client"))

from canned_jobs import CannedJobs, canned_cluster, serving  # noqa: E402

SIZES = ((80, 24), (120, 40))
ADDRESS = "127.0.0.1:7000"
# Servers, workers, dead workers.
CLUSTERS = {"3 nodes": (1, 2, 0), "30 nodes": (4, 26, 2), "200 nodes": (8, 192, 6)}
PATIENCE_SECONDS = 30.0
HEAD = """# Screens

What the live commands show on terminals of 80 × 24 and 120 × 40 characters. `docs/images/draw_screens.py` writes this
page: it runs the commands in tmux against a coordinator with canned answers.

"""


class Screen:
    """A terminal of a size in which a command runs."""

    def __init__(self, socket: Path, width: int, height: int, command: list[str]):
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        # The shell waits afterwards, so that what a command leaves can be captured.
        line = f"GRADSTREAM_COORDINATOR={ADDRESS} {shlex.join(command)}; sleep 60"
        size = ["-x", str(width), "-y", str(height)]
        subprocess.run([*self._tmux, "new-session", "-d", "-s", "screen", *size, line], check=True, cwd=ROOT)

    def press(self, key: str) -> None:
        """Press a key."""
        subprocess.run([*self._tmux, "send-keys", "-t", "screen", key], check=True)

    def showing(self, text: str) -> str:
        """Everything on the screen, and what scrolled off it, once `text` is there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            command = [*self._tmux, "capture-pane", "-p", "-t", "screen", "-S", "-200"]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if text in shown:
                return "\n".join(line.rstrip() for line in shown.rstrip().splitlines())
            if time.monotonic() > deadline:
                raise SystemExit(f"'{text}' was not shown:\n{shown}")
            time.sleep(0.2)

    def close(self) -> None:
        """End the command and its terminal."""
        subprocess.run([*self._tmux, "kill-server"], check=True)


@contextmanager
def screen(width: int, height: int, *command: str) -> Iterator[Screen]:
    """A terminal in which `gradstream COMMAND` runs."""
    with tempfile.TemporaryDirectory() as directory:
        gradstream = str(Path(sys.executable).with_name("gradstream"))
        found = Screen(Path(directory) / "tmux", width, height, [gradstream, *command])
        try:
            yield found
        finally:
            found.close()


def main() -> None:
    """Capture every screen, then write the page."""
    sections = []
    for title, cluster in CLUSTERS.items():
        job, nodes = canned_cluster(*cluster)
        served = CannedJobs()
        served.jobs, served.nodes = [job], nodes
        with serving(served, ADDRESS):
            for width, height in SIZES:
                with screen(width, height, "top") as top:
                    sections.append((f"top, {title}, {width} × {height}", top.showing("keys:")))
                    if title == "3 nodes" and height == SIZES[0][1]:
                        top.press("d")
                        sections.append((f"top, {title}, after the key d", top.showing("d nodes")))
                if title == "3 nodes":
                    with screen(width, height, "status") as status:
                        sections.append((f"status, {width} × {height}", status.showing("follow it:")))
                    with screen(width, height, "watch") as watch:
                        sections.append((f"watch, {width} × {height}", watch.showing("a step takes")))
    blocks = [f"## {title}\n\n```\n{text}\n```\n" for title, text in sections]
    (ROOT / "docs" / "screens.md").write_text(HEAD + "\n".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
