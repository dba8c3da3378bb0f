"""What the tests of both demos know of their processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "transfuse.demo", "--tiny", "--plain"]


def processes_of(job: str) -> list[int]:
    """Live processes whose command line names a job."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if job.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def interrupt(command: list[str], log: Path, *, at_least: int) -> tuple[int, list[int]]:
    """Ctrl-C when so many processes of a demo run: its exit code, and what is left of it."""
    with log.open("wb") as output:
        demo = subprocess.Popen(command, stdout=output, stderr=output, bufsize=0)
    job = f'"job": "demo-{demo.pid}'
    try:
        deadline = time.monotonic() + 60
        while len(processes_of(job)) < at_least and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes_of(job)) >= at_least, log.read_text()
        demo.send_signal(signal.SIGINT)
        return demo.wait(60), processes_of(job)
    finally:
        demo.kill()
        demo.wait()
