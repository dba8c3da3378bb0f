"""Pictures of both runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transfuse.demo.plots import mark, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def draw_reward(live: Rows, control: Rows, marks: Mapping[str, int]) -> Figure:
    """The reward of every rollout, with refits and without."""
    title = "Reward: the same trainers, the same seeds, with refits and without"
    figure, axes = new_figure(title, "digits in place (share)")
    for rows, label in ((live, "with refits"), (control, "never refitted")):
        axes.plot([r["step"] for r in rows], [r["reward"] for r in rows], marker=".", label=label)
    axes.set_ylim(0, 1)
    mark(axes, marks)
    axes.legend()
    return figure


def draw_pauses(refits: Sequence[Mapping[str, Any]], marks: Mapping[str, int]) -> Figure:
    """How long the engine and the trainers stood still for every version."""
    figure, axes = new_figure("What nobody could do anything else in", "ms")
    steps = [refit["step"] for refit in refits]
    axes.plot(steps, [r["pause_ms"] for r in refits], marker=".", label="engine: commit")
    axes.plot(steps, [r["publish_ms"] for r in refits], marker=".", label="trainer: snapshot")
    axes.set_yscale("log")
    mark(axes, marks)
    axes.legend()
    return figure
