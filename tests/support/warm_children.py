"""The child processes that measure models for a coordinator, forked from one that has imported transformers.

A child that is started separately spends three seconds of a core on its imports. Here one process imports once and
forks a child for each question. `test_a_child_process_measures_once` starts them as a coordinator does.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path


class WarmChildren:
    """Runs modules as `python -m` would, in forks of one process, which is started for the first module."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, module: str, question: str) -> subprocess.CompletedProcess[bytes]:
        """Run a module's `_main` with `question` on stdin; return its output."""
        with self._lock:
            if self._process is None:
                self._start()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._control, [module.encode()], [theirs.fileno()])
            ours.sendall(question.encode())
            ours.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: ours.recv(1 << 16), b""))
        return subprocess.CompletedProcess([module], 0, answer, b"")

    def _start(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with control:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.warm_children", str(control.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[control.fileno()],
            )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait(60)


# ruff: noqa: F401
def _serve(control: socket.socket) -> None:
    import transformers.masking_utils
    import transformers.models.llama.modeling_llama

    import gradstream.core.model.profile
    import gradstream.core.model.trial

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the children
    while True:
        module, received, _, _ = socket.recv_fds(control, 1000, 1)
        if not module:
            return  # the tests have ended
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            os.dup2(received[0], 0)
            os.dup2(received[0], 1)
            os.close(received[0])
            importlib.import_module(module.decode())._main()
            sys.stdout.flush()
            os._exit(0)
        os.close(received[0])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _serve(control)
