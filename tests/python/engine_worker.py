"""One rank of a tensor parallel engine; what it computes goes to files.

Usage: engine_worker.py group <rank> <folder>              rank of 4: engines of 4, 2 and 2 ranks
       engine_worker.py refit <rank> <folder> <job>        rank of 2: weights come from a publisher
       engine_worker.py lose <rank> <folder> <attempt>     rank of 2: rank 1 dies in attempt 0
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transfuse
from transfuse.engine import (
    Architecture,
    Completions,
    Engine,
    MixedVersionsError,
    Request,
    TensorParallel,
    Weights,
)

REQUESTS = [
    Request([5, 9, 2], 9),
    Request([1], 12),
    Request([60, 61, 62, 63, 64, 65, 66, 67, 68, 69], 7),
    Request([7, 7], 12, temperature=0.8, seed=3),
    Request([7, 7], 12, temperature=1.3, seed=4),
]


class Planned:
    """Commits before the given steps of a generation; `commit` is called with their number."""

    def __init__(self, steps: set[int], commit: Callable[[int], int]) -> None:
        self._steps = steps
        self._commit = commit
        self._asked = 0
        self._committed = 0

    def due(self) -> bool:
        """Asked once per step."""
        self._asked += 1
        return self._asked - 1 in self._steps

    def commit(self) -> int:
        """The next one."""
        self._committed += 1
        return self._commit(self._committed)


def join(rank: int, world: int, folder: Path, name: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )


def architecture(folder: Path) -> Architecture:
    return Architecture.parse((folder / "config.json").read_text())


def loaded(
    folder: Path, parallel: TensorParallel, state: str, dtype: torch.dtype = torch.float32
) -> Weights:
    """Weights of this rank from a saved state dict."""
    weights = Weights(
        architecture(folder), rank=parallel.rank, size=parallel.size, dtype=dtype, arena=False
    )
    weights.load(torch.load(folder / state))
    return weights


def fields(completions: Completions) -> dict[str, torch.Tensor]:
    return dict(vars(completions))


def compute(folder: Path, parallel: TensorParallel) -> dict[str, object]:
    """Logits and text on fixed weights, and text while they change."""
    tokens = torch.load(folder / "tokens.pt")
    found: dict[str, object] = {"rank": parallel.rank}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(loaded(folder, parallel, "one.pt", dtype), parallel, slots=8, max_tokens=32)
        found[f"logits-{dtype}"] = engine.logits(tokens)
    weights = loaded(folder, parallel, "one.pt")
    engine = Engine(weights, parallel, slots=8, max_tokens=32)
    found["text"] = fields(engine.generate(REQUESTS))

    def second_weights(_count: int) -> int:
        weights.load(torch.load(folder / "two.pt"))
        return 2

    engine = Engine(weights, parallel, slots=8, max_tokens=32, version=1)
    engine.safe_point = Planned({4}, second_weights)
    found["changed"] = fields(engine.generate(REQUESTS))
    return found


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"


def misuse(folder: Path, parallel: TensorParallel) -> dict[str, str]:
    """Calls and commits that differ between the ranks; each ends on all of them."""
    found = {}
    weights = loaded(folder, parallel, "one.pt")
    engine = Engine(weights, parallel, slots=8, max_tokens=32)
    other = [Request([parallel.rank], 2)]
    found["calls"] = message_of(transfuse.InvalidArgumentError, lambda: engine.generate(other))

    good = [Request([1, 2], 3)]
    engine.safe_point = Planned({2}, lambda _: 7 + parallel.rank)
    found["mixed"] = message_of(MixedVersionsError, lambda: engine.generate(good))
    engine.safe_point = None
    found["refused"] = message_of(MixedVersionsError, lambda: engine.generate(good))

    def failing(_count: int) -> int:
        if parallel.rank == 1:
            raise OSError("rank 1 fails")
        return 8

    engine.safe_point = Planned({0}, failing)
    kind = OSError if parallel.rank == 1 else MixedVersionsError
    found["failed"] = message_of(kind, lambda: engine.generate(good))
    engine.safe_point = Planned({0}, lambda _: 9)
    found["repaired"] = str(engine.generate(good).versions.tolist())
    return found


def group(rank: int, folder: Path) -> None:
    join(rank, 4, folder, "rendezvous")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = TensorParallel(pairs[rank // 2])
    found = {4: compute(folder, TensorParallel(dist.group.WORLD)), 2: compute(folder, pair)}
    found["misuse"] = misuse(folder, pair)
    found["outside"] = message_of(
        transfuse.InvalidArgumentError, lambda: TensorParallel(pairs[1 - rank // 2])
    )
    torch.save(found, folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refit(rank: int, folder: Path, job: str) -> None:
    join(rank, 2, folder, "rendezvous")
    parallel = TensorParallel(dist.group.WORLD)
    weights = Weights(
        architecture(folder), rank=rank, size=parallel.size, dtype=torch.float32, job=job
    )
    engine = Engine(weights, parallel, slots=8, max_tokens=32)
    layout, parameters = weights.layout, weights.parameters
    with transfuse.Receiver(layout, parameters, name=f"engine{rank}", job=job) as receiver:

        def commit(_count: int) -> int:
            (folder / f"waiting-{receiver.version}-{rank}").touch()
            return receiver.refit(at_least=receiver.version + 1, timeout_s=60).version

        engine.safe_point = Planned({0, 4}, commit)
        found = fields(engine.generate(REQUESTS))
        engine.safe_point = None
        found["logits"] = engine.logits(torch.load(folder / "tokens.pt"))
        expected = loaded(folder, parallel, "two.pt")
        found["equal"] = all(
            torch.equal(parameters[name], value) for name, value in expected.parameters.items()
        )
    torch.save(found, folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def lose(rank: int, folder: Path, attempt: int) -> None:
    """Attempt 0 ends in the death of rank 1; rank 0 goes on with what takes its place."""
    join(rank, 2, folder, f"rendezvous-{attempt}")
    parallel = TensorParallel(dist.group.WORLD)
    weights = loaded(folder, parallel, "one.pt")
    if attempt == 0:

        def die(_count: int) -> int:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1

        engine = Engine(weights, parallel, slots=8, max_tokens=32, version=1)
        engine.safe_point = Planned({3}, die)
        start = time.monotonic()
        error = message_of(transfuse.UnavailableError, lambda: engine.generate(REQUESTS))
        (folder / "lost.txt").write_text(f"{time.monotonic() - start}\n{error}")
        dist.destroy_process_group()
        join(rank, 2, folder, "rendezvous-1")
        parallel = TensorParallel(dist.group.WORLD)
    engine = Engine(weights, parallel, slots=8, max_tokens=32, version=1)
    torch.save(fields(engine.generate(REQUESTS)), folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    what, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    if what == "group":
        group(rank, folder)
    elif what == "refit":
        refit(rank, folder, sys.argv[4])
    else:
        lose(rank, folder, int(sys.argv[4]))


if __name__ == "__main__":
    main()
