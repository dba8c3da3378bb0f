"""Captures vLLM's own load_weights on every rank of a world and saves the layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transfuse
from vllm_worker import build


def main():
    request = json.loads(sys.argv[1])
    folder = Path(request["folder"])
    for rank in range(request["size"]):
        model = build(folder, request["world"], rank)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        captured = transfuse.capture(model.load_weights, model, folder)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
        (folder / f"rank{rank}.layout").write_bytes(captured.layout.encode())
        (folder / f"rank{rank}.json").write_text(captured.report.to_json())


if __name__ == "__main__":
    main()
