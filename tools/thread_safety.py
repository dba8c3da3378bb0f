#!/usr/bin/env python3
"""Checks the syntax of every library source with clang, whose thread-safety analysis is an error.

Usage: thread_safety.py compile_commands.json JOBS. What sees gRPC is left out: its headers are not
annotated and take most of the time.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def check(entry: dict[str, str]) -> tuple[str, int, str]:
    """(file, exit code, diagnostics) of one entry of the compilation database."""
    words = shlex.split(entry["command"])
    words = words[1:] if Path(words[0]).name == "ccache" else words
    if "-o" in words:
        at = words.index("-o")
        del words[at : at + 2]
    words += ["-fsyntax-only", "-Wthread-safety", "-Werror=thread-safety"]
    done = subprocess.run(
        words, check=False, cwd=entry["directory"], capture_output=True, text=True
    )
    return entry["file"], done.returncode, done.stderr


def main(database: Path, jobs: int) -> int:
    """Exit code 1 if any file has a finding."""
    entries = [
        entry
        for entry in json.loads(database.read_text())
        if "/src/" in entry["file"] and "/src/rpc/" not in entry["file"]
    ]
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for file, code, text in pool.map(check, entries):
            if code != 0 or "warning:" in text:
                failed += 1
                sys.stderr.write(f"{file}:\n{text}\n")
    return 1 if failed or not entries else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
