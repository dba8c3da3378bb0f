"""Whether the engine computes what the trainers' parameters give, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transfuse.demo.pretrain.engine import first_model, logits_of
from transfuse.demo.pretrain.settings import Settings


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def compare(settings: Settings, reference: Path, state: Path) -> dict[str, Any]:
    """Logits and parameters of the engine against a fresh model with the gathered parameters.

    `logits_of_other_weights_differ` shows that the comparison can fail: the logits of the same
    model with the engine's weights before its first refit are other ones.
    """
    torch.set_num_threads(1)  # as in the engine: another split of the work may round differently
    gathered: dict[str, torch.Tensor] = torch.load(reference)
    engine = torch.load(state)
    model = first_model(settings)
    before = logits_of(model, settings)
    missing, unexpected = model.load_state_dict(gathered, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # tied: the embedding under another name
        message = f"gathered parameters do not fit: missing {missing}, unexpected {unexpected}"
        raise ValueError(message)
    expected, found = logits_of(model, settings), engine["logits"]
    equal = {name: torch.equal(_bits(gathered[name]), _bits(p)) for name, p in _pairs(engine)}
    differing = int((_bits(expected) != _bits(found)).sum())
    return {
        "logits_equal": differing == 0 and expected.shape == found.shape,
        "logits_compared": expected.numel(),
        "logits_differing": differing,
        "logits_of_other_weights_differ": int((_bits(before) != _bits(found)).sum()),
        "parameters_equal": sum(equal.values()),
        "parameters_compared": len(gathered),
        "parameters_differing": sorted(name for name, same in equal.items() if not same),
    }


def _pairs(engine: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return list(engine["parameters"].items())
