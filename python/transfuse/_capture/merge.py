"""Fewer tiles for the same places: boxes that continue each other become one."""

from __future__ import annotations

from collections.abc import Iterable

from transfuse._capture.boxes import Cut


def merged(cuts: Iterable[tuple[int, Cut]]) -> list[tuple[int, Cut]]:
    """Boxes of catalog tensors in one parameter; those of a tensor joined along each dimension."""
    by_tensor: dict[int, list[Cut]] = {}
    for tensor, part in cuts:
        by_tensor.setdefault(tensor, []).append(part)
    found = []
    for tensor, parts in by_tensor.items():
        if len(parts) > 1:
            for d in reversed(range(len(parts[0].offset))):
                parts = _joined(parts, d)
        found += [(tensor, part) for part in parts]
    return found


def _joined(parts: list[Cut], d: int) -> list[Cut]:
    """Joins boxes that differ in dimension d alone."""
    groups: dict[object, list[Cut]] = {}
    for part in parts:
        others = zip(part.offset, part.length, part.strides, strict=True)
        steps = tuple((o, n, s if n > 1 else 1) for i, (o, n, s) in enumerate(others) if i != d)
        groups.setdefault(steps, []).append(part)
    found: list[Cut] = []
    for group in groups.values():
        last: Cut | None = None
        for part in sorted(group, key=lambda c: (c.offset[d], c.far)):
            joined = None if last is None else _join(last, part, d)
            if joined is None and last is not None:
                found.append(last)
            last = joined or part
        if last is not None:
            found.append(last)
    return found


def _join(first: Cut, second: Cut, d: int) -> Cut | None:
    count = second.offset[d] - first.offset[d]
    distance = second.far - first.far
    if count != first.length[d] or distance <= 0 or distance % count:
        return None
    step = distance // count
    if any(part.length[d] > 1 and part.strides[d] != step for part in (first, second)):
        return None
    length = (*first.length[:d], count + second.length[d], *first.length[d + 1 :])
    strides = (*first.strides[:d], step, *first.strides[d + 1 :])
    return Cut(first.offset, length, first.far, strides)
