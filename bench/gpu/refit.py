#!/usr/bin/env python3
"""Measures refits of Qwen3-4B and Qwen3-30B-A3B at full size between processes on GPUs.

    PYTHONPATH=build/dev/python python bench/gpu/refit.py [--model 4b] [--json FILE]

With two GPUs sources lie on the first and targets on the second, then all on the first; with one,
only that. Then a part of Qwen3-4B between the host and a GPU. Beside them, in the same run: copies
of one piece, CUDA IPC with copy_ for each tensor, NCCL broadcasts for each tensor and packed. Needs
torch and the package, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from refit_worker import serve

MODELS: dict[str, dict[str, object]] = {
    "4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "30b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
MATCHED = ("hf", "hf")
PAIRS = (
    MATCHED,
    ("vllm:tp=2", "vllm:tp=1"),
    ("vllm:tp=1", "vllm:tp=2"),
    ("fsdp:dp=2", "vllm:tp=2"),
    ("megatron:tp=2", "vllm:tp=2"),
)
CAST = ("fsdp:dp=2,dtype=f32", "vllm:tp=2")
ONE_PIECE_BYTES = 4 << 30
HOST_PIECE_BYTES = 1 << 30  # beside refits between the host and a GPU
HOST_LAYERS = 6  # of the model in these: 2 GB of Qwen3-4B, since filling the host takes seconds
HOST_REPETITIONS = 3
ANSWER_S = 120.0
SMALL_CYCLES = 1000


class Failed(Exception):
    """A worker could not do what it was told."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.trace = trace


