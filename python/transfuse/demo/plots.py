"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = ("discover", "lease", "transfer", "verify", "commit")


def draw_loss(rows: Sequence[Mapping[str, Any]], killed_at: int, path: Path) -> None:
    """The loss over steps, with the moment at which the engine was killed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker=".")
    axes.axvline(killed_at, color="tab:red", linestyle="--", label="engine killed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title("Two FSDP2 trainers; every step is refitted into the engine")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def draw_phases(rows: Sequence[Mapping[str, Any]], killed_at: int, path: Path) -> None:
    """Where the time of every refit went, on a scale that fits the warm ones."""
    from matplotlib.figure import Figure

    refits = [row for row in rows if "phases_us" in row]
    steps = [row["step"] for row in refits]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(refits)
    for phase in PHASES:
        heights = [row["phases_us"][phase] / 1e3 for row in refits]
        axes.bar(steps, heights, bottom=below, label=phase, width=0.8)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    warm = sorted(height for row, height in zip(refits, below, strict=True) if not row["planned"])
    if warm:
        axes.set_ylim(0, 1.3 * warm[int(0.95 * (len(warm) - 1))])
    axes.axvline(killed_at, color="tab:red", linestyle="--", label="engine killed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("refit (ms; the tallest are cut off)")
    axes.set_title("Phases of every refit")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=140)
