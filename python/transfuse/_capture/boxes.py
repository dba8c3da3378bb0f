"""Exact cutting of strided copies into boxes of a row-major tensor. Pure arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Dims = tuple[int, ...]

MAX_PIECES = 1 << 16  # of one copy: more are no layout but a permutation of elements


class Loop(NamedTuple):
    """`length` steps, each `near` elements in the memory that is cut and `far` in the other."""

    length: int
    near: int
    far: int


class Cut(NamedTuple):
    """A box of the near memory; its element i lies at far + sum(i * strides) of the other."""

    offset: Dims
    length: Dims
    far: int
    strides: Dims


class NotBoxesError(Exception):
    """A copy that falls into more than MAX_PIECES boxes."""


class OutsideError(Exception):
    """A copy that reaches beyond the memory."""


@functools.cache
def row_major(shape: Dims) -> Dims:
    """Strides of a contiguous tensor, in elements."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(1, shape[d + 1])
    return tuple(strides)


def cut(
    shape: Dims, near: int, far: int, loops: Sequence[Loop], *, forward: bool = False
) -> list[Cut]:
    """Cuts the copy of nested loops into boxes of a row-major near memory of `shape`.

    Every step of the loops is in exactly one box. `forward`: strides of the far side are positive.
    """
    total, strides, dims = _facts(shape)
    for loop in loops:
        if loop[0] == 0:
            return []
    if 0 <= near < total:
        simple = _simple(shape, strides, dims, near, far, loops)
        if simple is not None:
            return [simple]
    todo = [_coalesced(near, far, loops)]
    found: list[Cut] = []
    while todo:
        near, far, left = todo.pop()
        if not 0 <= near < total:
            raise OutsideError(f"element {near} of {total}")
        step = _box(shape, strides, dims, near, far, left, forward)
        if isinstance(step, Cut):
            found.append(step)
        else:
            todo.extend(step)
        if len(found) + len(todo) > MAX_PIECES:
            raise NotBoxesError(f"more than {MAX_PIECES} boxes")
    return found


@functools.cache
def _facts(shape: Dims) -> tuple[int, Dims, dict[int, int]]:
    """Elements, strides, and which dimension has a stride; those of length 1 have none."""
    strides = row_major(shape)
    dims = {stride: d for d, stride in enumerate(strides) if shape[d] > 1}
    return math.prod(shape), strides, dims


def _simple(
    shape: Dims, strides: Dims, dims: dict[int, int], near: int, far: int, loops: Sequence[Loop]
) -> Cut | None:
    """The box of loops that each go along a dimension of their own, which most copies are."""
    at, rest = [], near
    for stride in strides:
        at.append(rest // stride)
        rest %= stride
    length, far_strides = [1] * len(shape), [1] * len(shape)
    for count, step, far_step in loops:
        if count == 1:
            continue
        d = dims.get(step)
        if d is None or length[d] != 1 or far_step <= 0 or at[d] + count > shape[d]:
            return None
        length[d], far_strides[d] = count, far_step
    return Cut(tuple(at), tuple(length), far, tuple(far_strides))


_State = tuple[int, int, list[Loop]]


def _box(
    shape: Dims,
    strides: Dims,
    dims: dict[int, int],
    near: int,
    far: int,
    loops: list[Loop],
    forward: bool,
) -> Cut | list[_State]:
    """The box of these loops, or loops that are closer to boxes, the first one last."""
    at, rest = [], near
    for stride in strides:
        at.append(rest // stride)
        rest %= stride
    length, far_strides = [1] * len(shape), [1] * len(shape)
    for index, (count, step, far_step) in enumerate(loops):
        others = loops[:index] + loops[index + 1 :]
        d = dims.get(step)
        if d is None or length[d] != 1 or (forward and far_step <= 0):
            if count > MAX_PIECES:
                raise NotBoxesError(f"more than {MAX_PIECES} boxes")
            return [(near + j * step, far + j * far_step, others) for j in range(count)][::-1]
        extent, room = shape[d], shape[d] - at[d]
        if count > room:
            # Runs over the end of this dimension into the next outer one.
            if at[d] == 0:
                rows = count // extent
                head = [Loop(extent, step, far_step)]
                if rows > 1:
                    head.append(Loop(rows, step * extent, far_step * extent))
                done = rows * extent
            else:
                head, done = [Loop(room, step, far_step)], room
            states = [(near, far, _sorted(head + others))]
            if done < count:
                tail = [Loop(count - done, step, far_step)] if count - done > 1 else []
                tail_state = (near + done * step, far + done * far_step, _sorted(tail + others))
                states.append(tail_state)
            return states[::-1]
        length[d], far_strides[d] = count, far_step
    return Cut(tuple(at), tuple(length), far, tuple(far_strides))


def _sorted(loops: list[Loop]) -> list[Loop]:
    return sorted((loop for loop in loops if loop.length > 1), key=lambda loop: loop.near)


def _coalesced(near: int, far: int, loops: Sequence[Loop]) -> _State:
    """Steps forward on the near side, innermost first, loops that continue each other as one."""
    forward = []
    for count, step, far_step in loops:
        if step < 0:
            near, far = near + (count - 1) * step, far + (count - 1) * far_step
            step, far_step = -step, -far_step
        forward.append(Loop(count, step, far_step))
    merged: list[Loop] = []
    for loop in _sorted(forward):
        if merged:
            last = merged[-1]
            if (loop.near, loop.far) == (last.near * last.length, last.far * last.length):
                merged[-1] = Loop(last.length * loop.length, last.near, last.far)
                continue
        merged.append(loop)
    return near, far, merged


def intersect(offset: Dims, length: Dims, other: Dims, other_length: Dims) -> tuple[Dims, Dims]:
    """The common box; lengths of zero where there is none."""
    begin = tuple(map(max, offset, other))
    ends = zip(offset, length, other, other_length, begin, strict=True)
    return begin, tuple(max(0, min(a + n, b + m) - c) for a, n, b, m, c in ends)


def subtract(
    offset: Dims, length: Dims, hole: Dims, hole_length: Dims
) -> Iterator[tuple[Dims, Dims]]:
    """What is left of a box without a hole that lies in it."""
    begin, size = list(offset), list(length)
    for d in range(len(offset)):
        before = hole[d] - begin[d]
        after = begin[d] + size[d] - hole[d] - hole_length[d]
        if before > 0:
            yield tuple(begin), (*size[:d], before, *size[d + 1 :])
        if after > 0:
            past = hole[d] + hole_length[d]
            yield (*begin[:d], past, *begin[d + 1 :]), (*size[:d], after, *size[d + 1 :])
        begin[d], size[d] = hole[d], hole_length[d]
