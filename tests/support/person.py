"""A person at a terminal: runs commands on a pseudo-terminal of 80 columns, and remembers what they printed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

COLUMNS, LINES = 80, 24
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ "
BARS = re.compile(r"[━╸╺▁▂▃▄▅▆▇█]+")
DURATION = re.compile(r"\d+ (?:d|h|min) \d\d (?:h|min|s)\b")
QUANTITY = re.compile(r"\d(?:[\d,.:]*\d)?(?:e[-+]\d+)?(?: (?:ms|s|min|k|M|G|B|KiB|MiB|GiB)\b)?(?:/s)?")


class Person:
    """Runs commands in a directory. `aliases` maps what is true of this machine to what the docs say instead."""

    def __init__(self, directory: Path):
        self.directory = directory
        own = {"TERM": "dumb", "NO_COLOR": "1", "XDG_CONFIG_HOME": str(directory / "config")}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("GRADSTREAM_", "COLUMNS"))}
        self.environment = {**kept, **own}
        self.aliases = {str(directory): "/home/ann/tales"}
        self.transcript: list[tuple[str, str]] = []

    def gradstream(self, *arguments: str) -> str:
        """Run `gradstream …`; return what it printed on both streams."""
        return self._run("gradstream", [str(Path(sys.executable).with_name("gradstream")), *arguments])

    def python(self, *arguments: str) -> str:
        """Run `python …`; return what it printed on both streams."""
        return self._run("python", [sys.executable, *arguments])

    def _run(self, name: str, command: Sequence[str]) -> str:
        """Run a command whose program the transcript calls `name`. Raises AssertionError unless it ends with 0."""
        shown = " ".join([name, *(f'"{word}"' if " " in word else word for word in command[1:])])
        mine, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        process = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, cwd=self.directory, env=self.environment, start_new_session=True
        )
        os.close(its)
        printed = bytearray()
        try:
            while part := os.read(mine, 1 << 16):
                printed += part
        except OSError:  # Linux's way to say that the other end is closed.
            pass
        finally:
            os.close(mine)
            code = process.wait(30)
        text = screen(printed.decode())
        assert code == 0, f"`{shown}` ended with {code}:\n{text}"
        self.note(shown, text)
        return text

    def note(self, command: str, text: str = "") -> None:
        """Write a command and what it printed into the transcript."""
        for real, alias in self.aliases.items():
            command, text = command.replace(real, alias), text.replace(real, alias)
        self.transcript.append((command, text))


def screen(printed: str) -> str:
    """What stands on the screen: rewritten lines in their last form, without empty lines at both ends."""
    lines = [CONTROL_SEQUENCE.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]).rstrip() for line in printed.split("\n")]
    return "\n".join(lines).strip("\n")


# --- pages with transcripts -------------------------------------------------------------------------------------------


def blocks(page: str, language: str = "") -> list[str]:
    """The contents of a page's fenced blocks of a language."""
    return [content for found, content in BLOCK.findall(page) if found == language]


def sessions(page: str) -> Iterator[tuple[str, str]]:
    """Each command of a page's blocks without a language, and what it prints there."""
    for block in blocks(page):
        for part in f"\n{block}".split(f"\n{PROMPT}")[1:]:
            command, _, text = part.partition("\n")
            yield command, text.strip("\n")


def refreshed(page: str, transcript: Sequence[tuple[str, str]]) -> str:
    """The page with what its commands print in the transcript. Raises ValueError for a command that is not there.

    A command that occurs several times stands for its next occurrence each time.
    """
    left = list(transcript)

    def session(block: str) -> str:
        parts = f"\n{block}".split(f"\n{PROMPT}")
        for at, part in enumerate(parts[1:], 1):
            command = part.partition("\n")[0]
            places = [place for place, (each, _) in enumerate(left) if each == command]
            # A number in a command may follow from what another command said.
            places += [place for place, (each, _) in enumerate(left) if masked(each) == masked(command)]
            if not places:
                raise ValueError(f"'{command}' is not in the transcript after the command before it")
            command, text = left[places[0]]
            del left[: places[0] + 1]
            parts[at] = f"{command}\n{text}\n" if text else f"{command}\n"
        return f"\n{PROMPT}".join(part.rstrip("\n") for part in parts).removeprefix("\n") + "\n"

    def replaced(match: re.Match[str]) -> str:
        language, content = match[1], match[2]
        return f"```\n{session(content)}```" if not language and content.startswith(PROMPT) else match[0]

    return BLOCK.sub(replaced, page)


def masked(text: str) -> str:
    """A text with each quantity as '#' and lines joined, so that it is the same on every machine."""
    for pattern, mark in ((BARS, "▁"), (DURATION, "#"), (QUANTITY, "#")):
        text = pattern.sub(mark, text)
    return " ".join(text.split())
