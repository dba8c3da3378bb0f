"""What memcpy reaches at this moment, to compare a refit with."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch


class Memcpy:
    """What memcpy reaches at this moment with the threads that a refit uses.

    The buffers take turns, so that they are no more in the caches than weights that another process
    has just written.
    """

    _FOOTPRINT_BYTES = 128 << 20  # beyond the last-level cache of most machines
    _ROUNDS = 5

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._threads = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads)
        pairs = max(1, min(64, self._FOOTPRINT_BYTES // (2 * size_bytes)))
        self._pairs = itertools.cycle(
            (torch.ones(size_bytes, dtype=torch.uint8), torch.zeros(size_bytes, dtype=torch.uint8))
            for _ in range(pairs)
        )

    def gigabytes_per_second(self) -> float:
        """The median of some copies of as many bytes as a refit writes."""
        share = -(-self._size_bytes // self._threads)
        seconds = []
        for _ in range(self._ROUNDS):
            source, target = next(self._pairs)

            addresses = (target.data_ptr(), source.data_ptr())

            def copy(index: int, addresses: tuple[int, int] = addresses) -> None:
                begin = min(index * share, self._size_bytes)
                count = min(share, self._size_bytes - begin)
                ctypes.memmove(addresses[0] + begin, addresses[1] + begin, count)

            start = time.perf_counter()
            list(self._pool.map(copy, range(self._threads)))
            seconds.append(time.perf_counter() - start)
        return self._size_bytes / sorted(seconds)[self._ROUNDS // 2] / 1e9
