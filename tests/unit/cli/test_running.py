"""A role that is done ends, even while its threads wait for something."""

from __future__ import annotations

import subprocess
import sys

ROLE = """
import asyncio, threading
from gradstream.coordinator.cli import _running

_running.LEFT_SECONDS = 0.2

async def role():
    loop = asyncio.get_running_loop()
    for name in ("first", "second"):
        loop.run_in_executor(None, threading.Event().wait)  # a storage that does not answer
    print("done")

_running.run_until_done(role())
print("never")
"""


def test_a_thread_that_hangs_holds_up_no_end() -> None:
    done = subprocess.run([sys.executable, "-c", ROLE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_role_that_fails_says_so() -> None:
    failing = ROLE.replace('print("done")', 'raise ValueError("no such port")')
    failing = failing.replace("loop.run_in_executor(None, threading.Event().wait)", "pass")
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no such port" in done.stderr
