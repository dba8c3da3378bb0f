"""The engine's parameters as spans of storage, each a memory that a loader is followed into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from transfuse._capture.boxes import Dims, row_major
from transfuse._capture.memory import Memory
from transfuse.errors import InvalidArgumentError, UnsupportedError


@dataclass
class Span:
    """Parameters whose elements overlap: tied ones, or views of a fused one."""

    memory: Memory
    tensor: torch.Tensor  # of the parameter that the span is named after
    names: list[str] = field(default_factory=list)  # of all parameters in it

    def flat(self) -> torch.Tensor:
        """All its elements, in the engine's own memory."""
        whole = self.tensor.detach()
        if whole.is_contiguous() and whole.numel() == self.memory.count:
            return whole
        return whole.as_strided((self.memory.count,), (1,), self.memory.begin)


def spans_of(parameters: Mapping[str, torch.Tensor]) -> list[Span]:
    """By storage, whatever the names. In the order of names as they are given."""
    by_storage: dict[tuple[int, torch.dtype], list[tuple[int, int, str, torch.Tensor]]] = {}
    for name, tensor in parameters.items():
        if not isinstance(tensor, torch.Tensor):
            found = type(tensor).__name__
            raise InvalidArgumentError(f"{name}: expected a torch tensor, found {found}")
        if tensor.layout != torch.strided or hasattr(tensor, "device_mesh"):
            message = f"{name}: expected a dense tensor of this process, found {type(tensor)}"
            raise UnsupportedError(message)
        if tensor.numel() == 0:
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        begin = int(tensor.storage_offset())
        end = begin + int(sum((n - 1) * s for n, s in steps)) + 1
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        by_storage.setdefault(key, []).append((begin, end, name, tensor))
    order = {name: index for index, name in enumerate(parameters)}
    spans: list[Span] = []
    for entries in by_storage.values():
        group: list[tuple[int, int, str, torch.Tensor]] = []
        for entry in sorted(entries, key=lambda e: (e[0], -e[1], order[e[2]])):
            if group and entry[0] >= max(e[1] for e in group):
                spans.append(_span(group, order))
                group = []
            group.append(entry)
        spans.append(_span(group, order))
    return sorted(spans, key=lambda span: order[span.memory.name])


def _span(group: list[tuple[int, int, str, torch.Tensor]], order: Mapping[str, int]) -> Span:
    begin, end = min(e[0] for e in group), max(e[1] for e in group)
    names = sorted((e[2] for e in group), key=order.__getitem__)
    whole = [e for e in group if (e[0], e[1]) == (begin, end)]
    name, tensor = min(((e[2], e[3]) for e in whole or group), key=lambda e: order[e[0]])
    shape: Dims = (end - begin,)
    if whole and math.prod(tensor.shape) == end - begin:
        # Dense, perhaps with its dimensions in another order.
        steps = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        dense = tuple(n for s, n in steps if n > 1) or (1,)
        if row_major(dense) == tuple(s for s, n in steps if n > 1) or end - begin == 1:
            shape = tuple(tensor.shape) if tensor.is_contiguous() else dense
    return Span(Memory(name, "parameter", shape, tensor.dtype, begin), tensor, names)
