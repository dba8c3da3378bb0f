"""Watches what a loader does with tensors, operation by operation, and does none of it for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from transfuse._capture.boxes import Loop, NotBoxesError, OutsideError, cut
from transfuse._capture.memory import (
    Change,
    Computed,
    Content,
    Memory,
    Zeros,
    move,
    write,
)
from transfuse.errors import LayoutMismatchError

aten = torch.ops.aten
Tensor = torch.Tensor
Operation = Any  # of torch; its stubs say no more
Values = Any  # arguments and results of any kind


class LooksAtValuesError(Exception):
    """The loader wants to know elements, of these catalog tensors."""

    def __init__(self, tensors: frozenset[int], operation: str) -> None:
        super().__init__(operation)
        self.tensors = tensors
        self.operation = operation


class Follower(TorchDispatchMode):
    """What is written to the memories that it knows is noted as boxes, and not done.

    Operations on tensors that it knows nothing of are done. What they change of the engine's other
    tensors is put back by restore().
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asleep = False  # while we make tensors ourselves
        self._memories: dict[int, list[Memory]] = {}  # by storage
        self._alive: list[object] = []  # a storage that is freed would give its identity away
        self._made: dict[int, Tensor] = {}  # by storage: real tensors that the loader has made
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # the engine's others, before a change
        self.outside: LayoutMismatchError | None = None  # the first access beyond a memory
        self.emptied: set[int] = set()  # catalog tensors of which no element was wanted
        self.elsewhere: dict[int, str] = {}  # by catalog tensor: where it went that is no parameter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so would import the compiler

    def add(self, memory: Memory, tensor: Tensor) -> None:
        """From now on `memory` says what lies in this tensor's storage, from memory.begin on."""
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._memories.setdefault(storage._cdata, []).append(memory)

    def restore(self) -> None:
        """Gives the engine's tensors that are no parameters what they held before."""
        for tensor, before in self._saved.values():
            tensor.copy_(before)

    def __torch_dispatch__(
        self,
        func: Operation,
        types: object,
        args: tuple[Values, ...] = (),
        kwargs: dict[str, Values] | None = None,
    ) -> Values:
        kwargs = kwargs or {}
        if self.asleep:
            return func(*args, **kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        if _is_view(func):
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if func in _BLANK or not any(self.known(tensor) for tensor in inputs):
            return self._really(func, args, kwargs)
        tensors, blind = self._contributors(inputs)
        if func in _LOOKS:
            raise LooksAtValuesError(tensors, str(func))
        return self._compute(func, args, kwargs, Computed(blind or str(func), tensors))

    # What is known of tensors

    def memory_of(self, tensor: Tensor) -> Memory | None:
        """The memory that a tensor begins in."""
        memories = self._memories.get(tensor.untyped_storage()._cdata)
        if memories is None:
            return None
        if len(memories) == 1:
            return memories[0]
        at = tensor.storage_offset() * tensor.element_size()
        for memory in memories:
            size = memory.dtype.itemsize
            if memory.begin * size <= at < (memory.begin + memory.count) * size:
                return memory
        return None

    def known(self, tensor: Tensor) -> bool:
        """Whether its elements are not those of its real memory."""
        memory = self.memory_of(tensor)
        return memory is not None and (memory.kind != "parameter" or memory.written())

    def content(self, tensor: Tensor) -> Iterable[Content]:
        """All that lies in a tensor."""
        memory = self.memory_of(tensor)
        if memory is None or not self.known(tensor):
            return []
        if tensor.element_size() != memory.dtype.itemsize:
            return [piece.content for piece in memory.pieces()]
        loops = [Loop(n, s, 0) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        at = place(tensor) - memory.begin
        try:
            parts = cut(memory.shape, at, 0, loops)
        except NotBoxesError:
            return [piece.content for piece in memory.pieces()]
        return [p.content for part in parts for p in memory.read(part.offset, part.length)]

    def _contributors(self, inputs: Iterable[Tensor]) -> tuple[frozenset[int], str]:
        """The catalog tensors in the inputs, and why what they hold cannot be followed, if so."""
        tensors: frozenset[int] = frozenset()
        blind = ""
        for tensor in inputs:
            for content in self.content(tensor):
                tensors |= content.tensors
                if isinstance(content, Computed):
                    blind = blind or content.reason
        return tensors, blind

    # Operations that make something new

    def _really(self, func: Operation, args: Values, kwargs: Values) -> Values:
        made = func(*args, **kwargs)
        for leaf in tree_flatten(made)[0]:
            if not isinstance(leaf, Tensor):
                continue
            if leaf.is_meta:
                self._scratch(leaf, _BLANK.get(func))
            else:
                self._alive.append(leaf)
                self._made[leaf.untyped_storage()._cdata] = leaf
        return made

    def _scratch(self, tensor: Tensor, content: Content | None) -> Memory:
        """New memory of the loader's own; None: nothing is known of what it holds."""
        found = self.memory_of(tensor)
        if found is not None:
            return found
        dense = tensor.is_contiguous()
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        shape = tuple(tensor.shape) if dense else (count,)
        memory = Memory("", "scratch", shape, tensor.dtype)
        if content is not None and memory.count:
            memory.put((0,) * len(shape), shape, content)
        self.add(memory, tensor)
        return memory

    def _compute(self, func: Operation, args: Values, kwargs: Values, content: Computed) -> Values:
        made = func(*_on_meta(args), **_on_meta(kwargs))
        for leaf in tree_flatten(made)[0]:
            if isinstance(leaf, Tensor):
                self._scratch(leaf, content)
        return made

    def new_like(self, func: Operation, args: Values, kwargs: Values) -> Tensor:
        """What the operation makes, without any content."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        made: Tensor = func(*_on_meta(args), **_on_meta(kwargs))
        self._scratch(made, None)
        return made

    # Operations that write

    def copy(self, target: Tensor, source: Tensor, *, followed: bool = False) -> None:
        """target.copy_(source), noted. Shapes are broadcast as torch does."""
        source = source.expand(target.shape)
        loops = [
            Loop(n, a, b)
            for n, a, b in zip(target.shape, source.stride(), target.stride(), strict=True)
        ]
        self.copy_loops(
            target,
            place(target),
            source,
            place(source),
            loops,
            followed=followed,
        )

    def copy_loops(
        self,
        target: Tensor,
        target_at: int,
        source: Tensor,
        source_at: int,
        loops: list[Loop],
        *,
        followed: bool = False,
    ) -> None:
        """A copy along loops from storage element to storage element."""
        into, held = self.memory_of(target), self.memory_of(source)
        if into is None:
            raise LayoutMismatchError("a copy into memory that is not followed")
        if held is None or not self.known(source):
            self._write(into, target, target_at, loops, _constant(source))
            return
        bits = target.dtype == source.dtype and into.dtype == held.dtype
        if source.dtype != held.dtype or target.dtype != into.dtype:
            followed = True
            if not bits or source.element_size() != held.dtype.itemsize:
                tensors, _ = self._contributors([source])
                reason = f"read as {source.dtype} and written as {target.dtype}"
                self._write(into, target, target_at, loops, Computed(reason, tensors))
                return
        if target.numel() == 0:
            whole = [piece.content.tensors for piece in held.pieces()]
            self.emptied |= frozenset[int]().union(*whole)
            return
        through = followed or (held.kind != "catalog" and into.kind == "parameter")
        change = Change(into.dtype if bits else target.dtype, through or into.kind == "scratch")
        at, near = target_at - into.begin, source_at - held.begin
        try:
            move(into, at, held, near, loops, change)
        except NotBoxesError as error:
            tensors, _ = self._contributors([source])
            self._write(into, target, target_at, loops, Computed(str(error), tensors))
        except OutsideError as error:
            raise self._outside(into, target, error) from error

    def fill(self, target: Tensor, content: Content) -> None:
        """All elements of a tensor, noted."""
        memory = self.memory_of(target)
        if memory is None:
            raise LayoutMismatchError("a fill of memory that is not followed")
        loops = [Loop(n, 0, s) for n, s in zip(target.shape, target.stride(), strict=True)]
        self._write(memory, target, place(target), loops, content)

    def _write(
        self, memory: Memory, target: Tensor, at: int, loops: list[Loop], content: Content
    ) -> None:
        if target.element_size() != memory.dtype.itemsize:
            whole = frozenset[int]().union(content.tensors, *self._held(memory))
            reason = f"written as {target.dtype}, which is not its dtype"
            memory.put((0,) * len(memory.shape), memory.shape, Computed(reason, whole))
            return
        turned = [Loop(n, b, 0) for n, _, b in loops]
        try:
            write(memory, at - memory.begin, turned, content)
        except NotBoxesError as error:
            whole = frozenset[int]().union(content.tensors, *self._held(memory))
            memory.put((0,) * len(memory.shape), memory.shape, Computed(str(error), whole))
        except OutsideError as error:
            raise self._outside(memory, target, error) from error

    def _held(self, memory: Memory) -> list[frozenset[int]]:
        return [piece.content.tensors for piece in memory.pieces()]

    def _outside(self, memory: Memory, target: Tensor, error: OutsideError) -> LayoutMismatchError:
        found = f"{error}, by a view of shape {tuple(target.shape)}, strides {target.stride()}"
        expected = f"expected an access within {memory.shape}"
        message = f"{memory.name or memory.kind}: {expected}, found {found}"
        self.outside = self.outside or LayoutMismatchError(message)
        return LayoutMismatchError(message)

    def _mutate(self, func: Operation, args: Values, kwargs: Values) -> Values:
        """An operation in place of which nothing more is known."""
        targets = written_by(func, args, kwargs)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not any(self.known(t) for t in inputs) and not any(
            self.memory_of(t) is not None for t in targets
        ):
            return self._change(func, args, kwargs, targets)
        tensors, blind = self._contributors(inputs)
        for target in targets:
            self.receive(target, Computed(blind or str(func), tensors))
        return targets[0] if len(targets) == 1 else tuple(targets)

    def receive(self, target: Tensor, content: Computed) -> None:
        """Values of a computation, or whatever, go into a tensor."""
        if self.take_over(target):
            self.fill(target, content)
        else:
            for tensor in content.tensors:
                self.elsewhere[tensor] = f"goes to {_what(target)}, which is no parameter"

    def take_over(self, target: Tensor) -> bool:
        """Whether writes to a tensor can be noted; memory that the loader has made can."""
        if self.memory_of(target) is not None:
            return True
        made = self._made.get(target.untyped_storage()._cdata)
        if made is None and not target.is_meta:
            return False
        whole = target if made is None else made
        held = Zeros() if not whole.is_meta and not _any(whole) else Computed("a constant")
        self._scratch(whole, held)
        return True

    def _change(
        self, func: Operation, args: Values, kwargs: Values, targets: list[Tensor]
    ) -> Values:
        """For real, on memory that has nothing to do with the catalog."""
        for target in targets:
            identity = target.untyped_storage()._cdata
            if identity not in self._made and identity not in self._saved and not target.is_meta:
                flat = torch.empty(0, dtype=target.dtype, device=target.device)
                flat.set_(target.untyped_storage())
                self._saved[identity] = (flat, flat.clone())
        return func(*args, **kwargs)


# Operations that move elements


def _copy(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    target, source = args[0], args[1]
    if not self.known(source) and self.memory_of(target) is None:
        return self._change(func, args, kwargs, [target])
    if self.take_over(target):
        self.copy(target, source)
    else:
        self.receive(target, Computed("", self._contributors([source])[0]))
    return target


def _fill(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    target = args[0]
    value = args[1] if len(args) > 1 else 0
    if isinstance(value, Tensor) and self.known(value):
        self.receive(target, Computed(str(func), self._contributors([value])[0]))
    elif self.memory_of(target) is None:
        return self._change(func, args, kwargs, [target])
    else:
        number = value.item() if isinstance(value, Tensor) else value
        self.fill(target, _number(number))
    return target


def _clone(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    if not self.known(args[0]):
        if kwargs.get("device") == _META and not args[0].is_meta:
            del kwargs["device"]  # an index is worth nothing without its values
        return self._really(func, args, kwargs)
    made = self.new_like(func, args, kwargs)
    if made.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
        if made.shape == args[0].shape:
            self.copy(made, args[0], followed=True)
        else:  # _unsafe_view: the same elements in another shape
            self.copy(made, args[0].view(made.shape), followed=True)
    return made


def _joined(stacked: bool) -> Callable[..., Any]:
    def join(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
        parts: Sequence[Tensor] = args[0]
        if not any(self.known(part) for part in parts):
            return self._really(func, args, kwargs)
        made = self.new_like(func, args, kwargs)
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim, at = dim % made.dim(), 0
        for part in parts:
            if stacked:
                self.copy(made.select(dim, at), part, followed=True)
                at += 1
            elif part.dim() == made.dim():
                self.copy(made.narrow(dim, at, part.shape[dim]), part, followed=True)
                at += part.shape[dim]
        return made

    return join


def _flip(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    source, dims = args[0], {d % max(1, args[0].dim()) for d in args[1]}
    if not self.known(source):
        return self._really(func, args, kwargs)
    made = self.new_like(func, args, kwargs)
    at, loops = place(source), []
    for d, (n, a, b) in enumerate(zip(source.shape, source.stride(), made.stride(), strict=True)):
        if d in dims and n:
            at += (n - 1) * a
        loops.append(Loop(n, -a if d in dims else a, b))
    self.copy_loops(made, place(made), source, at, loops, followed=True)
    return made


def _repeat(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    source, times = args[0], args[1]
    if not self.known(source):
        return self._really(func, args, kwargs)
    made = self.new_like(func, args, kwargs)
    extra = made.dim() - source.dim()
    shape, strides = (1,) * extra + tuple(source.shape), (0,) * extra + source.stride()
    loops = []
    for n, a, b, count in zip(shape, strides, made.stride(), times, strict=True):
        loops += [Loop(n, a, b), Loop(count, 0, b * n)]
    self.copy_loops(made, 0, source, place(source), loops, followed=True)
    return made


def _pad(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    source, pads = args[0], args[1]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if not self.known(source) or any(pad < 0 for pad in pads):
        return _plain(self, func, args, kwargs)
    made = self.new_like(func, args, kwargs)
    self.fill(made, _number(value))
    place = made
    for index in range(len(pads) // 2):
        dim = source.dim() - 1 - index
        place = place.narrow(dim, pads[2 * index], source.shape[dim])
    self.copy(place, source, followed=True)
    return made


def _index_select(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    source, dim, index = args[0], args[1], args[2]
    if not self.known(source) or self.known(index) or index.is_meta:
        return _plain(self, func, args, kwargs)
    made = self.new_like(func, args, kwargs)
    _take(self, made, source, dim % max(1, source.dim()), index)
    return made


def _index(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    """x[..., constant vector, ...]"""
    source, indices = args[0], args[1]
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    simple = len(given) == 1 and given[0][1].dim() == 1 and not given[0][1].is_meta
    if not self.known(source) or not simple or self.known(given[0][1]):
        return _plain(self, func, args, kwargs)
    dim, index = given[0]
    if index.dtype == torch.bool:
        index = index.nonzero().view(-1)
    index = torch.where(index < 0, index + source.shape[dim], index)
    made = self.new_like(aten.index_select.default, (source, dim, index), {})
    _take(self, made, source, dim, index)
    return made


def _index_copy(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    target, dim, index, source = args[:4]
    constant = not self.known(index) and not index.is_meta
    if not constant or self.memory_of(target) is None:
        return self._mutate(func, args, kwargs)
    for to, at, count in _ranges(index):
        self.copy(target.narrow(dim, to, count), source.narrow(dim, at, count), followed=True)
    return target


def _take(self: Follower, made: Tensor, source: Tensor, dim: int, index: Tensor) -> None:
    for begin, at, count in _ranges(index):
        self.copy(made.narrow(dim, at, count), source.narrow(dim, begin, count), followed=True)


def _ranges(index: Tensor) -> Iterable[tuple[int, int, int]]:
    """(first value, its position, count) of values that follow one another."""
    values = index.tolist()
    at = 0
    while at < len(values):
        count = 1
        while at + count < len(values) and values[at + count] == values[at] + count:
            count += 1
        yield values[at], at, count
        at += count


def _plain(self: Follower, func: Operation, args: Values, kwargs: Values) -> Values:
    """As an operation of which nothing is known."""
    inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    if not any(self.known(tensor) for tensor in inputs):
        return self._really(func, args, kwargs)
    tensors, blind = self._contributors(inputs)
    return self._compute(func, args, kwargs, Computed(blind or str(func), tensors))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.zero_.default: _fill,
    aten.clone.default: _clone,
    aten._to_copy.default: _clone,
    aten._unsafe_view.default: _clone,
    aten.cat.default: _joined(stacked=False),
    aten.stack.default: _joined(stacked=True),
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    aten.constant_pad_nd.default: _pad,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.index_copy_.default: _index_copy,
}
# New memory that takes no more than its form from what is given; None: no content.
_BLANK: dict[Operation, Content | None] = {
    aten.zeros.default: Zeros(),
    aten.zeros_like.default: Zeros(),
    aten.new_zeros.default: Zeros(),
    aten.empty.memory_format: None,
    aten.empty_like.default: None,
    aten.empty_strided.default: None,
    aten.new_empty.default: None,
    aten.new_empty_strided.default: None,
    aten.ones.default: Computed("the constant 1"),
    aten.ones_like.default: Computed("the constant 1"),
    aten.new_ones.default: Computed("the constant 1"),
    aten.full.default: Computed("a constant"),
    aten.full_like.default: Computed("a constant"),
    aten.new_full.default: Computed("a constant"),
}
_LOOKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}
_VIEWS: dict[Any, bool] = {}
_META = torch.device("meta")


def place(tensor: Tensor) -> int:
    """The first storage element of a tensor."""
    return int(tensor.storage_offset())


def _is_view(func: Operation) -> bool:
    """Whether the result lies in the memory of an argument, and nothing is written."""
    found = _VIEWS.get(func)
    if found is None:
        infos = [returned.alias_info for returned in func._schema.returns]
        found = any(info is not None and not info.is_write for info in infos)
        _VIEWS[func] = found
    return found


def written_by(func: Operation, args: Values, kwargs: Values) -> list[Tensor]:
    """The tensors that an operation changes."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return found


def _on_meta(values: Values) -> Values:
    def bare(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(Tensor, bare, values)


def _number(value: float) -> Content:
    zero = value == 0 and math.copysign(1.0, value) > 0
    return Zeros() if zero else Computed(f"the constant {value}")


def _constant(tensor: Tensor) -> Content:
    if tensor.is_meta:
        return Computed("memory of which nothing is known")
    return Computed("a constant") if _any(tensor) else Zeros()


def _any(tensor: Tensor) -> bool:
    return bool(tensor.detach().reshape(-1).view(torch.uint8).any())


def _what(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
