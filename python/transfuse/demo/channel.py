"""Processes of the demo and the lines of JSON that they exchange; every wait has a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]
START_S = 180.0  # importing torch and transformers in several processes on a small machine
_END: Message = {"kind": "end"}


class ChildFailedError(RuntimeError):
    """A process of the demo ended, was silent, or said what must not be; the message says which."""


class Child:
    """One process: commands go to its stdin, answers come over a pipe, output into a log."""

    def __init__(self, name: str, module: str, *args: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        answers, answers_of_child = os.pipe()
        environment = dict(
            os.environ,
            GLOO_SOCKET_IFNAME="lo",
            OMP_NUM_THREADS="1",
            TOKENIZERS_PARALLELISM="false",
            PYTHONUNBUFFERED="1",
            TMPDIR=str(folder),  # torch leaves folders there; this one is removed with the run
            TRANSFUSE_DEMO_ANSWERS=str(answers_of_child),
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(answers_of_child,),
                start_new_session=True,  # Ctrl-C is for the one who stops them all
            )
        os.close(answers_of_child)
        self._answers: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._read, args=(answers,), daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, **message: Any) -> None:  # noqa: ANN401
        """A command; one to a process that is gone is found by the next expect()."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answers.put(_END)

    def expect(self, *kinds: str, timeout_s: float) -> Message:
        """The next answer, which must be of one of these kinds."""
        wanted = " or ".join(f"'{kind}'" for kind in kinds)
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ChildFailedError(
                self._say(f"gave no {wanted} within {timeout_s:.0f} s")
            ) from None
        if answer["kind"] not in kinds:
            raise ChildFailedError(self._say(f"gave {_shown(answer)} instead of {wanted}"))
        return answer

    def poll(self) -> Message | None:
        """An answer if there is one by now."""
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def peak_bytes(self) -> int:
        """The most memory that the process has held so far; 0 if it is gone."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except FileNotFoundError:
            return 0
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return int(lines.get("VmHWM", "0 kB").split()[0]) * 1024

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._process.kill()
        self._process.wait()

    def hang_up(self) -> None:
        """No more commands: the process ends by itself when it has seen that."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def stop(self, timeout_s: float) -> None:
        """Waits for the end of the process, then kills it."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _read(self, answers: int) -> None:
        with os.fdopen(answers, "rb") as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put(_END)

    def _say(self, what: str) -> str:
        code = self._process.poll()
        state = "is still running" if code is None else f"ended with {code}"
        tail = self.log.read_text(errors="replace")[-2000:].strip()
        return f"{self.name} {what}; it {state}\n{tail}"


def _shown(answer: Message) -> str:
    said = f": {answer['message']}" if "message" in answer else ""
    return f"'{answer['kind']}'{said}"


def answer(kind: str, **content: Any) -> None:  # noqa: ANN401
    """From within a child: an answer to the one who started it."""
    line = json.dumps({"kind": kind, **content}) + "\n"
    with os.fdopen(int(os.environ["TRANSFUSE_DEMO_ANSWERS"]), "wb", closefd=False) as pipe:
        pipe.write(line.encode())  # all of it, where os.write() may stop half-way


def commands() -> Iterator[Message]:
    """From within a child: commands, until the one who started it has none or is gone."""
    for line in sys.stdin:
        yield json.loads(line)
