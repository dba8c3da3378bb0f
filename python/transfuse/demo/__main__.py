"""Command line of the demos."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from transfuse.demo.channel import ChildFailedError
from transfuse.demo.results import ResultsError, check_room
from transfuse.errors import TransfuseError, UnsupportedError

EXIT_FAILED, EXIT_USAGE, EXIT_MISSING, EXIT_INTERRUPTED = 1, 2, 3, 130
NEEDED = ("torch", "transformers", "matplotlib")
TRAINERS = {"fsdp:dp=2": (), "megatron:tp=2": ("megatron.core",)}  # and what each needs besides

EPILOG = """examples:
  transfuse demo                       the whole run, results in ./demo-out
  transfuse demo --tiny --out /tmp/x   a run of seconds, too short to learn anything
  transfuse demo --trainer megatron:tp=2   Megatron-Core trains (pip install megatron-core)
  transfuse demo --device cuda         models on the GPUs of this machine, dealt in turn
  transfuse demo --engine captured     the engine's layout learned from its own load_weights
  transfuse demo --pretrain            pre-training on real text instead
  transfuse demo --pretrain --text README.md --steps 200

exit codes: 0 the reward is there, and the control run shows that it needs the refits (--pretrain:
the engine's logits are those of the trainers, bit for bit); 1 that is not so, a process failed, or
results could not be written; 2 wrong usage; 3 a package or a GPU is missing; 130 interrupted"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="transfuse demo",
        description="Reinforcement learning on this machine: an engine of two ranks answers, two "
        "FSDP2 trainers learn from the answers, and every version that they publish goes into the "
        "engine while it serves. Half-way a rank of the engine is killed and comes back; later a "
        "trainer is stopped for seconds. Then the same once more without refits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1, help="of weights, data and samples")
    parser.add_argument(
        "--trainer", choices=TRAINERS, default="fsdp:dp=2", help="what trains (default: fsdp:dp=2)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where models lie (default: cpu)"
    )
    parser.add_argument("--tiny", action="store_true", help="small model, few steps")
    parser.add_argument("--plain", action="store_true", help="no colours, no progress bar")
    parser.add_argument(
        "--engine",
        choices=("formula", "captured"),
        default="formula",
        help="where its layout comes from: the vllm spec, or a capture of its own load_weights",
    )
    parser.add_argument(
        "--pretrain", action="store_true", help="pre-training into one inference process instead"
    )
    parser.add_argument(
        "--text", type=Path, help="with --pretrain: file or folder to train on (default: the GPL)"
    )
    options = parser.parse_args(arguments)
    if options.text is not None and not options.pretrain:
        parser.error("--text: only with --pretrain; the RL demo makes its own task")
    if options.pretrain and options.trainer != "fsdp:dp=2":
        parser.error("--trainer: only without --pretrain, which has FSDP2 trainers")
    if options.engine != "formula" and options.pretrain:
        parser.error("--engine: the engine of --pretrain is a module, whose layout is its own")
    if options.device != "cpu" and options.trainer != "fsdp:dp=2":
        parser.error("--device: the Megatron-Core trainers of the demo run on CPUs")
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps: expected at least 2, found {options.steps}")
    return options


def is_there(module: str) -> bool:
    """Whether a module can be imported, without doing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # not even its package


def run(options: argparse.Namespace) -> int:
    """Runs the demo that was asked for in a folder of its own, which is gone afterwards."""
    check_room(options.out)
    with tempfile.TemporaryDirectory(prefix="transfuse-demo-") as folder:
        check_room(Path(folder))
        os.environ["XDG_RUNTIME_DIR"] = folder  # sockets of the run lie with its other files
        if options.pretrain:
            from transfuse.demo.pretrain.command import demo
        else:
            from transfuse.demo.rl.command import demo
        try:
            good = demo(options, f"demo-{os.getpid()}", folder)
        except ChildFailedError:
            check_room(Path(folder))  # a process that could not write could not say so either
            raise
    return 0 if good else EXIT_FAILED


def main() -> int:
    """Exit code of the demo."""
    options = parse(sys.argv[1:])
    missing = [name for name in (*NEEDED, *TRAINERS[options.trainer]) if not is_there(name)]
    if missing:
        packages = ", ".join(missing).replace("megatron.core", "megatron-core")
        sys.stderr.write(
            f"transfuse demo needs {packages}: pip install {packages.replace(',', '')}, or "
            "`make demo` in the repository\n"
        )
        return EXIT_MISSING
    try:
        from transfuse.demo import devices

        devices.check(options.device)
    except UnsupportedError as error:
        sys.stderr.write(f"transfuse demo --device {options.device}: {error}\n")
        return EXIT_MISSING
    try:
        return run(options)
    except (ChildFailedError, ResultsError, TransfuseError, OSError) as error:
        sys.stderr.write(f"the demo failed: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; every process was stopped\n")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
