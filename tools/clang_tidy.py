#!/usr/bin/env python3
"""Runs clang-tidy over the sources in parallel, and not again over what was clean before.

Clang's own warnings, thread-safety analysis among them, are part of its checks (see .clang-tidy).
A file counts as unchanged while it, every header of ours, the checks and its flags are unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("include", "src", "apps", "bench", "python")


def digest(*parts: bytes) -> str:
    """One name for a sequence of contents."""
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.hexdigest()


def commands(database: Path) -> dict[Path, str]:
    """The compile command of every source of ours that is not a test."""
    found = {}
    for entry in json.loads((database / "compile_commands.json").read_text()):
        path = Path(entry["file"])
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS:
            if not path.name.endswith("_test.cc"):
                found[path] = entry["command"]
    return found


def shared_state() -> str:
    """What every file depends on: the checks, and all headers of ours."""
    headers = sorted(h for folder in FOLDERS for h in (ROOT / folder).rglob("*.h"))
    checks = (ROOT / ".clang-tidy").read_bytes()
    return digest(checks, *(str(h).encode() + h.read_bytes() for h in headers))


def run(path: Path, database: Path, *, fix: bool) -> tuple[int, str]:
    """Exit code and findings of clang-tidy on one file."""
    command = ["clang-tidy-19", "-p", str(database), "--quiet", str(path)]
    command += ["--fix"] if fix else []
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    noise = ("warnings generated", "warning generated", "warnings treated", "warning treated")
    errors = [line for line in done.stderr.splitlines() if not any(n in line for n in noise)]
    return done.returncode, "\n".join([done.stdout.strip(), *errors]).strip()


def main() -> int:
    """Exit code 1 if any file has a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, default=ROOT / "build" / "lint")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fix", action="store_true", help="repair what can be, then format")
    parser.add_argument("files", nargs="*", type=Path, help="only these")
    options = parser.parse_args()

    known = commands(options.database)
    wanted = [file.resolve() for file in options.files] or sorted(known)
    shared = shared_state()
    marks = options.database / "clean"
    marks.mkdir(parents=True, exist_ok=True)

    def check(path: Path) -> tuple[Path, int, str]:
        flags = known.get(path, "").encode()
        mark = marks / digest(shared.encode(), str(path).encode(), path.read_bytes(), flags)
        if mark.exists() and not options.fix:
            return path, 0, ""
        code, text = run(path, options.database, fix=options.fix)
        if options.fix:
            subprocess.run(["clang-format-19", "-i", str(path)], check=True)
        elif code == 0:
            mark.touch()
        return path, code, text

    failed = 0
    # A fix edits headers too: one file at a time.
    with ThreadPoolExecutor(1 if options.fix else options.jobs) as pool:
        for _, code, text in pool.map(check, wanted):
            failed += code != 0
            if text:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    sys.stdout.write(f"clang-tidy: {failed} of {len(wanted)} files have findings\n")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
