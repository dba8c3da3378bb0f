"""What the ranks of one engine say to each other."""

from __future__ import annotations

import torch
import torch.distributed as dist

from transfuse.engine.shared_lane import SharedLane
from transfuse.errors import InvalidArgumentError, UnavailableError

_SLOT_BYTES = 1 << 20  # a step of 256 sequences with 1,024 hidden f32; longer messages take gloo


class TensorParallel:
    """The tensor parallel group of one engine, as the caller made it; None: one rank, no group.

    With `one_host`, which all ranks must say or none, what a step exchanges goes through shared
    memory: the two threads that gloo wakes on either side cost more than the arithmetic of a small
    model. Every call is collective and ends by the timeout that the group was made with, or by
    `timeout_s` in shared memory; a rank that is gone is an UnavailableError on the others. Results
    are bit-identical on all ranks. Used from one thread.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        one_host: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidArgumentError(
                "tensor parallel group: this process is not one of its ranks"
            )
        self._lane: SharedLane | None = None
        if group is not None and one_host and self.size > 1:
            self._lane = SharedLane(
                group,
                rank=self.rank,
                size=self.size,
                slot_bytes=_SLOT_BYTES,
                timeout_s=timeout_s,
            )

    def close(self) -> None:
        """Lets the shared memory go; peers that wait for this rank fail at once."""
        if self._lane is not None:
            self._lane.close()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, added in rank order and rounded once."""
        # A gather, where an all-reduce would send less from three ranks on: it has one phase, not
        # two, and for the few hundred KiB of a step what counts is how often a rank waits.
        return tensor if self.size == 1 else self._gather(tensor).sum(dim=0)

    def gather_columns(self, local: torch.Tensor, note: bool) -> tuple[torch.Tensor, bool]:
        """[rows, columns] of every rank side by side in rank order, and the `note` of rank 0."""
        if self.size == 1:
            return local, note
        message = torch.empty(1 + local.numel(), dtype=local.dtype)
        message[0] = float(note)
        message[1:].view(local.shape).copy_(local)
        parts = self._gather(message)
        columns = parts[:, 1:].view(self.size, *local.shape)
        return torch.cat(columns.unbind(), dim=-1), bool(parts[0, 0])

    def gather_numbers(self, *numbers: int) -> list[list[int]]:
        """The int64 numbers of every rank, by rank."""
        if self.size == 1:
            return [list(numbers)]
        said: list[list[int]] = self._gather(torch.tensor(numbers, dtype=torch.int64)).tolist()
        return said

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *shape]; valid until the next call."""
        tensor = tensor.contiguous()
        if self._lane is not None and tensor.nbytes <= self._lane.slot_bytes:
            return self._lane.gather(tensor)
        parts = tensor.new_empty((self.size, *tensor.shape))
        try:
            dist.all_gather(list(parts.unbind()), tensor, group=self._group)
        except RuntimeError as error:
            raise UnavailableError(f"a rank of the engine is gone or silent: {error}") from error
        return parts
