"""What a person sees: colours and a progress bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Protocol


class Mood(Enum):
    """How something said is to be taken."""

    GOOD = ""
    NOTE = "yellow"
    BAD = "bold red"


class Screen(Protocol):
    """Where the run is told."""

    def say(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """A remark."""

    def title(self, text: str) -> None:
        """A part of the run begins."""

    def row(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """One step more, on one line."""

    def sample(self, title: str, text: str) -> None:
        """Text that the engine has written."""

    def close(self) -> None:
        """The run is over."""


class PlainScreen:
    """Lines of text."""

    def say(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """See Screen."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        """See Screen."""
        self.say(f"\n== {text}")

    def row(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """See Screen."""
        self.say(text, mood)

    def sample(self, title: str, text: str) -> None:
        """See Screen."""
        body = "\n".join(f"    | {line}" for line in text.splitlines())
        self.say(f"    {title}:\n{body}")

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

    def say(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """See Screen."""
        self._console.print(text, style=mood.value, markup=False, soft_wrap=True)

    def title(self, text: str) -> None:
        """See Screen."""
        self._console.print()
        self._console.print(text, style="bold cyan", markup=False, soft_wrap=True)

    def row(self, text: str, mood: Mood = Mood.GOOD) -> None:
        """See Screen."""
        self.say(text, mood)
        self._progress.advance(self._task)

    def sample(self, title: str, text: str) -> None:
        """See Screen."""
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(f"      {title}", style="dim", markup=False)
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
