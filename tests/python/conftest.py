"""What several test files use."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# A shell that starts a job in the background has it ignore SIGINT, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Children:
    """Processes of one test: all of them are gone when it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, script: str, *args: object, env: Mapping[str, str] = {}) -> subprocess.Popen:
        """Runs a script of this folder; its output goes to a file."""
        log = self._folder / f"{Path(script).stem}-{len(self._running)}.log"
        command = [sys.executable, str(HERE / script), *map(str, args)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", **env),
            )
        self._running.append((process, log))
        return process

    def join(self, timeout_s: float = 240) -> None:
        """Waits for all; fails with the output of the first that did not end with 0."""
        deadline = time.monotonic() + timeout_s
        for process, log in self._running:
            try:
                code = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                pytest.fail(f"{log.stem} ended with {code}:\n{log.read_text()[-4000:]}")

    def output(self, process: subprocess.Popen) -> str:
        """What a process has written so far."""
        return next(log for p, log in self._running if p is process).read_text()

    def kill(self) -> None:
        """SIGKILL to whatever still runs."""
        for process, _ in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    started = Children(tmp_path)
    yield started
    started.kill()


@pytest.fixture(scope="module")
def module_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    started = Children(tmp_path_factory.mktemp("logs"))
    yield started
    started.kill()


def _execute(plan, sources: Sequence[tuple], target: Mapping) -> None:
    """Carries a plan out element by element with torch views; sources are (layout, parameters)."""
    layouts = plan.source_layouts
    memory = {layout.digest: (layout, parameters) for layout, parameters in sources}
    names = [parameter.name for parameter in plan.target.parameters]
    for run in plan.runs:
        holder = plan.holders_of(run)[0]
        layout, parameters = memory[layouts[holder.source_layout].digest]
        source = parameters[layout.parameters[holder.parameter].name]
        taken = source.as_strided(
            run.count, plan.pattern(holder.source_pattern), holder.source_offset
        )
        into = target[names[run.parameter]]
        view = into.as_strided(run.count, plan.pattern(run.target_pattern), run.target_offset)
        view.copy_(taken)


@pytest.fixture(scope="session")
def execute() -> Callable[..., None]:
    return _execute


@pytest.fixture
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job name that nobody else on this machine uses."""
    return f"test-{os.getpid()}-{next(_jobs)}"


_jobs = itertools.count()
