#!/usr/bin/env python3
"""Runs every measurement of this host and writes bench/results/latest.json and latest.md.

`transfuse bench` measures Transfuse beside memcpy; by_hand.py measures what a user would do without
it, on the same shapes. Arguments after -- go to `transfuse bench`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run_json(command: list[str]) -> Any:  # noqa: ANN401  # whatever the program says
    """The JSON that a program prints; its table goes on to the terminal. Ends if it fails."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def table(body: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    run = body["run"]
    lines = [
        f"{run['processor']}, {run['cores']} cores, {run['kernel']}, {run['architecture']}; "
        f"{run['repetitions']} repetitions; transfuse {run['version']}",
        "",
        "| | workload | quantity | min | median | max | unit |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['target']} | {f['workload']} | {f['quantity']} | {f['min']:.4g} | "
        f"{f['median']:.4g} | {f['max']:.4g} | {f['unit']} |"
        for f in body["figures"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures, writes both files, prints where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "dev")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--by-hand-layers", type=int, default=4, help="0: leave by_hand.py out")
    parser.add_argument("rest", nargs="*", help="arguments of `transfuse bench`")
    options = parser.parse_args()

    program = options.build.resolve() / "bin" / "transfuse"
    body = run_json([str(program), "bench", "--json", *options.rest])
    if options.by_hand_layers > 0:
        layers = str(options.by_hand_layers)
        body["figures"] += run_json([sys.executable, str(HERE / "by_hand.py"), "--layers", layers])
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "latest.json").write_text(json.dumps(body, indent=1) + "\n")
    (options.results / "latest.md").write_text(table(body))
    sys.stdout.write(table(body))
    sys.stdout.write(f"\nwritten to {options.results}/latest.json and latest.md\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
