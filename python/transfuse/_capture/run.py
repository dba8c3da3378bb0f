"""One capture: the loader runs, what it wrote becomes tiles, what cannot goes by fallback."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Mapping, Sequence

import torch

from transfuse._capture.boxes import Cut, Dims, NotBoxesError, row_major
from transfuse._capture.catalog import Catalog, catalog_of
from transfuse._capture.fallback import Staging
from transfuse._capture.memory import Computed, Memory, Moved, Piece, Zeros, tiles
from transfuse._capture.merge import merged
from transfuse._capture.parameters import Span, spans_of
from transfuse._capture.trial import Followed, follow, settle
from transfuse._module_layout import TORCH_DTYPES, dtype_of
from transfuse._transfuse import Box, LayoutBuilder, TensorSpec, castable
from transfuse.captured import Captured, CaptureReport, LoadWeights, TensorWay
from transfuse.errors import InvalidArgumentError, LayoutMismatchError
from transfuse.guard import PointerGuard, named_tensors_of

_SHOWN = 4  # findings that one message lists
_LOOKED_AT = 4  # tensors that are found one by one
_NUMBER = re.compile(r"\d+")


def run(
    load_weights: LoadWeights,
    parameters: torch.nn.Module | Mapping[str, torch.Tensor],
    catalog: Catalog,
    *,
    unmanaged: Sequence[str],
    require_all: bool,
) -> Captured:
    """See transfuse.capture()."""
    start = time.perf_counter()
    named = named_tensors_of(parameters)
    specs = catalog_of(catalog)
    if not named or not specs:
        message = f"found {len(named)} parameters and {len(specs)} catalog tensors"
        raise InvalidArgumentError(f"capture: expected at least one of each, {message}")
    _check_patterns(unmanaged, named)
    spans_of(named)
    guard = PointerGuard(parameters)
    withheld: dict[int, str] = {}
    while True:
        found = Followed(spans_of(named), specs, fallback=dict(withheld))
        looked = follow(load_weights, found, guard)
        if looked is None:
            break
        new = looked.tensors - withheld.keys()
        if not new:
            names = ", ".join(specs[t].name for t in sorted(looked.tensors)) or "a tensor"
            message = f"{names}: expected a loader that moves tensors, found one that looks into"
            raise LayoutMismatchError(f"{message} what it was not given ({looked.operation})")
        withheld |= {t: f"the loader looks at its values ({looked.operation})" for t in new}
        if len(withheld) > _LOOKED_AT:
            withheld |= _alike(new, specs, withheld)
    made = _Layout(found, unmanaged, bool(withheld))
    made.check()
    settle(load_weights, found, withheld, named, guard)
    builder, by_name, staging, ways, left = made.build()
    if require_all:
        _require_all(ways)
    layout = builder.build()
    report = CaptureReport(
        tensors=tuple(ways),
        unmanaged=left,
        tile_count=len(layout.tiles),
        fill_count=len(layout.fills),
        seconds=time.perf_counter() - start,
    )
    loader = staging.loader(load_weights, found.spans) if staging.tensors else None
    return Captured(layout, by_name, report, loader, parameters)


def _alike(
    new: frozenset[int] | set[int], specs: list[TensorSpec], withheld: Mapping[int, str]
) -> dict[int, str]:
    """Tensors of the same name but for numbers: each would end a run of the loader of its own."""
    kinds = {_NUMBER.sub("#", specs[t].name): specs[t].name for t in new}
    found = {}
    for index, spec in enumerate(specs):
        like = kinds.get(_NUMBER.sub("#", spec.name))
        if like is not None and index not in withheld:
            found[index] = f"the loader looks at the values of its like, {like}"
    return found


def _check_patterns(unmanaged: Sequence[str], named: Mapping[str, torch.Tensor]) -> None:
    for pattern in unmanaged:
        if not fnmatch.filter(named, pattern):
            message = f"unmanaged: {pattern!r} is the name of no parameter"
            raise InvalidArgumentError(f"{message}; they are named like {next(iter(named))!r}")


def _require_all(ways: list[TensorWay]) -> None:
    unused = [way.name for way in ways if way.way == "unused"]
    if unused:
        message = f"expected all {len(ways)} catalog tensors to be used, found {len(unused)} unused"
        raise LayoutMismatchError(f"{message}: {', '.join(unused[:_SHOWN])}")


Built = tuple[LayoutBuilder, dict[str, torch.Tensor], Staging, list[TensorWay], dict[str, str]]


class _Layout:
    """From what lies in the parameters to the layout. Used once."""

    def __init__(self, found: Followed, unmanaged: Sequence[str], withheld: bool) -> None:
        self._found = found
        self._unmanaged = unmanaged
        self._withheld = withheld  # then what is unwritten may be what those tensors are for
        self._builder = LayoutBuilder()
        self._tensors: dict[int, int] = {}  # handles, by catalog tensor
        self._tiles: dict[int, int] = {}  # how many, by catalog tensor
        self._followed: set[int] = set()
        self._left: dict[str, str] = {}
        self._staging = Staging()
        self._cuts: dict[int, list[tuple[int, Cut]]] = {}  # by memory
        self._computed: dict[int, list[Piece]] = {}  # by memory: what no tile describes

    def build(self) -> Built:
        """All of it, once it is settled what goes by fallback."""
        parameters: dict[str, torch.Tensor] = {}
        for span in self._found.spans:
            if self._add(span):
                parameters[span.memory.name] = span.flat()
        for index in self._found.emptied:
            self._tensor(index)
        real = not all(span.tensor.is_meta for span in self._found.spans)
        for index in sorted(self._found.fallback):
            spec = self._found.specs[index]
            name, staged = self._staging.add(spec, real=real)
            parameter = self._builder.parameter(name, spec.dtype, max(1, staged.numel()))
            self._builder.tile(self._tensor(index), Box.whole(spec.shape), parameter, 0)
            parameters[name] = staged
        return self._builder, parameters, self._staging, self._ways(), self._left

    def check(self) -> None:
        """Finds what cannot be tiles. LayoutMismatchError if a place has two tensors."""
        conflicts = [c for span in self._found.spans for c in span.memory.conflicts]
        if conflicts:
            first = conflicts[0]
            message = (
                f"{first.memory.name}: expected each element to be written from one tensor, found "
                f"{Box(first.offset, first.length)} written from {self._names(first.first.tensors)}"
                f" and from {self._names(first.second.tensors)}"
            )
            raise LayoutMismatchError(f"{message}{_others(len(conflicts) - 1)}")
        for span in self._found.spans:
            self._collect_fallback(span)

    def _names(self, tensors: frozenset[int]) -> str:
        return ", ".join(self._found.specs[t].name for t in sorted(tensors)) or "no tensor"

    def _collect_fallback(self, span: Span) -> None:
        """Finds tensors with pieces that no tile describes, and cuts the others into tiles."""
        memory = span.memory
        for piece in memory.pieces():
            reason = self._why_not(memory, piece)
            if reason is not None:
                self._computed.setdefault(id(memory), []).append(piece)
                for tensor in piece.content.tensors:
                    self._found.fallback.setdefault(tensor, f"{memory.name}: {reason}")

    def _why_not(self, memory: Memory, piece: Piece) -> str | None:
        content = piece.content
        if isinstance(content, Computed):
            return content.reason
        if not isinstance(content, Moved):
            return None
        spec = self._found.specs[content.tensor]
        if content.roundings > 1 or (content.roundings and content.dtype != memory.dtype):
            return f"rounded to {content.dtype} on the way to {memory.dtype}"
        target = dtype_of(memory.name, torch.empty(0, dtype=memory.dtype))
        floats = memory.dtype.is_floating_point and TORCH_DTYPES[spec.dtype].is_floating_point
        if spec.dtype != target and not floats and not castable(spec.dtype, target):
            return f"no cast from {spec.dtype.text} to {target.text}"
        try:
            cuts = tiles(memory, piece, tuple(spec.shape))
        except NotBoxesError as error:
            return str(error)
        self._cuts.setdefault(id(memory), []).extend((content.tensor, c) for c in cuts)
        if content.followed:
            self._followed.add(content.tensor)
        return None

    def _add(self, span: Span) -> bool:
        """One parameter with its tiles; False if no refit writes it."""
        memory = span.memory
        gaps = memory.all_gaps()
        pieces = memory.pieces()
        cuts = self._cuts.get(id(memory), [])
        computed = self._computed.get(id(memory), [])
        expected = [(p.offset, p.length) for p in computed if p.content.tensors]
        declared = not pieces and self._declared(span)
        if gaps and self._withheld and not declared:
            expected, gaps = expected + gaps, []
        chosen = self._found.fallback.keys()
        again = [(p.offset, p.length) for p in pieces if p.content.tensors <= chosen]
        self._staging.expect(memory, expected, allowed=again + expected)
        if not cuts and not any(isinstance(p.content, Zeros) for p in pieces):
            return self._leave(span, gaps, computed, expected)
        constant = [p for p in computed if not p.content.tensors]
        if gaps or constant:
            self._refuse(memory, gaps, constant)
        strides = row_major(memory.shape)
        name = memory.name
        handle = self._builder.parameter(name, dtype_of(name, span.tensor), memory.count)
        for tensor, part in merged(cuts):
            box = Box(part.offset, part.length)
            self._builder.tile(self._tensor(tensor), box, handle, part.far, part.strides)
            self._tiles[tensor] = self._tiles.get(tensor, 0) + 1
        zeros = [(p.offset, p.length) for p in pieces if isinstance(p.content, Zeros)]
        for offset, length in zeros + expected:
            at = sum(o * s for o, s in zip(offset, strides, strict=True))
            self._builder.fill(handle, at, length, strides)
        return True

    def _declared(self, span: Span) -> bool:
        return any(fnmatch.fnmatch(n, pattern) for n in span.names for pattern in self._unmanaged)

    def _leave(
        self,
        span: Span,
        gaps: list[tuple[Dims, Dims]],
        computed: list[Piece],
        expected: list[tuple[Dims, Dims]],
    ) -> bool:
        memory = span.memory
        if expected:
            if gaps:
                self._refuse(memory, gaps, [])
            self._left[memory.name] = "written by the engine's loader after every commit"
        elif self._declared(span):
            self._left[memory.name] = "declared unmanaged"
        elif computed and not gaps:
            reason = computed[0].content
            why = reason.reason if isinstance(reason, Computed) else ""
            self._left[memory.name] = f"the loader writes no catalog tensor there, but {why}"
        else:
            self._refuse(memory, gaps, [])
        return False

    def _refuse(self, memory: Memory, gaps: list[tuple[Dims, Dims]], constant: list[Piece]) -> None:
        if gaps:
            boxes = ", ".join(str(Box(*gap)) for gap in gaps[:_SHOWN])
            message = f"{memory.name}: expected the loader to write all of {memory.shape}, found"
            what = f"{message} {boxes} unwritten{_others(len(gaps) - _SHOWN)}"
            raise LayoutMismatchError(f"{what} (list it as unmanaged if it is not to be loaded)")
        piece = constant[0]
        reason = piece.content.reason if isinstance(piece.content, Computed) else ""
        message = f"{memory.name}: expected catalog tensors or zeros, found {reason} in"
        raise LayoutMismatchError(f"{message} {Box(piece.offset, piece.length)}")

    def _tensor(self, index: int) -> int:
        handle = self._tensors.get(index)
        if handle is None:
            spec = self._found.specs[index]
            handle = self._builder.tensor(spec.name, spec.dtype, spec.shape)
            self._tensors[index] = handle
        return handle

    def _ways(self) -> list[TensorWay]:
        ways = []
        for index, spec in enumerate(self._found.specs):
            count = self._tiles.get(index, 0)
            reason = self._found.fallback.get(index, "")
            asked = index in self._found.used or bool(reason)
            if reason:
                ways.append(TensorWay(spec.name, "fallback", reason, count))
            elif count or index in self._found.emptied:
                way = "followed" if index in self._followed else "direct"
                ways.append(TensorWay(spec.name, way, tile_count=count))  # type: ignore[arg-type]
            else:
                ways.append(TensorWay(spec.name, "unused", asked=asked))
        return ways


def _others(count: int) -> str:
    return f", and {count} more" if count > 0 else ""
