"""The folder of results: whole files or none, and a clear word if there is no room."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_FREE_BYTES = 8 << 20  # a run writes 1 MiB at most; beside it go logs and rendezvous files


class ResultsError(RuntimeError):
    """A folder of the run cannot be written; the message names it and says why."""


def check_room(folder: Path) -> None:
    """ResultsError unless `folder`, made if need be, has room for what a run writes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = os.statvfs(folder)
    except OSError as error:
        raise ResultsError(f"{folder}: {error.strerror}") from error
    free = found.f_bavail * found.f_frsize
    if free < LEAST_FREE_BYTES:
        expected = f"expected at least {LEAST_FREE_BYTES >> 20} MiB"
        raise ResultsError(f"{folder}: the disk has {free >> 10} KiB free, {expected}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResultsError(f"{folder}: files cannot be made in this folder")


class Results:
    """Writes the files of one folder. A failure is a ResultsError and leaves no partial file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: str | bytes) -> None:
        """One file, in the place of one from an earlier run."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        data = content.encode() if isinstance(content, str) else content
        try:
            with part.open("wb") as file:
                file.write(data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ResultsError(f"{path} was not written: {error.strerror}") from error

    def draw(self, name: str, figure: Figure) -> None:
        """A picture."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=140)
        self.write(name, picture.getvalue())

    def names(self) -> list[str]:
        """What lies in the folder."""
        return sorted(path.name for path in self.folder.iterdir())
