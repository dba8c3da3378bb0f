"""Runs of a loader on tensors without memory, of all of the catalog or of some."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from transfuse._capture.boxes import row_major
from transfuse._capture.catalog import meta_tensor
from transfuse._capture.follow import Follower, LooksAtValuesError
from transfuse._capture.memory import Memory, Moved, Zeros
from transfuse._capture.parameters import Span, spans_of
from transfuse._transfuse import TensorSpec
from transfuse.captured import LoadWeights
from transfuse.errors import LayoutMismatchError
from transfuse.guard import PointerGuard, PointerMovedError


@dataclass
class Followed:
    """What one run of the loader has shown."""

    spans: list[Span]
    specs: list[TensorSpec]
    used: set[int] = field(default_factory=set)  # catalog tensors that the loader asked for
    emptied: set[int] = field(default_factory=set)  # of which this process holds no element
    fallback: dict[int, str] = field(default_factory=dict)  # by catalog tensor: why


def follow(
    load_weights: LoadWeights, found: Followed, guard: PointerGuard
) -> LooksAtValuesError | None:
    """Runs the loader on what is not in found.fallback. Returns what it looked into, if it did."""
    follower = Follower()
    for span in found.spans:
        follower.add(span.memory, span.tensor)
    last: int | None = None  # what the loader has in its hands, None: all or nothing

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for index, spec in enumerate(found.specs):
            if index in found.fallback:
                continue
            follower.asleep = True
            tensor = meta_tensor(spec)
            follower.asleep = False
            shape = spec.shape
            memory = Memory(spec.name, "catalog", shape, tensor.dtype)
            if memory.count:
                zero = (0,) * len(shape)
                moved = Moved(index, 0, row_major(shape), tensor.dtype)
                memory.put(zero, memory.shape, moved)
            follower.add(memory, tensor)
            last = index
            found.used.add(index)
            yield spec.name, tensor
        last = None

    def at() -> str:
        return "nothing in particular" if last is None else found.specs[last].name

    try:
        with warnings.catch_warnings(), torch.no_grad(), follower:
            warnings.filterwarnings("ignore", message=".*copying from a .*meta.*")
            load_weights(weights())
    except LooksAtValuesError as looked:
        return looked
    except LayoutMismatchError as error:
        raise LayoutMismatchError(f"load_weights, at {at()}: {error}") from error
    except Exception as error:
        if last is not None and "meta" in str(error):
            return LooksAtValuesError(frozenset((last,)), str(error))
        message = f"load_weights failed at {at()}: expected it to take all {len(found.specs)}"
        what = f"{type(error).__name__}: {error}"
        raise LayoutMismatchError(f"{message} tensors, found {what}") from error
    finally:
        follower.restore()
        moved_parameter = _put_back(guard)
    if moved_parameter is not None:
        message = "load_weights gives a parameter other memory, which no refit could reach"
        raise LayoutMismatchError(f"{message}: {moved_parameter}") from moved_parameter
    if follower.outside is not None:
        raise LayoutMismatchError(f"load_weights: {follower.outside}")
    found.emptied = follower.emptied
    for tensor, where in follower.elsewhere.items():
        found.fallback.setdefault(tensor, where)
    return None


def _put_back(guard: PointerGuard) -> PointerMovedError | None:
    try:
        guard.check("load_weights")
    except PointerMovedError as error:
        guard.restore()
        return error
    return None


def settle(
    load_weights: LoadWeights,
    found: Followed,
    withheld: Mapping[int, str],
    named: Mapping[str, torch.Tensor],
    guard: PointerGuard,
) -> None:
    """Adds to the fallback what the loader needs to load the rest of it, and what it would spoil.

    A loader that collects tensors and writes them together cannot be given one of them. So it is
    run on the fallback alone: what it wrote before from these it must write again, and nothing on
    top of others. LayoutMismatchError if it does not, with whatever is added.
    """
    while found.fallback.keys() - withheld.keys():
        chosen = frozenset(found.fallback)
        others = {i: "" for i in range(len(found.specs)) if i not in chosen or i in withheld}
        trial = Followed(spans_of(named), found.specs, fallback=others)
        try:
            looked = follow(load_weights, trial, guard)
        except LayoutMismatchError as error:
            more, why = _neighbours(found, chosen), str(error)
            if not more:
                raise
        else:
            more, why = _disagreement(found, trial, chosen - withheld.keys())
            if looked is not None:
                more, why = _neighbours(found, chosen), f"it looks at values ({looked.operation})"
        if not why:
            return
        if not more - chosen:
            names = ", ".join(found.specs[t].name for t in sorted(chosen))
            expected = f"expected load_weights to load {names} without the others"
            raise LayoutMismatchError(f"{expected}, found: {why}")
        for tensor in more - chosen:
            found.fallback[tensor] = f"load_weights needs it for others of the fallback: {why}"


def _neighbours(found: Followed, chosen: frozenset[int]) -> frozenset[int]:
    """Tensors in the parameters of the chosen ones; if these are all, every one that was used."""
    near: frozenset[int] = frozenset()
    for span in found.spans:
        held = frozenset[int]().union(*(p.content.tensors for p in span.memory.pieces()))
        if held & chosen:
            near |= held
    return near if near - chosen else frozenset(found.used) - chosen


def _disagreement(
    found: Followed, trial: Followed, chosen: frozenset[int]
) -> tuple[frozenset[int], str]:
    """What else the fallback needs, and why; both empty if the loader can do with the chosen."""
    for before, after in zip(found.spans, trial.spans, strict=True):
        memory = before.memory
        for piece in after.memory.pieces():
            for old in memory.read(piece.offset, piece.length):
                others = old.content.tensors - chosen
                if others:
                    names = ", ".join(found.specs[t].name for t in sorted(others))
                    return others, f"{memory.name}: it would be written over {names}"
                if isinstance(old.content, Zeros) and not isinstance(piece.content, Zeros):
                    return _neighbours(found, chosen), f"{memory.name}: written over zeros"
        for piece in memory.pieces():
            if piece.content.tensors <= chosen and not isinstance(piece.content, Zeros):
                left = after.memory.gaps(piece.offset, piece.length)
                if left and piece.content.tensors:
                    return _neighbours(found, chosen), f"{memory.name}: it stays unwritten"
    return frozenset(), ""
