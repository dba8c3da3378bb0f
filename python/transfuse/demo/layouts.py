"""The plan of a run, from the layouts that its processes have left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transfuse


def save_layout(folder: Path, name: str, layout: transfuse.Layout) -> None:
    """From within a child: what it holds."""
    (folder / f"{name}.layout").write_bytes(layout.encode())


def explain(folder: Path, sources: Sequence[str], targets: Sequence[str]) -> transfuse.Explanation:
    """The plans between the real layouts of the run."""

    def read(name: str) -> transfuse.Layout:
        return transfuse.Layout.decode((folder / f"{name}.layout").read_bytes())

    named = [(name, read(name)) for name in sources]
    layouts = [layout for _, layout in named]
    plans = [(name, transfuse.compile(read(name), layouts)) for name in targets]
    return transfuse.explain(plans, named)
