#!/usr/bin/env python3
"""Runs ctest and pytest, prints what failed and what was skipped and why, ends with one line."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Tally:
    """What a suite did: tests that passed, and the names of the others with their reason."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Counts another suite in."""
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def summary(self) -> str:
        """The one line that scripts read."""
        failed, skipped = len(self.failed), len(self.skipped)
        return f"{self.passed} passed, {failed} failed, {skipped} skipped"


def skip_reason(case: ElementTree.Element) -> str:
    """Why a test was skipped: what the test itself said, else what the runner says."""
    output = case.findtext("system-out") or ""
    if match := re.search(r"(?:Skipped|SKIPPED[^\n]*)\n(.+)", output):
        return match[1].strip()
    skipped = case.find("skipped")
    return (skipped.get("message") or "no reason given") if skipped is not None else ""


def read_junit(path: Path, suite: str, exit_code: int) -> Tally:
    """The outcome that a JUnit file records. A suite that left none, or had none, has failed."""
    if not path.exists():
        return Tally(failed=[f"{suite}: ended with {exit_code} and left no report"])
    tally = Tally()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{suite}: {case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            tally.failed.append(name)
        elif case.find("skipped") is not None or case.get("status") in {"notrun", "disabled"}:
            tally.skipped.append((name, skip_reason(case)))
        else:
            tally.passed += 1
    if exit_code != 0 and not tally.failed:
        tally.failed.append(f"{suite}: ended with {exit_code}, see its output")
    return tally


def run_ctest(build: Path, jobs: int, labels: str | None) -> Tally:
    """Every C++ test (and the rules of the house)."""
    report = build / "ctest.xml"
    report.unlink(missing_ok=True)
    command = ["ctest", "--test-dir", str(build), "--output-on-failure", f"-j{jobs}"]
    command += ["--no-tests=error", "--output-junit", str(report)]
    command += ["-L", labels] if labels else []
    environment = dict(os.environ, TSAN_OPTIONS=f"suppressions={ROOT / 'tools' / 'tsan.supp'}")
    result = subprocess.run(command, check=False, env=environment)
    return read_junit(report, "ctest", result.returncode)


def run_pytest(build: Path) -> Tally:
    """Every Python test, against the package of the build tree."""
    report = build / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}"]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", TRANSFUSE_BUILD=str(build))
    result = subprocess.run(command, check=False, cwd=ROOT, env=environment)
    return read_junit(report, "pytest", result.returncode)


def main() -> int:
    """Runs what was asked for; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "dev")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--labels", help="ctest labels only (a regular expression)")
    parser.add_argument("--no-python", action="store_true")
    options = parser.parse_args()
    build = options.build.resolve()

    tally = run_ctest(build, options.jobs, options.labels)
    if not options.no_python:
        tally.add(run_pytest(build))
    for name, reason in tally.skipped:
        sys.stdout.write(f"skipped  {name}: {reason}\n")
    for name in tally.failed:
        sys.stdout.write(f"FAILED   {name}\n")
    sys.stdout.write(tally.summary() + "\n")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
