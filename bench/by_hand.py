#!/usr/bin/env python3
"""Measures what a user would do by hand: gather, then torch.save to /dev/shm, or a gloo broadcast.

Two trainer processes hold FSDP-style halves (dim 0) of Qwen3-4B shapes with fewer layers, one
engine process holds them whole. Prints figures as JSON, in the form of `transfuse bench --json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TRAINERS = [0, 1]
ENGINE = 2
HIDDEN, INTERMEDIATE, QUERY, KEY, HEAD, VOCABULARY = 2560, 9728, 4096, 1024, 128, 151936


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published Qwen3-4B checkpoint, cut to `layers`."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (QUERY, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KEY, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KEY, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, QUERY)
        yield prefix + "self_attn.q_norm.weight", (HEAD,)
        yield prefix + "self_attn.k_norm.weight", (HEAD,)
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


class Rank:
    """One of the three processes: its tensors, and the two ways of a refit."""

    def __init__(self, rank: int, layers: int, folder: str) -> None:
        meeting = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3)
        self.rank = rank
        self.trainers = dist.new_group(TRAINERS)
        self.from_first = dist.new_group([0, ENGINE])
        self.folder = folder
        self.tensors = {}
        torch.manual_seed(rank)
        for name, shape in shapes(layers):
            rows = shape[0] if rank == ENGINE else shape[0] // len(TRAINERS)
            self.tensors[name] = torch.ones(rows, *shape[1:], dtype=torch.bfloat16) * (rank + 1)

    def gathered(self, name: str) -> torch.Tensor | None:
        """The whole tensor on trainer 0, as every trainer calls it; None on the others."""
        part = self.tensors[name]
        if self.rank != 0:
            dist.gather(part.view(torch.uint8), None, 0, group=self.trainers)
            return None
        whole = torch.empty(part.shape[0] * 2, *part.shape[1:], dtype=part.dtype)
        parts = [chunk.view(torch.uint8) for chunk in whole.chunk(2)]
        dist.gather(part.view(torch.uint8), parts, 0, group=self.trainers)
        return whole

    def by_file(self) -> None:
        """Gather everything, torch.save to memory, torch.load, copy into the parameters."""
        path = f"{self.folder}/weights.pt"
        if self.rank in TRAINERS:
            whole = {name: self.gathered(name) for name in self.tensors}
            if self.rank == 0:
                torch.save(whole, path)
        dist.barrier()
        if self.rank == ENGINE:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            for name, tensor in self.tensors.items():
                tensor.copy_(loaded[name])
            os.unlink(path)

    def by_broadcast(self) -> None:
        """Gather one tensor after the other and broadcast it straight into the parameter."""
        for name, tensor in self.tensors.items():
            whole = self.gathered(name) if self.rank in TRAINERS else tensor
            if whole is not None:
                dist.broadcast(whole.view(torch.uint8), 0, group=self.from_first)

    def wrong_tensors(self) -> int:
        """Parameters of the engine that do not hold both halves."""
        wrong = 0
        for tensor in self.tensors.values():
            first, second = tensor.chunk(2)
            wrong += not (bool((first == 1).all()) and bool((second == 2).all()))
        return wrong

    def clear(self) -> None:
        """Makes the engine's parameters wrong, so that a refit must write them."""
        for tensor in self.tensors.values():
            tensor.zero_()


def timed(function: Callable[[], None]) -> float:
    """Seconds from when all ranks begin to when all have ended."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - begin


def memcpy_seconds(tensors: dict[str, torch.Tensor]) -> float:
    """The same bytes, copied from one buffer by all threads of torch."""
    largest = max(tensor.numel() for tensor in tensors.values())
    source = torch.ones(largest, dtype=torch.bfloat16)
    begin = time.perf_counter()
    for tensor in tensors.values():
        tensor.view(-1).copy_(source[: tensor.numel()])
    return time.perf_counter() - begin


def run_rank(rank: int, layers: int, repetitions: int, folder: str) -> None:
    """One process; the engine writes the samples to a file."""
    process = Rank(rank, layers, folder)
    samples: dict[str, list[float]] = {"memcpy": [], "by_file": [], "by_broadcast": []}
    for repetition in range(repetitions + 1):
        for name, way in (("by_file", process.by_file), ("by_broadcast", process.by_broadcast)):
            if rank == ENGINE:
                process.clear()
            seconds = timed(way)
            if rank == ENGINE and process.wrong_tensors():
                raise RuntimeError(f"{name}: the engine holds wrong weights")
            if repetition > 0:  # the first one warms up
                samples[name].append(seconds)
        if rank == ENGINE:
            samples["memcpy"].append(memcpy_seconds(process.tensors))
        dist.barrier()
    samples["memcpy"] = samples["memcpy"][1:]
    if rank == ENGINE:
        size = sum(tensor.nbytes for tensor in process.tensors.values())
        Path(folder, "samples.json").write_text(json.dumps({"bytes": size, **samples}))
    dist.destroy_process_group()


def figures(samples: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """The samples as figures: ratio to memcpy, and rate."""
    ways = {
        "by_file": "torch.save, /dev/shm, load",
        "by_broadcast": "gloo gather, broadcast",
    }
    result = []
    for key, what in ways.items():
        pairs = list(zip(samples["memcpy"], samples[key], strict=True))
        ratios = [memcpy / seconds for memcpy, seconds in pairs]
        rates = [samples["bytes"] / seconds / 1e9 for _, seconds in pairs]
        for unit, values in (("ratio", ratios), ("GB/s", rates)):
            result.append(
                {
                    "target": "T3",
                    "workload": f"4b/{layers} fsdp:dp=2 -> hf, by hand",
                    "quantity": f"{what} / memcpy" if unit == "ratio" else what,
                    "unit": unit,
                    "min": min(values),
                    "median": statistics.median(values),
                    "max": max(values),
                    "detail": {"bytes": samples["bytes"], "torch": torch.__version__},
                }
            )
    return result


def main() -> int:
    """Runs the three processes and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the 36 of Qwen3-4B")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="transfuse-by-hand-", dir="/dev/shm") as folder:
        arguments = (options.layers, options.repetitions, folder)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(3)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        samples = json.loads(Path(folder, "samples.json").read_text())
    json.dump(figures(samples, options.layers), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
