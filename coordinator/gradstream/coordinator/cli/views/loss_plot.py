"""The picture of a job's losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def plot_losses(path: Path, title: str, training: Mapping[int, float], validation: Mapping[int, float]) -> None:
    """Write a PNG with the training loss of each step and the validation loss of each evaluated version, in nats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = sorted(training)
    axes.plot(steps, [training[step] for step in steps], linewidth=1, alpha=0.7, label="training loss")
    versions = sorted(validation)
    axes.plot(versions, [validation[version] for version in versions], marker="o", label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
