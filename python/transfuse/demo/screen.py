"""What a person sees: colours and a progress bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

_PHASES = ("discover", "lease", "transfer", "verify", "commit")
LEGEND = (
    "refit times in ms; memcpy: share of what memcpy reaches at the same moment; check: the\n"
    "fingerprints of every byte that arrived against those of the trainers"
)
HEADER = (
    "step   loss  ver  total discov lease transfer verify commit  GB/s memcpy  check"  # 79 columns
)


class Screen(Protocol):
    """Where the run is told."""

    def say(self, text: str) -> None:
        """A remark."""

    def title(self, text: str) -> None:
        """A part of the run begins."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A step and its refit."""

    def sample(self, version: int, text: str) -> None:
        """Text that the engine has written."""

    def close(self) -> None:
        """The run is over."""


def format_row(row: Mapping[str, Any]) -> str:
    """One line per step under HEADER."""
    begin = f"{row['step']:4d}{row['loss']:7.3f}"
    if "phases_us" not in row:
        return f"{begin}{row['published']:5d}  {row['note']}"
    ms = {name: row["phases_us"][name] / 1e3 for name in (*_PHASES, "total")}
    widths = zip(_PHASES, (7, 6, 9, 7, 7), strict=True)
    phases = "".join(f"{ms[name]:{width}.2f}" for name, width in widths)
    share = row["gbps"] / row["memcpy_gbps"]
    check = "equal" if row["verified"] else "NONE"
    rate = f"{row['gbps']:6.2f}{share:7.0%}"
    return f"{begin}{row['version']:5d}{ms['total']:7.2f}{phases}{rate}  {check}"


class PlainScreen:
    """Lines of text."""

    def say(self, text: str) -> None:
        """See Screen."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        """See Screen."""
        self.say(f"\n== {text}")

    def row(self, row: Mapping[str, Any]) -> None:
        """See Screen."""
        self.say(format_row(row))

    def sample(self, version: int, text: str) -> None:
        """See Screen."""
        body = "\n".join(f"    | {line}" for line in text.splitlines())
        self.say(f"    the engine writes, from version {version}:\n{body}")

    def close(self) -> None:
        """See Screen."""


class RichScreen:
    """A terminal: colours, and a bar that shows how far the run is."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=steps)
        self._progress.start()

    def say(self, text: str) -> None:
        """See Screen."""
        self._console.print(text, markup=False, soft_wrap=True)

    def title(self, text: str) -> None:
        """See Screen."""
        self._console.print()
        self._console.print(text, style="bold cyan", markup=False, soft_wrap=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """See Screen."""
        good = row.get("verified", True)
        style = "" if good and "phases_us" in row else ("yellow" if good else "bold red")
        self._console.print(format_row(row), style=style, markup=False, soft_wrap=True)
        self._progress.update(self._task, completed=row["step"])

    def sample(self, version: int, text: str) -> None:
        """See Screen."""
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(f"      version {version} writes", style="dim")
        self._console.print(Padding(Text(text, style="green"), (0, 6)))

    def close(self) -> None:
        """See Screen."""
        self._progress.stop()


def open_screen(steps: int, *, plain: bool) -> Screen:
    """Rich in a terminal that has it, else plain."""
    if plain or not sys.stdout.isatty():
        return PlainScreen()
    try:
        return RichScreen(steps)
    except ImportError:
        return PlainScreen()
