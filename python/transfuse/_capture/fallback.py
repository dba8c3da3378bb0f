"""Tensors that come in whole, and the engine's own loader that takes them from there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transfuse._capture.boxes import Dims, Loop
from transfuse._capture.catalog import meta_tensor
from transfuse._capture.follow import Operation, Values, place, written_by
from transfuse._capture.memory import Computed, Memory, write
from transfuse._capture.parameters import Span
from transfuse._transfuse import Box, TensorSpec
from transfuse.captured import LoadWeights
from transfuse.errors import LayoutMismatchError

PREFIX = "fallback:"
_WRITTEN = Computed("written")


class Staging:
    """Memory for whole catalog tensors, and what the loader must write when it gets them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}  # by catalog name
        self._expected: dict[str, list[tuple[Dims, Dims]]] = {}  # by parameter
        self._allowed: dict[str, Memory] = {}

    def add(self, spec: TensorSpec, *, real: bool) -> tuple[str, torch.Tensor]:
        """Name and memory of the parameter that a catalog tensor lands in."""
        tensor = meta_tensor(spec)
        if real:
            tensor = torch.zeros(spec.shape, dtype=tensor.dtype)
        self.tensors[spec.name] = tensor
        return f"{PREFIX}{spec.name}", tensor

    def expect(
        self,
        memory: Memory,
        boxes: list[tuple[Dims, Dims]],
        allowed: list[tuple[Dims, Dims]],
    ) -> None:
        """Places of a parameter that the loader must write, and those that it may write."""
        self._expected[memory.name] = boxes
        places = Memory(memory.name, "scratch", memory.shape, memory.dtype)
        for box in allowed:
            places.put(*box, _WRITTEN)
        self._allowed[memory.name] = places

    def loader(self, load_weights: LoadWeights, spans: list[Span]) -> Callable[[], None]:
        """Loads what is staged; LayoutMismatchError if it does not write what it is for alone."""

        def load() -> None:
            recorder = _Recorder(spans)
            with torch.no_grad(), recorder:
                load_weights(iter(self.tensors.items()))
            for memory in recorder.memories:
                self._check(memory)

        return load

    def _check(self, written: Memory) -> None:
        name, given = written.name, ", ".join(self.tensors)
        expected = f"{name}: expected load_weights to write what is left to it from {given}"
        for box in self._expected[name]:
            for gap in written.gaps(*box):
                raise LayoutMismatchError(f"{expected}, found {Box(*gap)} unwritten")
        for piece in written.pieces():
            for gap in self._allowed[name].gaps(piece.offset, piece.length):
                message = f"{expected}, found that it wrote {Box(*gap)}, which holds other tensors"
                raise LayoutMismatchError(message)


class _Recorder(TorchDispatchMode):
    """Lets everything happen and notes which elements of parameters were written."""

    def __init__(self, spans: list[Span]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories: list[Memory] = []
        self._by_storage: dict[int, list[Memory]] = {}
        for span in spans:
            held = span.memory
            memory = Memory(held.name, "scratch", held.shape, held.dtype, held.begin)
            self.memories.append(memory)
            storage = span.tensor.untyped_storage()._cdata
            self._by_storage.setdefault(storage, []).append(memory)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so would import the compiler

    def __torch_dispatch__(
        self,
        func: Operation,
        types: object,
        args: tuple[Values, ...] = (),
        kwargs: dict[str, Values] | None = None,
    ) -> Values:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for target in written_by(func, args, kwargs):
                self._note(target)
        return func(*args, **kwargs)

    def _note(self, target: torch.Tensor) -> None:
        at = place(target)
        for memory in self._by_storage.get(target.untyped_storage()._cdata, ()):
            if not memory.begin <= at < memory.begin + memory.count:
                continue
            if target.dtype.itemsize != memory.dtype.itemsize:
                memory.put((0,) * len(memory.shape), memory.shape, _WRITTEN)
                continue
            steps = zip(target.shape, target.stride(), strict=True)
            write(memory, at - memory.begin, [Loop(n, s, 0) for n, s in steps], _WRITTEN)
