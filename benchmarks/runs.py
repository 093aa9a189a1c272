"""Trainings that a benchmark has made, kept in a file, so that a later call resumes from them. No benchmark itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """The result of one training: validation losses in nats by step, and the bytes of a slot and step each way."""

    losses: dict[int, float]
    pushed_bytes: float = 0.0
    pulled_bytes: float = 0.0

    @property
    def first(self) -> float:
        return self.losses[min(self.losses)]

    @property
    def last(self) -> float:
        return self.losses[max(self.losses)]


class Runs:
    """The runs made so far, by (name, seed). If a file is given it keeps them, and a later call resumes from it.

    Runs in the file with other settings than the current ones are ignored.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._runs: dict[tuple[str, int], Run] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []:
            entry = json.loads(line)
            if entry["settings"] == self._settings:
                losses = {int(step): loss for step, loss in entry["losses"].items()}
                run = Run(losses, entry["pushed_bytes"], entry.get("pulled_bytes", 0.0))
                self._runs[entry["name"], entry["seed"]] = run

    def get(self, name: str, seed: int) -> Run | None:
        return self._runs.get((name, seed))

    def __getitem__(self, key: tuple[str, int]) -> Run:
        return self._runs[key]

    def add(self, name: str, seed: int, run: Run) -> None:
        self._runs[name, seed] = run
        if self._path:
            entry = {"name": name, "seed": seed, **asdict(run), "settings": self._settings}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
