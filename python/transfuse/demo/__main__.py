"""Command line of the demo."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from transfuse.demo.channel import ChildFailedError
from transfuse.demo.run import Run, write_results
from transfuse.demo.screen import Screen, open_screen
from transfuse.demo.settings import Settings, tiny

EXIT_FAILED, EXIT_USAGE, EXIT_MISSING, EXIT_INTERRUPTED = 1, 2, 3, 130
NEEDED = ("torch", "transformers", "matplotlib")

EPILOG = """examples:
  transfuse demo                       the whole run, results in ./demo-out
  transfuse demo --steps 120           train for longer
  transfuse demo --text README.md      train on your own text
  transfuse demo --tiny --out /tmp/x   a run of seconds

exit codes: 0 the engine's logits are those of the trainers, bit for bit; 1 they are not, or a
process failed; 2 wrong usage; 3 a package is missing; 130 interrupted"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="transfuse demo",
        description="Two FSDP2 trainers train a small Qwen3 model on this machine; after every "
        "optimizer step an inference process gets the weights, cast to bf16, in place. Half-way "
        "the inference process is killed and comes back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default {Settings.steps})")
    parser.add_argument("--text", type=Path, help="file or folder to train on (default: the GPL)")
    parser.add_argument("--tiny", action="store_true", help="small model, few steps")
    parser.add_argument("--plain", action="store_true", help="no colours, no progress bar")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps: expected at least 2, found {options.steps}")
    return options


def settings_of(options: argparse.Namespace, folder: str) -> Settings:
    """Settings of the run that was asked for."""
    text = str(options.text.resolve()) if options.text else ""
    settings = Settings(job=f"demo-{os.getpid()}", folder=folder, text=text)
    if options.tiny:
        settings = tiny(settings)
    if options.steps is not None:
        settings = dataclasses.replace(settings, steps=options.steps)
    return settings


def conclude(verdict: dict[str, Any], report: dict[str, Any], out: Path, screen: Screen) -> bool:
    """The statement at the end."""
    version = verdict["version"]
    equal: bool = (
        verdict["logits_equal"]
        and verdict["parameters_equal"] == verdict["parameters_compared"]
        and verdict["logits_of_other_weights_differ"] > 0
    )
    screen.say(
        f"version {version}: {verdict['logits_differing']} of {verdict['logits_compared']} logits "
        f"differ; {verdict['parameters_equal']} of {verdict['parameters_compared']} parameters are "
        "equal, bit for bit"
    )
    if equal:
        screen.say(
            f"The engine's logits of version {version} equal, bit for bit, those of the trainers' "
            "parameters gathered and cast independently."
        )
    else:
        screen.say("THE ENGINE DOES NOT HOLD THE TRAINERS' PARAMETERS. See report.json.")
    if report["warm_refit_ms_median"] is not None:
        screen.say(
            f"median warm refit: {report['warm_refit_ms_median']:.2f} ms, its transfer at "
            f"{report['share_of_memcpy_median']:.0%} of memcpy; peak memory of all processes "
            f"{sum(report['peak_bytes'].values()) / 2**30:.1f} GiB; {report['seconds']:.0f} s"
        )
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    screen.say(f"results in {out}: {names}")
    return equal


def demo(options: argparse.Namespace) -> int:
    """Runs and cleans up."""
    with tempfile.TemporaryDirectory(prefix="transfuse-demo-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # sockets of the run lie with its other files
        settings = settings_of(options, folder)
        screen = open_screen(settings.steps, plain=options.plain)
        run = Run(settings, screen)
        finished = False
        try:
            screen.title("starting two trainers and an inference process")
            run.open()
            run.train()
            verdict = run.judge()
            screen.say(f"fingerprints: {run.verify()}")
            report = write_results(run, verdict, options.out)
            equal = conclude(verdict, report, options.out, screen)
            finished = True
        finally:
            screen.close()
            run.stop(at_once=not finished)
    return 0 if equal else EXIT_FAILED


def main() -> int:
    """Exit code of the demo."""
    options = parse(sys.argv[1:])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"transfuse demo needs {', '.join(missing)}: pip install {' '.join(missing)}, or "
            "`make demo` in the repository\n"
        )
        return EXIT_MISSING
    try:
        return demo(options)
    except ChildFailedError as error:
        sys.stderr.write(f"the demo failed: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; every process was stopped\n")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
