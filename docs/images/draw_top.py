"""Draws docs/images/top.svg: what `gradstream top` shows of a running job.

make demo                                              # in one terminal; it prints the coordinator's address
.venv/bin/python docs/images/draw_top.py 127.0.0.1:PORT --step 40
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from gradstream.client import Client, Step
from gradstream.coordinator.cli.views.top import Choices, Look, view

COLUMNS, LINES = 100, 24


def main() -> None:
    """Wait for a step of the newest job, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--step", type=int, default=40, help="the step to wait for")
    arguments = parser.parse_args()
    with Client(arguments.address) as client:
        job = client.job()
        for item in client.watch(job.job_id):
            if isinstance(item, Step) and item.step >= arguments.step:
                break
        console = Console(record=True, width=COLUMNS, force_terminal=True, file=io.StringIO())
        look = Look(arguments.address, tuple(client.nodes()), (client.job(job.job_id),))
        console.print(view(look, Choices(), COLUMNS, LINES))
    Path(__file__).with_name("top.svg").write_text(console.export_svg(title="gradstream top"), encoding="utf-8")


if __name__ == "__main__":
    main()
