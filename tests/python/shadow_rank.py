"""One rank of an engine: does what it reads, line by line, and answers each line with JSON."""

from __future__ import annotations

import json
import sys

import torch
import transfuse
from transfuse import hf


def say(said: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32))


def total(of: torch.nn.Module) -> float:
    return float(sum(p.detach().double().sum() for p in of.parameters()))


def answer(engine: transfuse.Receiver, weights: torch.nn.Module, words: list[str]) -> dict:
    name, timeout_s = words[0], float(words[1]) if len(words) > 1 else 30.0
    if name == "refit":
        engine.refit(timeout_s=timeout_s)
    elif name == "stage":
        engine.stage(timeout_s=timeout_s).wait(timeout_s)
    elif name == "commit":
        engine.commit(timeout_s=timeout_s)
    elif name == "rollback":
        engine.rollback(timeout_s=timeout_s)
    elif name == "check":
        assert engine.check_group().state == transfuse.GroupState.WHOLE
    return {"version": engine.version, "sum": total(weights)}


def main() -> None:
    job, rank, into = sys.argv[1:4]
    torch.manual_seed(7)
    weights = model()
    with transfuse.Receiver(
        *hf.layout(weights),
        name=f"rank{rank}",
        into=into,
        keep_previous=into == "shadow",
        group="engine",
        group_size=2,
        job=job,
    ) as engine:
        say({"version": 0})
        for line in sys.stdin:
            try:
                said = answer(engine, weights, line.split())
            except transfuse.TransfuseError as error:
                said = {
                    "error": type(error).__name__,
                    "message": str(error),
                    "version": engine.version,
                    "sum": total(weights),
                }
            say(said)


if __name__ == "__main__":
    main()
