"""Where parameters lie, and whether they still do: an engine's graphs read old addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from transfuse._transfuse import ErrorCode
from transfuse.errors import InvalidArgumentError, TransfuseError

if TYPE_CHECKING:
    import torch


class PointerMovedError(TransfuseError):
    """A parameter lies in other memory than it did: what reads the old address reads old weights.

    `parameter` names it; `expected` and `found` say where it was and where it is (None: gone).
    """

    code: ClassVar[ErrorCode] = ErrorCode.LAYOUT_MISMATCH

    def __init__(self, parameter: str, expected: Place, found: Place | None, when: str) -> None:
        where = "none of that name" if found is None else str(found)
        super().__init__(
            f"{parameter}: moved ({when}): expected {expected}, found {where}; bring it back "
            "(PointerGuard.restore()), or close what reads or writes the old place, also graphs "
            "that were captured, and open it anew"
        )
        self.parameter = parameter
        self.expected = expected
        self.found = found


class Place(NamedTuple):
    """Address of a tensor and the allocation that it lies in."""

    address: int
    storage: int
    storage_bytes: int
    offset: int  # in elements, within the allocation
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.address:#x} in an allocation at {self.storage:#x} of {self.storage_bytes} "
            f"bytes, element {self.offset}, {self.dtype} {self.shape} strides {self.strides}"
        )


class PointerGuard:
    """Remembers where tensors lie. A module or a callable is asked anew at every check.

    Used from one thread.
    """

    def __init__(
        self,
        tensors: torch.nn.Module
        | Mapping[str, torch.Tensor]
        | Callable[[], Mapping[str, torch.Tensor]],
    ) -> None:
        self._given = tensors
        now = named_tensors_of(tensors)
        self._places = {name: place_of(tensor) for name, tensor in now.items()}
        self._tensors = now
        # Views of the same memory: no allocation can take an old one's place unseen.
        self._held = {name: tensor.detach() for name, tensor in now.items()}

    def check(self, when: str = "check") -> None:
        """PointerMovedError names the first parameter that lies elsewhere."""
        now = named_tensors_of(self._given)
        for name, expected in self._places.items():
            tensor = now.get(name)
            found = None if tensor is None else place_of(tensor)
            if found != expected:
                raise PointerMovedError(name, expected, found, when)

    def restore(self) -> None:
        """Gives parameters the memory back that they had; a module gets the same objects back."""
        for name, tensor in self._tensors.items():
            if place_of(tensor) != self._places[name]:
                tensor.data = self._held[name]
        if hasattr(self._given, "get_submodule"):
            for name, tensor in self._tensors.items():
                owner, _, leaf = name.rpartition(".")
                setattr(self._given.get_submodule(owner), leaf, tensor)


def place_of(tensor: torch.Tensor) -> Place:
    """Where a tensor lies."""
    storage = tensor.untyped_storage()
    # Without memory there is no address; what tells one allocation from another is the object.
    base = int(storage._cdata if tensor.is_meta else storage.data_ptr())
    offset = int(tensor.storage_offset())
    return Place(
        address=base + offset * tensor.element_size(),
        storage=base,
        storage_bytes=storage.nbytes(),
        offset=offset,
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        dtype=str(tensor.dtype),
    )


def named_tensors_of(
    given: torch.nn.Module | Mapping[str, torch.Tensor] | Callable[[], Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The tensors of a module (all names of tied ones), a mapping, or what a callable says."""
    if hasattr(given, "named_parameters"):
        return dict(given.named_parameters(remove_duplicate=False))
    if isinstance(given, Mapping):
        return dict(given)
    if callable(given):
        return dict(given())
    found = type(given).__name__
    raise InvalidArgumentError(f"expected a module or tensors by name, found {found}")
