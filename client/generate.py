"""Writes the blocking clients from the asyncio ones: the same methods, signatures and docstrings.

Run as `make clients`; with --check DIR the modules go to DIR, so that a test can compare them with the committed ones.
What a method does is written once, in the asyncio client; `help(Client.submit)`, editors and the site show all of it.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent / "gradstream" / "client"
# Asyncio module, its class, blocking module, its class.
CLIENTS = (
    ("_async_client", "AsyncClient", "_client", "Client"),
    ("_async_fine_tuning_client", "AsyncFineTuningClient", "_fine_tuning_client", "FineTuningClient"),
)
HEAD = '''# Written by `make clients` from {source}.py: change that file, not this one.
"""{subject}: {name}, run on a thread of its own."""

'''
MADE = '''        # Raises on a bad address before there is a thread to stop.
        self._client = {name}({arguments})
        self._thread = LoopThread()

    @property
    def address(self) -> str:
        """The service's address, host:port."""
        return self._client.address

    def __enter__(self) -> {target}:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls, close the connection and stop the thread."""
        self._thread.close(self._client.close)
'''
WORDS = (
    ("Must be made, used and closed in one event loop.", "Callbacks run on its own thread. Any thread may use it."),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync((?:FineTuning)?Client|Iterator)\b", r"\1"),
)
"""What asyncio's words are here, in signatures and docstrings."""


def blocking(text: str) -> str:
    """A signature or docstring of an asyncio client as it is in the blocking one."""
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text)
    return text


def arguments_of(method: ast.AsyncFunctionDef | ast.FunctionDef) -> str:
    """A method's arguments, as it passes them on."""
    names = [argument.arg for argument in method.args.args if argument.arg != "self"]
    return ", ".join([*names, *(f"{argument.arg}={argument.arg}" for argument in method.args.kwonlyargs)])


def body_of(method: ast.AsyncFunctionDef | ast.FunctionDef, others: set[str]) -> str:
    """The call that a blocking method makes."""
    if isinstance(method, ast.FunctionDef):
        return f"        return self._client.{method.name}\n"
    call = f"self._client.{method.name}({arguments_of(method)})"
    if not ast.unparse(method.returns or ast.Constant(None)).startswith("AsyncIterator"):
        return f"        return self._thread.run({call})\n"
    pages = f"_{method.name}_pages"
    if pages in others:
        call = call.replace(f".{method.name}(", f".{pages}(", 1)
        return (
            "        # A page at a time: to change threads for every item would take longer than all the rest.\n"
            f"        for page in self._thread.iterate({call}):\n            yield from page\n"
        )
    return f"        return self._thread.iterate({call})\n"


def methods(source: str, kind: ast.ClassDef, name: str, target: str) -> Iterator[str]:
    """The class's parts, each with the comments above it."""
    lines = source.splitlines(keepends=True)
    defined = [node for node in kind.body if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)]
    names = {method.name for method in defined}
    begin = kind.lineno - 1
    for method in defined:
        first = method.body[0]
        is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        head = "".join(lines[begin : first.end_lineno if is_documented else first.lineno - 1])
        begin = method.end_lineno or begin
        if method.name == "__init__":
            yield blocking(head) + MADE.format(name=name, target=target, arguments=arguments_of(method))
        elif method.name.startswith("_") or method.name == "close":
            continue
        else:
            yield blocking(head) + body_of(method, names)


def module(source_name: str, name: str, target: str) -> str:
    """The text of a blocking client's module."""
    source = (ROOT / f"{source_name}.py").read_text("utf-8")
    tree = ast.parse(source)
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    named = [name, *(target.id for target in assigned if isinstance(target, ast.Name))]
    imports += [
        f"from gradstream.client.{source_name} import {', '.join(named)}",
        "from gradstream.client._loop_thread import LoopThread",
        "from collections.abc import Iterator",
    ]
    parts = methods(source, kind, name, target)
    subject = (ast.get_docstring(tree) or "").splitlines()[0].rstrip(".").replace("asyncio", "blocking")
    text = HEAD.format(source=source_name, subject=subject, name=name) + "\n".join(imports) + "\n\n\n" + "".join(parts)
    # What is imported and not used goes, and the lines are broken as everywhere.
    for command in (["check", "--select", "F401,F811,I", "--fix-only"], ["format"]):
        text = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--quiet", "--stdin-filename", ROOT / "_client.py", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="DIR", help="write the modules to DIR instead of beside their sources")
    options = parser.parse_args()
    for source_name, name, made, target in CLIENTS:
        (Path(options.check or ROOT) / f"{made}.py").write_text(module(source_name, name, target), "utf-8")
