"""A replica of a whole model: publishes a version for each line that it reads, as the line says."""

from __future__ import annotations

import json
import sys

import torch
import transfuse
from transfuse import hf


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32))


def say(said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def main() -> None:
    job, name, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    weights = model()
    layout, parameters = hf.layout(weights)
    with transfuse.Publisher(
        layout, parameters, name=name, source_count=2, job=job, **options
    ) as publisher:
        say("ready")
        for line in sys.stdin:
            order = json.loads(line)
            with publisher.write(order["version"], metadata=order.get("metadata")):
                torch.manual_seed(order["version"])
                with torch.no_grad():
                    for parameter in weights.parameters():
                        parameter.normal_()
                    if order.get("flip"):
                        weights[0].bias[3] += 1
            say(str(transfuse.revision(layout, parameters)))


if __name__ == "__main__":
    main()
