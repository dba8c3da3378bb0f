"""Memory that Transfuse allocates: the best route between processes of one host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transfuse._device import ordinal_of
from transfuse._transfuse import NativeArena
from transfuse.errors import ResourceExhaustedError
from transfuse.session import DEFAULT_JOB

if TYPE_CHECKING:
    import torch

_ALIGNMENT_BYTES = 256  # more than any vector load or cache line needs


class Arena(NativeArena):
    """Zeroed shared memory that readers map instead of copying it out of this process.

    A writable buffer: memoryview(arena) and torch.frombuffer(arena, ...) work, and the memory lives
    as long as a view of it. tensor() hands out one tensor after the other.

    With a `device` it is memory of that GPU, which no other allocator frees or moves: no buffer,
    but __cuda_array_interface__ (torch.as_tensor(arena, device=...), CuPy). Let no kernel use it
    when the last view goes.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        job: str = DEFAULT_JOB,
        threads: int | None = None,
        allow_any_tracer: bool | None = None,
        device: int | str | torch.device | None = None,
    ) -> None:
        super().__init__(
            size_bytes,
            job=job,
            threads=threads,
            allow_any_tracer=allow_any_tracer,
            device=ordinal_of(device),
        )
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What tensor() has handed out, with the gaps between."""
        return self._used_bytes

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed torch tensor on the next free bytes. ResourceExhaustedError where none are."""
        import torch

        count = math.prod(shape)
        place = None if self.device is None else f"cuda:{self.device}"
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=place)
        begin = aligned(self._used_bytes)
        end = begin + count * dtype.itemsize
        if end > self.size_bytes:
            message = f"arena: {end} bytes needed, it has {self.size_bytes}"
            raise ResourceExhaustedError(message)
        self._used_bytes = end
        if place is None:
            flat = torch.frombuffer(self, dtype=dtype, count=count, offset=begin)
        else:
            flat = torch.as_tensor(self, device=place)[begin:end].view(dtype)
        return flat.view(tuple(shape))


def aligned(size_bytes: int) -> int:
    """Rounded up to where tensor() begins a tensor."""
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