class Process:
    """A worker from this side."""

    def __init__(self, name: str, job: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._commands, theirs = context.Pipe()
        self.name = name
        self._process = context.Process(target=serve, args=(name, job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: object, **options: object) -> None:
        """Begins a command."""
        try:
            self._commands.send((method, arguments, options))
        except BrokenPipeError:
            raise Failed("BrokenPipeError", f"{self.name} has ended", "") from None

    def answer(self) -> Any:  # noqa: ANN401  # whatever the command returns
        """Its end."""
        if not self._commands.poll(ANSWER_S):
            raise Failed("TimeoutError", f"{self.name} says nothing for {ANSWER_S} s", "")
        try:
            good, said = self._commands.recv()
        except EOFError:
            raise Failed("EOFError", f"{self.name} has ended", "") from None
        if not good:
            raise Failed(*said)
        return said

    def do(self, method: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401
        """Both."""
        self.ask(method, *arguments, **options)
        return self.answer()

    def end(self) -> None:
        """Waits, then kills."""
        self._commands.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def together(
    processes: Sequence[Process], method: str, *arguments: object, **options: object
) -> list[Any]:
    """The same command to all at once."""
    return each([(process, method, arguments) for process in processes], **options)


def each(
    commands: Sequence[tuple[Process, str, tuple[object, ...]]], **options: object
) -> list[Any]:
    """A command to each at once; all have answered before a failure is raised."""
    asked: list[Process] = []
    said: list[Any] = []
    failed: Failed | None = None
    for process, method, arguments in commands:
        try:
            process.ask(method, *arguments, **options)
            asked.append(process)
        except Failed as error:
            failed = failed or error
    for process in asked:
        try:
            said.append(process.answer())
        except Failed as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return said


class Route(NamedTuple):
    """Where sources and targets lie."""

    name: str
    source: str
    target: str
    arena: bool = False  # the sources' memory in the host is mapped by readers


class Bench:
    """All measurements of one model. `figures` grows."""

    def __init__(self, options: argparse.Namespace, model: str, crew: Sequence[Process]) -> None:
        self._options = options
        self._model = model
        self._config = json.dumps(MODELS[model])
        self._sources, self._targets = crew[:2], crew[2:]
        self._version = 0
        self._repetitions: int = options.repetitions
        self._goal = "T5"  # or T6, within one GPU
        self.figures: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def run(self, route: Route) -> None:
        """Every pair over one route, and beside the matched one what else there is."""
        self._goal = "T6" if route.name == "one GPU" else "T5"
        ceiling = self._ceiling(route)
        pairs = [*PAIRS, CAST] if self._model != "30b" else PAIRS
        plain: dict[bool, float] = {}  # GB/s that are read without a cast, by fingerprints
        for pair in pairs:
            workload = f"{self._model} {pair[0]} -> {pair[1]}, {route.name}"
            try:
                sources, targets = self._open(pair, route)
                read = self._pair(workload, sources, targets, ceiling)
                if pair == PAIRS[3]:
                    plain = read
                if pair == CAST:
                    for fingerprints, rate in read.items():
                        self._add("T7", workload, _named("cast / plain read", fingerprints),
                                  "ratio", [rate / plain[fingerprints]])  # fmt: skip
                if pair == MATCHED:
                    self._beside(workload, route, sources[0], targets[0])
                    self._modes(workload, route, sources[0], targets[0])
            except Failed as error:
                self._failed(workload, error)
            together([*self._sources, *self._targets], "free")

    def small(self, route: Route) -> None:
        """T11: many refits of a small model; what is held after some of them."""
        workload = f"tiny x {self._options.small_cycles}, {route.name}"
        config, self._config = self._config, json.dumps(MODELS["tiny"])
        try:
            sources, targets = self._open(PAIRS[3], route)
            together(sources, "open_publisher", len(sources))
            together(targets, "open_receiver", fingerprints=True)
            marks = {2, 100, self._options.small_cycles // 2, self._options.small_cycles}
            held, totals = {}, []
            for cycle in range(1, self._options.small_cycles + 1):
                totals.append(max(found["total"] for found in self._cycle(sources, targets)))
                if cycle in marks:
                    everybody = together([*sources, *targets], "held")
                    held[cycle] = dict(zip((p.name for p in [*sources, *targets]), everybody,
                                           strict=True))  # fmt: skip
            self._add("T11", workload, "warm refit", "ms", totals[1:], held=held)
            wrong = sum(self._wrong(sources, targets))
            self._add("T11", workload, "wrong tiles at the end", "count", [wrong])
        except Failed as error:
            self._failed(workload, error)
        finally:
            self._config = config
            together([*self._sources, *self._targets], "free")

    def host(self, gpu: str) -> None:
        """Between the host and a GPU, beside copies of one piece; then snapshots in the host."""
        self._goal = "host"
        self._repetitions = min(HOST_REPETITIONS, self._repetitions)
        config = json.loads(self._config)
        config["num_hidden_layers"] = min(HOST_LAYERS, config["num_hidden_layers"])
        whole, self._config = self._config, json.dumps(config)
        name = f"{self._model}, {config['num_hidden_layers']} layers"
        where = "host" if gpu == "cpu" else "GPU"  # without one the same is done within the host
        routes = (
            Route(f"{where} to host", gpu, "cpu"),
            Route(f"mapped host to {where}", "cpu", gpu, arena=True),
            Route(f"other host to {where}", "cpu", gpu),
        )
        ceilings = {route[1:3]: self._host_ceiling(route) for route in routes[:2]}
        for route in routes:
            workload = f"{name}, {route.name}"
            try:
                self._pair(workload, *self._open(MATCHED, route), ceilings[route[1:3]])
            except Failed as error:
                self._failed(workload, error)
            together([*self._sources, *self._targets], "free")
        try:
            self._host_snapshots(f"{name}, snapshots in the host", gpu, ceilings[gpu, "cpu"])
        except Failed as error:
            self._failed("snapshots in the host", error)
        together([*self._sources, *self._targets], "free")
        self._config, self._repetitions = whole, self._options.repetitions

    def _host_ceiling(self, route: Route) -> float:
        size = HOST_PIECE_BYTES if self._model != "tiny" else 64 << 20
        medians = {}
        for pinned, what in ((False, "pageable"), (True, "pinned")):
            rates: list[float] = self._targets[0].do(
                "copy_rate", route.source, route.target, size, self._repetitions, pinned=pinned
            )
            what = f"one cudaMemcpyAsync, {what} memory"
            self._add(self._goal, route.name, what, "GB/s", rates, bytes=size)
            medians[pinned] = statistics.median(rates)
        return medians[True]

    def _host_snapshots(self, workload: str, gpu: str, ceiling: float) -> None:
        """Weights on a GPU that are kept in the host, and read from there into the GPU."""
        sources, targets = self._open(MATCHED, Route("", gpu, gpu))
        sources[0].do("open_publisher", 1, "snapshot", 1, "host")
        targets[0].do("open_receiver", fingerprints=False)
        published, refits = [], []
        for _ in range(self._repetitions + 1):
            self._version += 1
            published.append(sources[0].do("publish", self._version))
            refits.append(targets[0].do("refit", self._version))
        size = refits[0]["bytes"]
        self._add(self._goal, workload, "publish", "ms", [p["publish"] for p in published[1:]])
        rates = [size / p["copy"] / 1e6 for p in published[1:]]
        self._add(self._goal, workload, "publish, copy", "GB/s", rates, bytes=size)
        self._add(self._goal, workload, "publish, copy / copy engine", "ratio",
                  [rate / ceiling for rate in rates])  # fmt: skip
        wrong = sum(self._wrong(sources, targets))
        if wrong:
            raise Failed("AssertionError", f"{wrong} tiles hold other values", "")
        self._phases(
            workload, "warm refit without fingerprints", [[r] for r in refits[1:]], ceiling
        )
        together([*sources, *targets], "close")

    def _ceiling(self, route: Route) -> float:
        size = ONE_PIECE_BYTES if self._model != "tiny" else 64 << 20
        rates: list[float] = self._targets[0].do(
            "copy_rate", route.source, route.target, size, self._repetitions
        )
        self._add(self._goal, route.name, "copy engine, one piece", "GB/s", rates, bytes=size)
        return statistics.median(rates)

    def _open(self, pair: tuple[str, str], route: Route) -> tuple[list[Process], list[Process]]:
        """Parameters of all ranks, the sources' with values."""
        sources, targets = (
            list(processes[: 2 if "=2" in spec else 1])
            for processes, spec in zip((self._sources, self._targets), pair, strict=True)
        )
        commands = [
            (process, "allocate", (self._config, spec, rank, place))
            for side, spec, place in (
                (sources, pair[0], route.source),
                (targets, pair[1], route.target),
            )
            for rank, process in enumerate(side)
        ]
        gpu = next((place for place in (route.source, route.target) if place != "cpu"), None)
        each(commands, flat=self._options.flat, device=gpu, arena=route.arena)
        together(sources, "fill", 1)
        return sources, targets

    def _pair(
        self, workload: str, sources: list[Process], targets: list[Process], ceiling: float
    ) -> dict[bool, float]:
        """First and warm refits; GB/s that were read, by whether with fingerprints."""
        opened = together(sources, "open_publisher", len(sources))
        self._add(self._goal, workload, "open a publisher", "ms", opened)
        read = {}
        rates = {}
        # A source that was asked for fingerprints once sums every version: first without them.
        for fingerprints in (False, True):
            opened = together(targets, "open_receiver", fingerprints=fingerprints)
            self._add(self._goal, workload, _named("open a receiver", fingerprints), "ms", opened)
            first = self._cycle(sources, targets)
            self._phases(workload, _named("first refit", fingerprints), [first], ceiling)
            warm = [self._cycle(sources, targets) for _ in range(self._repetitions)]
            rates[fingerprints] = self._phases(
                workload, _named("warm refit", fingerprints), warm, ceiling
            )
            wanted = sum(f["bytes"] for f in first) if fingerprints else 0
            if sum(f["verified_bytes"] for f in warm[-1]) != wanted:
                raise Failed("AssertionError", f"verified bytes are not {wanted}: {warm[-1]}", "")
            ratio = sum(f["source_bytes"] for f in first) / sum(f["bytes"] for f in first)
            read[fingerprints] = rates[fingerprints] * ratio
            wrong = 0 if fingerprints else sum(self._wrong(sources, targets))
            if wrong:
                raise Failed("AssertionError", f"{wrong} tiles hold other values", "")
            together(targets, "close")
        together(sources, "close")
        self._add(
            "T8", workload, "with fingerprints / without", "ratio", [rates[True] / rates[False]]
        )
        return read

    def _wrong(self, sources: list[Process], targets: list[Process]) -> list[int]:
        """Tiles that are wrong after a refit of other values than before."""
        seed = self._version + 2
        together(sources, "fill", seed)
        self._cycle(sources, targets)
        return together(targets, "check", seed)

    def _cycle(self, sources: list[Process], targets: list[Process]) -> list[dict[str, Any]]:
        self._version += 1
        together(sources, "publish", self._version)
        return together(targets, "refit", self._version)

    def _phases(
        self, workload: str, what: str, cycles: list[list[dict[str, Any]]], ceiling: float
    ) -> float:
        """Of the slowest target, and all bytes by its time; GB/s of the transfer, the median."""
        size = sum(found["bytes"] for found in cycles[0])
        detail = {"bytes": size, "targets": len(cycles[0]), "routes": cycles[0][0]["routes"]}

        def slowest(phase: str) -> list[float]:
            return [max(found[phase] for found in cycle) for cycle in cycles]

        for phase in ("total", "transfer", "verify", "discover", "lease"):
            self._add(self._goal, workload, f"{what}, {phase}", "ms", slowest(phase))
        rates: list[float] = [size / ms / 1e6 for ms in slowest("transfer")]
        self._add(self._goal, workload, f"{what}, transfer", "GB/s", rates, **detail)
        totals = [size / ms / 1e6 for ms in slowest("total")]
        self._add(self._goal, workload, f"{what}, total", "GB/s", totals)
        self._add(self._goal, workload, f"{what}, total / copy engine", "ratio",
                  [rate / ceiling for rate in totals])  # fmt: skip
        apart = [t - m for t, m in zip(slowest("total"), slowest("transfer"), strict=True)]
        self._add("T2", workload, f"{what}, all but the transfer", "ms", apart)
        return statistics.median(rates)

    def _beside(self, workload: str, route: Route, source: Process, target: Process) -> None:
        """What a user would pick instead, on the same parameters."""
        if route.source == "cpu":
            return
        count = 2 if self._model == "30b" else self._repetitions
        size = target.do("allocate", self._config, "hf", 0, route.target,
                         flat=self._options.flat)["bytes"]  # fmt: skip
        handles = source.do("lend")
        seconds = target.do("borrow_and_copy", handles, count)
        what = "CUDA IPC, copy_ for each tensor"
        self._add(self._goal, workload, f"{what}, with opening", "GB/s", [size / seconds[0] / 1e9])
        self._add(self._goal, workload, f"{what}, opened before", "GB/s",
                  [size / s / 1e9 for s in seconds[1:]])  # fmt: skip
        if route.source == route.target:
            return  # NCCL has no group of two processes on one GPU
        with tempfile.TemporaryDirectory() as folder:
            store = f"{folder}/store"
            each([(source, "join_nccl", (0, store)), (target, "join_nccl", (1, store))])
            for packed, what in ((False, "for each tensor"), (True, "packed through 1 GiB")):
                _, seconds = together((source, target), "broadcast", count, packed=packed)
                rates = [size / s / 1e9 for s in seconds]
                self._add(self._goal, workload, f"NCCL broadcast {what}", "GB/s", rates)
            together((source, target), "leave_nccl")

    def _modes(self, workload: str, route: Route, source: Process, target: Process) -> None:
        """Snapshots, shadows beside a device copy of as many bytes, and a product beside."""
        size = ONE_PIECE_BYTES if self._model != "tiny" else 64 << 20
        copied = target.do("copy_rate", route.target, route.target, size, self._repetitions)
        self._add("T14", workload, "device copy, one piece", "GB/s", copied)
        try:
            source.do("open_publisher", 1, "snapshot", 1)
            times = []
            for _ in range(self._repetitions + 1):
                self._version += 1
                times.append(source.do("publish", self._version)["copy"])
            self._add("T14", workload, "snapshot, copy", "ms", times[1:])
        except Failed as error:
            self._no_room(workload, "snapshot", error)
        source.do("close")
        source.do("open_publisher", 1)
        try:
            target.do("open_receiver", fingerprints=False, shadow=True)
            cycles = [self._cycle([source], [target])[0] for _ in range(self._repetitions + 1)]
            times = [cycle["commit"] for cycle in cycles[1:]]
            self._add("T14", workload, "shadow, commit", "ms", times)
            rates = [cycles[0]["bytes"] / ms / 1e6 for ms in times]
            median = statistics.median(copied)
            self._add("T14", workload, "shadow, commit / device copy", "ratio",
                      [rate / median for rate in rates])  # fmt: skip
            if route.target != "cpu":
                self._product(workload, source, target)
        except Failed as error:
            self._no_room(workload, "shadow", error)
        together((source, target), "close")

    def _product(self, workload: str, source: Process, target: Process) -> None:
        """A bf16 matrix product on the target's GPU, alone and while a version arrives."""
        alone = target.do("multiply", 1.0)
        self._add("effect", workload, "bf16 product alone", "TFLOP/s", [alone])
        limits = ((0.0, 0, "without a limit"), (0.0, 8, "of 8 multiprocessors"),
                  (0.0, 16, "of 16 multiprocessors"), (10.0, 0, "at 10 GB/s"))  # fmt: skip
        for rate, multiprocessors, words in limits:
            self._version += 1
            source.do("publish", self._version)
            found = target.do("multiply_beside", self._version, rate, multiprocessors)
            self._add("effect", workload, f"bf16 product beside a stage {words}", "TFLOP/s",
                      [found["tflops"]], stage_ms=found["stage_s"] * 1e3)  # fmt: skip

    def _no_room(self, workload: str, what: str, error: Failed) -> None:
        if error.kind != "ResourceExhaustedError":
            raise error
        sys.stderr.write(f"{workload}: no {what}: {error}\n")

    def _failed(self, workload: str, error: Failed) -> None:
        self.failures.append(f"{workload}: {error}")
        sys.stderr.write(f"FAILED {workload}: {error}\n{error.trace}\n")
        with contextlib.suppress(Failed):  # who is gone is found by the next command
            together([*self._sources, *self._targets], "close")

    def _add(
        self, target: str, workload: str, quantity: str, unit: str, values: Sequence[float],
        **detail: object,
    ) -> None:  # fmt: skip
        figure = {
            "target": target,
            "workload": workload,
            "quantity": quantity,
            "unit": unit,
            "min": min(values),
            "median": statistics.median(values),
            "max": max(values),
            "detail": detail,
        }
        self.figures.append(figure)
        if unit == "ms" and quantity.endswith(("transfer", "verify", "discover", "lease")):
            return  # for the file
        sys.stdout.write(
            f"{workload:42} {quantity:52} {figure['median']:10.4g} {unit:8}"
            f"{figure['min']:10.4g} to {figure['max']:.4g}\n"
        )
        sys.stdout.flush()


def _named(what: str, fingerprints: bool) -> str:
    return f"{what} {'with' if fingerprints else 'without'} fingerprints"


def routes_of(options: argparse.Namespace) -> list[Route]:
    """What this machine has."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return [Route("memory of the host", "cpu", "cpu")]
    routes = [Route("one GPU", "cuda:0", "cuda:0")]
    if count > 1:
        routes.insert(0, Route("two GPUs", "cuda:0", "cuda:1"))
    return [r for r in routes if options.route in ("all", r.name.split()[0])]


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """All models over all routes: figures and failures."""
    figures, failures = [], []
    for number, model in enumerate(options.models):
        job = f"bench-gpu-{os.getpid()}-{number}"
        crew = [Process(f"{side}{rank}", job) for side in ("source", "target") for rank in range(2)]
        bench = Bench(options, model, crew)
        try:
            routes = routes_of(options)
            for route in routes:
                bench.run(route)
            if options.route in ("all", "host") and model != "30b":
                bench.host("cuda:0" if torch.cuda.is_available() else "cpu")
            if number == 0 and routes:
                bench.small(routes[0])
        except Failed as error:  # a worker that is gone; what was found until then is kept
            bench.failures.append(f"{model}: {error}")
        finally:
            figures += bench.figures
            failures += bench.failures
            for process in crew:
                process.end()
    return figures, failures


def machine() -> str:
    """In words."""
    if not torch.cuda.is_available():
        return "no GPU"
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    said = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    return f"{said}, CUDA {torch.version.cuda}, torch {torch.__version__}, {os.cpu_count()} cores"


def main() -> int:
    """Measures; exit code 1 if anything could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--route", choices=("all", "one", "two", "host"), default="all",
                        help="GPUs; host: between it and one of them")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=7, help="warm refits of each kind")
    parser.add_argument("--small-cycles", type=int, default=SMALL_CYCLES)
    parser.add_argument("--flat", action="store_true", help="one buffer for each dtype")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    if not torch.cuda.is_available() and options.model != "tiny":
        sys.stderr.write("no CUDA device: only --model tiny can run, in memory of the host\n")
        return 2
    options.models = ["4b", "30b"] if options.model == "all" else [options.model]
    start = time.monotonic()
    figures, failures = measure(options)
    body = {
        "machine": machine(),
        "command": shlex.join(["python", *sys.argv]),
        "seconds": time.monotonic() - start,
        "failures": failures,
        "figures": figures,
    }
    if options.json:
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    sys.stdout.write(f"{len(figures)} figures, {len(failures)} failures, {body['seconds']:.0f} s\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
