"""What lies where in memory while a loader is followed: boxes, and where each is from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from transfuse._capture.boxes import (
    Cut,
    Dims,
    Loop,
    OutsideError,
    cut,
    intersect,
    row_major,
    subtract,
)

_FEW_ROWS = 16  # a box of at most so many is found by its rows


@dataclass(frozen=True, slots=True)
class Moved:
    """Elements of a catalog tensor: element i of the box is base + sum(i * strides) of it.

    `dtype` is what the values fit into: that of the catalog, or the last that they were rounded to
    in so many `roundings`. `followed`: they came through other memory, or a cast.
    """

    tensor: int
    base: int
    strides: Dims
    dtype: torch.dtype
    roundings: int = 0
    followed: bool = False

    def at(self, begin: Dims, offset: Dims) -> Moved:
        """The part of a box at `begin` that starts at `offset`."""
        if offset == begin:
            return self
        steps = zip(offset, begin, self.strides, strict=True)
        return self.lying(self.base + sum((o - b) * s for o, b, s in steps), self.strides)

    def lying(self, base: int, strides: Dims) -> Moved:
        """The same values from other places of the tensor."""
        return Moved(self.tensor, base, strides, self.dtype, self.roundings, self.followed)

    @property
    def tensors(self) -> frozenset[int]:
        return frozenset((self.tensor,))


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros, whatever the dtype."""

    tensors: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that no copy can make, and the catalog tensors that went into them."""

    reason: str
    tensors: frozenset[int] = frozenset()


Content = Moved | Zeros | Computed


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a memory and what it holds."""

    offset: Dims
    length: Dims
    content: Content

    @property
    def count(self) -> int:
        return math.prod(self.length)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two tensors that were written to one place."""

    memory: Memory
    offset: Dims
    length: Dims
    first: Content
    second: Content


class Memory:
    """A contiguous span of a storage, as a row-major tensor of `shape`; its pieces are disjoint."""

    def __init__(
        self,
        name: str,
        kind: str,
        shape: Dims,
        dtype: torch.dtype,
        begin: int = 0,
    ) -> None:
        self.name = name
        self.kind = kind  # "catalog", "parameter" or "scratch"
        self.shape = shape
        self.dtype = dtype
        self.begin = begin  # in elements of the storage
        self.count = math.prod(shape)
        self.conflicts: list[Conflict] = []
        self._pieces: dict[int, Piece] = {}
        self._rows: dict[int, set[int]] = {}
        self._tall: set[int] = set()
        self._next = 0
        self._filled = 0  # elements

    def pieces(self) -> list[Piece]:
        """All that was written, in the order of places."""
        return sorted(self._pieces.values(), key=lambda p: p.offset)

    def written(self) -> bool:
        """Whether anything was."""
        return bool(self._pieces)

    def full(self) -> bool:
        """Whether all of it was written."""
        return self._filled == self.count

    def whole(self) -> Moved | None:
        """The catalog tensor that this is, if nothing has changed it."""
        if self.kind != "catalog" or len(self._pieces) != 1:
            return None
        (piece,) = self._pieces.values()
        return piece.content if isinstance(piece.content, Moved) else None

    def put(self, offset: Dims, length: Dims, content: Content) -> None:
        """Overwrites a box."""
        for key, old in list(self._overlapping(offset, length)):
            common, size = intersect(old.offset, old.length, offset, length)
            self._note_conflict(common, size, old, offset, content)
            self._remove(key)
            for begin, rest in subtract(old.offset, old.length, common, size):
                part = old.content
                if isinstance(part, Moved):
                    part = part.at(old.offset, begin)
                self._add(Piece(begin, rest, part))
        self._add(Piece(offset, length, content))

    def read(self, offset: Dims, length: Dims) -> Iterator[Piece]:
        """What lies in a box; what was never written is not among it."""
        for _, piece in self._overlapping(offset, length):
            begin, size = intersect(piece.offset, piece.length, offset, length)
            content = piece.content
            if isinstance(content, Moved):
                content = content.at(piece.offset, begin)
            yield Piece(begin, size, content)

    def gaps(self, offset: Dims, length: Dims) -> list[tuple[Dims, Dims]]:
        """The boxes within a box that nothing was written to."""
        left = [(offset, length)]
        for _, piece in self._overlapping(offset, length):
            following: list[tuple[Dims, Dims]] = []
            for begin, size in left:
                common, shared = intersect(begin, size, piece.offset, piece.length)
                if all(shared):
                    following.extend(subtract(begin, size, common, shared))
                else:
                    following.append((begin, size))
            left = following
        return left

    def all_gaps(self) -> list[tuple[Dims, Dims]]:
        """gaps() of everything."""
        if self.full():
            return []
        return self.gaps((0,) * len(self.shape), self.shape)

    def _note_conflict(
        self, offset: Dims, length: Dims, old: Piece, begin: Dims, new: Content
    ) -> None:
        if self.kind != "parameter" or not new.tensors or not old.content.tensors:
            return
        before = old.content
        if isinstance(before, Moved) and isinstance(new, Moved):
            # The same elements once more change nothing; strides of one step say nothing.
            before, after = before.at(old.offset, offset), new.at(begin, offset)
            steps = [d for d, n in enumerate(length) if n > 1]
            same = all(before.strides[d] == after.strides[d] for d in steps)
            if same and (before.tensor, before.base) == (after.tensor, after.base):
                return
        elif before.tensors <= new.tensors:
            return
        self.conflicts.append(Conflict(self, offset, length, before, new))

    def _overlapping(self, offset: Dims, length: Dims) -> Iterable[tuple[int, Piece]]:
        keys: Iterable[int] = self._pieces
        if length and length[0] <= _FEW_ROWS and self._rows:
            near = set(self._tall)
            for row in range(offset[0], offset[0] + length[0]):
                near |= self._rows.get(row, set())
            keys = sorted(near)
        for key in keys:
            piece = self._pieces[key]
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(offset, length, piece.offset, piece.length, strict=True)
            ):
                yield key, piece

    def _add(self, piece: Piece) -> None:
        self._pieces[self._next] = piece
        for rows in self._places(piece):
            rows.add(self._next)
        self._next += 1
        self._filled += piece.count

    def _remove(self, key: int) -> None:
        piece = self._pieces.pop(key)
        self._filled -= piece.count
        for rows in self._places(piece):
            rows.discard(key)

    def _places(self, piece: Piece) -> list[set[int]]:
        if not piece.length or piece.length[0] > _FEW_ROWS:
            return [self._tall]
        first = piece.offset[0]
        return [self._rows.setdefault(row, set()) for row in range(first, first + piece.length[0])]


def write(memory: Memory, at: int, loops: list[Loop], content: Content) -> None:
    """Writes to nested loops of a memory; the far side of the loops is that of Moved content."""
    base = content.base if isinstance(content, Moved) else 0
    for part in cut(memory.shape, at, base, loops):
        put = content
        if isinstance(content, Moved):
            put = content.lying(part.far, part.strides)
        memory.put(part.offset, part.length, put)


def move(
    target: Memory,
    target_at: int,
    source: Memory,
    source_at: int,
    loops: list[Loop],
    change: Change,
) -> None:
    """Copies along loops whose near side is the source and whose far side is the target."""
    whole = source.whole()
    if whole is not None:
        # Nothing but itself in it, row-major: where its elements go needs no cutting of the source.
        ends = [(loop.length - 1) * loop.near for loop in loops]
        low, high = (source_at + sum(f(0, end) for end in ends) for f in (min, max))
        if low < 0 or high >= source.count:
            raise OutsideError(f"elements {low} to {high} of {source.count}")
        turned = [Loop(n, b, a) for n, a, b in loops]
        content = change(whole)
        if isinstance(content, Moved):
            write(target, target_at, turned, content.lying(source_at, ()))
            return
    found: list[tuple[Cut, Piece]] = []  # all of it, before the first is overwritten
    for part in cut(source.shape, source_at, target_at, loops):
        found += [(part, piece) for piece in source.read(part.offset, part.length)]
        for gap in () if source.full() else source.gaps(part.offset, part.length):
            unknown = Computed(f"reads {source.name or 'memory'} that nobody has written")
            found.append((part, Piece(*gap, unknown)))
    for part, piece in found:
        _place(target, part, piece.offset, piece.length, change(piece.content))


def tiles(memory: Memory, piece: Piece, shape: Dims) -> list[Cut]:
    """Boxes of a catalog tensor of `shape`, and where they lie in the memory."""
    content = piece.content
    if not isinstance(content, Moved):
        return []
    strides = row_major(memory.shape)
    at = sum(o * s for o, s in zip(piece.offset, strides, strict=True))
    loops = list(map(Loop, piece.length, content.strides, strides))
    return cut(shape, content.base, at, loops, forward=True)


@dataclass(frozen=True, slots=True)
class Change:
    """What a copy does to the elements: a cast, and whether it is more than a view."""

    into: torch.dtype
    followed: bool = False

    def __call__(self, content: Content) -> Content:
        if not isinstance(content, Moved):
            return content
        followed = self.followed or content.followed
        if content.dtype == self.into and followed == content.followed:
            return content
        if _exact(content.dtype, self.into):
            return replace(content, followed=followed)
        roundings = content.roundings + 1
        return replace(content, dtype=self.into, roundings=roundings, followed=followed)


def _exact(value: torch.dtype, into: torch.dtype) -> bool:
    """Every value of one dtype is one of the other."""
    if value == into:
        return True
    if not (value.is_floating_point and into.is_floating_point):
        return False
    a, b = torch.finfo(value), torch.finfo(into)
    return b.bits > a.bits and b.eps <= a.eps and b.max >= a.max and b.tiny <= a.tiny


def _place(target: Memory, part: Cut, offset: Dims, length: Dims, content: Content) -> None:
    steps = zip(offset, part.offset, part.strides, strict=True)
    at = part.far + sum((o - b) * s for o, b, s in steps)
    far = content.strides if isinstance(content, Moved) else (0,) * len(length)
    write(target, at, list(map(Loop, length, part.strides, far)), content)
