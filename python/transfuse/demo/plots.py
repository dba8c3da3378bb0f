"""What the pictures of both demos share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = ("discover", "lease", "transfer", "verify", "decide", "commit")
_COLOURS = ("tab:red", "tab:purple", "tab:brown")


def new_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    """One picture over optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(visible=True, axis="y", alpha=0.3)
    return figure, axes


def mark(axes: Axes, marks: Mapping[str, int]) -> None:
    """Vertical lines: what happened, and at which step."""
    for (what, step), colour in zip(marks.items(), _COLOURS, strict=False):
        axes.axvline(step, color=colour, linestyle="--", label=what)


def draw_phases(refits: Sequence[Mapping[str, Any]], marks: Mapping[str, int]) -> Figure:
    """Where the time of every refit went, on a scale that fits those that did not plan.

    A refit has `step`, `phases_us` and `planned`.
    """
    figure, axes = new_figure("Phases of every refit", "refit (ms; the tallest are cut off)")
    steps = [refit["step"] for refit in refits]
    below = [0.0] * len(refits)
    for phase in PHASES:
        heights = [refit["phases_us"][phase] / 1e3 for refit in refits]
        axes.bar(steps, heights, bottom=below, label=phase, width=0.8)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    warm = sorted(total for r, total in zip(refits, below, strict=True) if not r["planned"])
    if warm:
        axes.set_ylim(0, 1.3 * warm[int(0.95 * (len(warm) - 1))])
    mark(axes, marks)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
