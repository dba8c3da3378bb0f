"""All processes of one run: started, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import transfuse
from transfuse.demo.channel import Child


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C within the body is raised at its end: what it starts is known by then."""
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


class Crew:
    """The children of one run by name; stop() ends them all, whatever state they are in."""

    def __init__(self, job: str, folder: Path) -> None:
        self.peak_bytes: dict[str, int] = {}  # the most memory that each has held
        self._job = job
        self._folder = folder
        self._children: dict[str, Child] = {}
        self._control: transfuse.Control | None = None

    @property
    def control(self) -> transfuse.Control:
        """The view of the job from outside. Not to be kept: it keeps a coordinator alive."""
        if self._control is None:
            self._control = transfuse.Control(job=self._job)
        return self._control

    def start(self, name: str, module: str, *args: str) -> Child:
        """A new process, in the place of one of this name that has ended."""
        with _interrupted_afterwards():
            child = Child(name, module, *args, folder=self._folder)
            self._children[name] = child
        return child

    def kill(self, child: Child) -> None:
        """SIGKILL, at once."""
        self.note_peaks()
        child.kill()

    def note_peaks(self) -> None:
        """Looks at the memory of every process."""
        for name, child in self._children.items():
            self.peak_bytes[name] = max(child.peak_bytes(), self.peak_bytes.get(name, 0))

    def stop(self, *, at_once: bool) -> None:
        """Ends every process and the coordinator, `at_once` without waiting for good manners."""
        self.note_peaks()
        for child in self._children.values():
            child.hang_up()
        deadline = time.monotonic() + (1.0 if at_once else 15.0)
        for child in self._children.values():
            child.stop(max(0.0, deadline - time.monotonic()))
        self._children = {}
        self._control = None
        _stop_coordinator(self._job)


def _stop_coordinator(job: str) -> None:
    """The processes of the run have started one; it would end by itself, but later."""
    try:
        pid = transfuse.find_coordinator(job).pid
        os.kill(pid, signal.SIGTERM)
    except (transfuse.NotFoundError, transfuse.UnavailableError, ProcessLookupError):
        return  # none was started, or it is gone
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
