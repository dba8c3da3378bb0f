"""What memcpy, or a copy within a GPU, reaches at this moment, to compare a refit with."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch


class Memcpy:
    """What memcpy reaches at this moment with the threads that a refit uses, or a GPU's own copy.

    The buffers take turns, so that they are no more in the caches than weights that another process
    has just written.
    """

    _FOOTPRINT_BYTES = 128 << 20  # beyond the last-level cache of most machines
    _ROUNDS = 5

    def __init__(self, size_bytes: int, device: torch.device | None = None) -> None:
        self._size_bytes = size_bytes
        self._device = device or torch.device("cpu")
        self._threads = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads)
        pairs = max(1, min(64, self._FOOTPRINT_BYTES // (2 * size_bytes)))
        self._pairs = itertools.cycle(
            (
                torch.ones(size_bytes, dtype=torch.uint8, device=self._device),
                torch.zeros(size_bytes, dtype=torch.uint8, device=self._device),
            )
            for _ in range(pairs)
        )

    def gigabytes_per_second(self) -> float:
        """The median of some copies of as many bytes as a refit writes."""
        copy = self._copy_by_threads if self._device.type == "cpu" else self._copy_on_device
        seconds = sorted(copy(*next(self._pairs)) for _ in range(self._ROUNDS))
        return self._size_bytes / seconds[self._ROUNDS // 2] / 1e9

    def _copy_by_threads(self, source: torch.Tensor, target: torch.Tensor) -> float:
        share = -(-self._size_bytes // self._threads)
        addresses = (target.data_ptr(), source.data_ptr())

        def copy(index: int) -> None:
            begin = min(index * share, self._size_bytes)
            count = min(share, self._size_bytes - begin)
            ctypes.memmove(addresses[0] + begin, addresses[1] + begin, count)

        start = time.perf_counter()
        list(self._pool.map(copy, range(self._threads)))
        return time.perf_counter() - start

    def _copy_on_device(self, source: torch.Tensor, target: torch.Tensor) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start
