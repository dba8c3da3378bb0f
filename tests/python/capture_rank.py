"""One tensor parallel rank of an engine with a loader of its own, refitted as capture found it.

Does what it reads, line by line, and answers each line with JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import transfuse
from transfuse import Dtype, TensorSpec

SHAPES = {
    "q": (8, 6),
    "k": (4, 6),
    "v": (4, 6),
    "o": (6, 8),
    "norm": (6,),
    "table": (9, 6),
    "experts.0": (4, 6),
    "experts.1": (4, 6),
}
CATALOG = [TensorSpec(name, Dtype.F32, shape) for name, shape in SHAPES.items()]


class Engine:
    """Fused, cut, padded, transposed; norms are held as 1 + weight, which is arithmetic."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.parameters = {
            "qkv": torch.zeros(16 // size, 6),
            "o": torch.zeros(6, 8 // size),
            "norm": torch.zeros(6),
            "table": torch.zeros(16 // size, 6),
            "experts": torch.zeros(2, 6, 4),
        }
        self.derived = {"doubled": torch.zeros(6, 8 // size)}

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.size, dim)[self.rank]

    def load_weights(self, weights) -> None:
        begin = {"q": 0, "k": 8 // self.size, "v": 12 // self.size}
        for name, tensor in weights:
            if name in begin:
                rows = self.cut(tensor, 0)
                self.parameters["qkv"].narrow(0, begin[name], len(rows)).copy_(rows)
            elif name == "o":
                self.parameters["o"].copy_(self.cut(tensor, 1))
            elif name == "norm":
                self.parameters["norm"].copy_(1 + tensor)
            elif name == "table":
                table = self.parameters["table"]
                rows = tensor[self.rank * len(table) :][: len(table)]
                table[: len(rows)].copy_(rows)
                table[len(rows) :].zero_()
            else:
                self.parameters["experts"][int(name[-1])] = tensor.t().contiguous()

    def derive(self, name: str, parameter: torch.Tensor) -> None:
        """As MLA computes from kv_b what its kernels read."""
        torch.mul(parameter, 2, out=self.derived["doubled"])


def say(said: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def held(engine: Engine) -> dict[str, list]:
    return {n: v.tolist() for n, v in {**engine.parameters, **engine.derived}.items()}


def answer(receiver: transfuse.Receiver, engine: Engine, words: list[str]) -> dict[str, object]:
    if words[0] == "refit":
        report = receiver.refit(exactly=int(words[1]), timeout_s=30)
        assert report.verified_bytes == report.size_bytes
    elif words[0] == "rollback":
        receiver.rollback()
    elif words[0] == "check":
        assert receiver.check_group().state == transfuse.GroupState.WHOLE
    hooks = [run.hook for run in receiver.hook_runs]
    return {"version": receiver.version, "held": held(engine), "hooks": hooks}


def main() -> None:
    job, rank, size, into = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    engine = Engine(rank, size)
    captured = transfuse.capture(engine.load_weights, engine.parameters, CATALOG)
    with captured.receiver(
        name=f"rank{rank}",
        into=into,
        keep_previous=into == "shadow",
        group="engine",
        group_size=size,
        spread=rank,
        derived={"o": engine.derive},
        job=job,
    ) as receiver:
        say(captured.report.counts)
        for line in sys.stdin:
            try:
                said = answer(receiver, engine, line.split())
            except transfuse.TransfuseError as error:
                said = {"error": type(error).__name__, "message": str(error)}
            say(said)


if __name__ == "__main__":
    main()
