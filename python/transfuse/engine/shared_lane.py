"""Exchange between the ranks of one host: through shared memory, one small message to each peer."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from transfuse.errors import DeadlineExceededError, UnavailableError

_NUMBER = struct.Struct("<Q")
_NOTE = struct.Struct("<QQ")  # how many gathers went before, bytes: both as the peer has them


class SharedLane:
    """A slot of memory for every rank, and a socket between every two.

    A rank writes its slot, tells all peers, hears from all peers and reads their slots. There are
    two sets of slots that take turns: who has heard of gather n + 1 from all knows that nobody
    reads those of gather n any more. (The kernel orders the writes before the message.) Nothing of
    it has a name in a file system once it is open. Used from one thread.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, rank: int, size: int, slot_bytes: int, timeout_s: float
    ) -> None:
        """Collective over `group`, whose ranks must share a host and its temporary folder."""
        self.slot_bytes = slot_bytes
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._count = 0
        memory_bytes = 2 * size * slot_bytes
        if rank == 0:
            memory, sockets = _offer(group, size, memory_bytes, timeout_s)
        else:
            memory, sockets = _take(group, rank, size, timeout_s)
        mapping = mmap.mmap(memory, memory_bytes)
        os.close(memory)
        slots = torch.frombuffer(mapping, dtype=torch.uint8)
        self._slots = slots.view(2, size, slot_bytes)
        self._peers = sockets
        self.close = weakref.finalize(self, _close, list(sockets.values()))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *shape] of a contiguous tensor, overwritten by the next gather but one."""
        slots = self._slots[self._count % 2, :, : tensor.nbytes].view(tensor.dtype)
        slots[self._rank].copy_(tensor.view(-1))
        note = _NOTE.pack(self._count, tensor.nbytes)
        self._count += 1
        for rank, peer in self._peers.items():
            try:
                peer.send(note)
            except OSError as error:
                raise UnavailableError(f"rank {rank} of the engine is gone: {error}") from error
        for rank, peer in self._peers.items():
            try:
                heard = peer.recv(_NOTE.size)
            except TimeoutError as error:
                message = f"rank {rank} of the engine said nothing for {self._timeout_s} s"
                raise DeadlineExceededError(message) from error
            except OSError as error:
                raise UnavailableError(f"rank {rank} of the engine is gone: {error}") from error
            if heard != note:
                expected, found = _NOTE.unpack(note), _NOTE.unpack(heard) if heard else "its end"
                message = f"rank {rank} of the engine: expected (gather, bytes) {expected}"
                raise UnavailableError(f"{message}, found {found}")
        return slots.view(self._size, *tensor.shape)


def _offer(
    group: dist.ProcessGroup, size: int, memory_bytes: int, timeout_s: float
) -> tuple[int, dict[int, socket.socket]]:
    """Rank 0 makes memory and sockets, and hands each rank its own."""
    memory = os.memfd_create("transfuse-engine", os.MFD_CLOEXEC)
    os.posix_fallocate(memory, 0, memory_bytes)
    ends: dict[int, dict[int, socket.socket]] = {rank: {} for rank in range(size)}
    for low in range(size):
        for high in range(low + 1, size):
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends[low][high], ends[high][low] = pair
            for end in pair:
                end.settimeout(timeout_s)
    with tempfile.TemporaryDirectory(prefix="transfuse-") as folder:  # 0700
        path = str(Path(folder) / "lane")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(timeout_s)
            listener.bind(path)
            listener.listen(size)
            dist.broadcast_object_list([path], group=group, group_src=0)
            for _ in range(size - 1):
                connection, _address = listener.accept()
                with connection:
                    connection.settimeout(timeout_s)
                    (rank,) = _NUMBER.unpack(connection.recv(_NUMBER.size))
                    own = [end.fileno() for _, end in sorted(ends[rank].items())]
                    socket.send_fds(connection, [b"lane"], [memory, *own])
    for rank in range(1, size):
        _close(list(ends[rank].values()))  # so that the end of a rank is seen
    return memory, ends[0]


def _take(
    group: dist.ProcessGroup, rank: int, size: int, timeout_s: float
) -> tuple[int, dict[int, socket.socket]]:
    """Any other rank gets the memory and its ends of the sockets."""
    path: list[str] = [""]
    dist.broadcast_object_list(path, group=group, group_src=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        connection.connect(path[0])
        connection.send(_NUMBER.pack(rank))
        _, received, _, _ = socket.recv_fds(connection, 16, size, socket.MSG_CMSG_CLOEXEC)
    if len(received) != size:
        for descriptor in received:
            os.close(descriptor)
        raise UnavailableError(f"rank 0 of the engine gave {len(received)} of {size} descriptors")
    peers = [peer for peer in range(size) if peer != rank]
    sockets = {}
    for peer, descriptor in zip(peers, received[1:], strict=True):
        sockets[peer] = socket.socket(fileno=descriptor)
        sockets[peer].settimeout(timeout_s)
    return received[0], sockets


def _close(sockets: list[socket.socket]) -> None:
    for end in sockets:
        end.close()
