"""Processes that do what a test tells them: a command a line, answered by one line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER_S = 120.0


class FailedError(Exception):
    """A command raised: `kind` is the class, the text what it said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Commanded:
    """A script of this folder, seen from the test. It has its options when it starts."""

    def __init__(
        self, script: str, options: Mapping[str, object], *, env: Mapping[str, str] | None = None
    ) -> None:
        self._script = script
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, **(env or {})),
            bufsize=0,  # what has been read of a line is all that select() does not see
        )

    def send(self, do: str, **arguments: object) -> None:
        """Begins a command."""
        line = json.dumps({"do": do, "arguments": arguments}) + "\n"
        self.process.stdin.write(line.encode())

    def said(self) -> Any:  # noqa: ANN401  # whatever the command returns
        """Its end."""
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            message = f"{self._script} said nothing for {ANSWER_S} s"
            raise TimeoutError(message)
        line = self.process.stdout.readline()
        assert line, f"{self._script} ended with {self.process.wait()}; its stderr says why"
        said = json.loads(line)
        if "failed" in said:
            raise FailedError(*said["failed"])
        return said["done"]

    def does(self, do: str, **arguments: object) -> Any:  # noqa: ANN401
        """Both."""
        self.send(do, **arguments)
        return self.said()

    def end(self) -> None:
        """Waits, then kills."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def obey(open_worker: Callable[[dict[str, Any]], Any]) -> None:
    """The other end: opens what obeys, says so, and calls its methods until the end of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that writes to stdout does not answer for it
    worker = open_worker(json.loads(sys.argv[1]))

    def answer(**words: object) -> None:
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    answer(done={})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            said = getattr(worker, command["do"])(**command["arguments"])
        except Exception as error:  # noqa: BLE001  # the test raises it again
            answer(failed=[type(error).__name__, str(error)])
        else:
            answer(done=said)
