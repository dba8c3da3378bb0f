"""An engine whose memory sleeps and wakes as vLLM's sleep mode does it, in a process of its own.

Usage: python sleep_worker.py <options as JSON>; then commands (commanded.py). Tensors lie in a
torch.cuda.MemPool over an allocator of virtual memory mapping, without handle types: asleep nothing
is mapped, awake other physical memory lies at the same addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
import transfuse
from commanded import obey
from gpu_worker import layouts_of, values, zeros

# As cuda.h names and numbers them.
CU_MEM_ALLOCATION_TYPE_PINNED = 1
CU_MEM_HANDLE_TYPE_NONE = 0
CU_MEM_LOCATION_TYPE_DEVICE = 1
CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3
CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class SleepingMemory:
    """Allocations of torch that can all be unmapped and mapped again. Used from one thread."""

    def __init__(self, ordinal: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(ordinal))
        self._call("cuCtxSetCurrent", context)  # torch's own, which this thread may not have yet
        self._location = Location(CU_MEM_LOCATION_TYPE_DEVICE, ordinal)
        self._properties = Properties(
            CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_HANDLE_TYPE_NONE, self._location
        )
        granularity = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granularity),
            ctypes.byref(self._properties),
            ctypes.c_int(CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        )
        self._granularity = granularity.value
        self._sizes: dict[int, int] = {}  # by address
        self._handles: dict[int, int] = {}  # of what is mapped, by address
        allocate = ctypes.CFUNCTYPE(
            ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
        )
        free = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
        )
        self._callbacks = (allocate(self._allocate), free(self._free))
        addresses = [ctypes.cast(each, ctypes.c_void_p).value for each in self._callbacks]
        self._allocator = torch._C._cuda_customAllocator(*addresses)
        self._pool: torch.cuda.MemPool | None = torch.cuda.MemPool(self._allocator)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """What is allocated within the body can sleep."""
        with torch.cuda.use_mem_pool(self._pool):
            yield

    def close(self) -> None:
        """After the last tensor in it: at the end of the process nobody is left to be called."""
        self._pool = None
        torch.cuda.empty_cache()

    @property
    def size_bytes(self) -> int:
        """That are reserved, mapped or not."""
        return sum(self._sizes.values())

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in it."""
        place = tensor.data_ptr()
        return any(begin <= place < begin + size for begin, size in self._sizes.items())

    def sleep(self) -> None:
        """Gives all physical memory back to the device, and keeps the addresses."""
        torch.cuda.synchronize()
        for address in list(self._handles):
            self._unmap(address)

    def wake(self) -> None:
        """Other physical memory at the same addresses."""
        for address, size in self._sizes.items():
            self._map(address, size)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            message = f"{name} failed with {code}"
            raise RuntimeError(message)

    def _allocate(self, size: int, _device: int, _stream: int | None) -> int:
        size = -(-size // self._granularity) * self._granularity
        address = ctypes.c_uint64()
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            ctypes.c_uint64(0),
            ctypes.c_uint64(0),
        )
        self._map(address.value, size)
        self._sizes[address.value] = size
        return address.value

    def _free(self, address: int, _size: int, _device: int, _stream: int | None) -> None:
        if address in self._handles:
            self._unmap(address)
        size = self._sizes.pop(address)
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def _map(self, address: int, size: int) -> None:
        handle = ctypes.c_uint64()
        self._call(
            "cuMemCreate",
            ctypes.byref(handle),
            ctypes.c_size_t(size),
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        self._call(
            "cuMemMap",
            ctypes.c_uint64(address),
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            handle,
            ctypes.c_uint64(0),
        )
        access = Access(self._location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        self._call(
            "cuMemSetAccess",
            ctypes.c_uint64(address),
            ctypes.c_size_t(size),
            ctypes.byref(access),
            ctypes.c_size_t(1),
        )
        self._handles[address] = handle.value

    def _unmap(self, address: int) -> None:
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(self._sizes[address]))
        self._call("cuMemRelease", ctypes.c_uint64(self._handles.pop(address)))


class Engine:
    """A receiver over memory that sleeps."""

    def __init__(self, options: dict[str, Any]) -> None:
        place = torch.device(options["place"])
        torch.cuda.set_device(place)
        torch.cuda.synchronize()  # there is a context
        self._memory = SleepingMemory(place.index)
        self._layout = layouts_of("hf")[0]
        with self._memory.in_use():
            self._parameters = zeros(self._layout, options["place"])
        assert all(self._memory.holds(t) for t in self._parameters.values())
        self._job = options["job"]
        self._receiver = transfuse.Receiver(
            self._layout,
            self._parameters,
            name="engine0",
            into=options["into"],
            guard=self._parameters,
            job=self._job,
        )

    def refit(self, version: int) -> int:
        """Bytes that were proved."""
        return self._receiver.refit(exactly=version, timeout_s=20).verified_bytes

    def stage(self, version: int) -> None:
        """Into the shadow alone."""
        self._receiver.stage(exactly=version, timeout_s=20).wait(20)

    def commit(self) -> int:
        """Of what was staged."""
        return self._receiver.commit(timeout_s=20).version

    def version(self) -> int:
        """That the parameters hold, as the receiver has it."""
        return self._receiver.version

    def sleep(self) -> dict[str, int]:
        """Free bytes of the device before and after, and what the parameters had taken."""
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        self._memory.sleep()
        after = torch.cuda.mem_get_info()[0]
        return {"before": before, "after": after, "size_bytes": self._memory.size_bytes}

    def wake(self) -> None:
        """What lay in the memory is gone."""
        self._memory.wake()
        for tensor in self._parameters.values():
            tensor.fill_(7)

    def wrong(self, version: int) -> list[str]:
        """Parameters that do not hold this version."""
        wanted = values(self._layout, version)
        return [n for n, t in self._parameters.items() if not torch.equal(t.cpu(), wanted[n])]

    def leave(self) -> None:
        """The job, and the memory, asleep or awake."""
        self._receiver.close()
        del self._receiver  # its guard holds the tensors
        self._parameters.clear()
        self._memory.close()


if __name__ == "__main__":
    obey(Engine)
