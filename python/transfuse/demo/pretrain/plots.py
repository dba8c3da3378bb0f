"""The picture of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transfuse.demo.plots import mark, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_loss(rows: Sequence[Mapping[str, Any]], marks: Mapping[str, int]) -> Figure:
    """The loss over steps, with the moment at which the engine was killed."""
    title = "Two FSDP2 trainers; every step is refitted into the engine"
    figure, axes = new_figure(title, "training loss (nats per token)")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker=".")
    mark(axes, marks)
    axes.legend()
    return figure
