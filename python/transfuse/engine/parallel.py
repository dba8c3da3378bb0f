"""What the ranks of one engine say to each other."""

from __future__ import annotations

import torch
import torch.distributed as dist

from transfuse.errors import InvalidArgumentError, UnavailableError


class TensorParallel:
    """The tensor parallel group of one engine, as the caller made it; None: one rank, no group.

    Every call is collective and ends by the timeout that the group was made with; a rank that is
    gone or silent is an UnavailableError on the others. Results are bit-identical on all ranks.
    Used from one thread.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidArgumentError(
                "tensor parallel group: this process is not one of its ranks"
            )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, added in rank order and rounded once."""
        # A gather, where an all-reduce would send less from three ranks on: it has one phase, not
        # two, and for the few hundred KiB of a step what counts is how often a rank waits.
        return tensor if self.size == 1 else self._gather(tensor).sum(dim=0)

    def gather_columns(self, local: torch.Tensor, note: bool) -> tuple[torch.Tensor, bool]:
        """[rows, columns] of every rank side by side in rank order, and the `note` of rank 0."""
        if self.size == 1:
            return local, note
        message = local.new_empty(1 + local.numel())
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
        """[ranks, *shape]."""
        parts = tensor.new_empty((self.size, *tensor.shape))
        try:
            dist.all_gather(list(parts.unbind()), tensor.contiguous(), group=self._group)
        except RuntimeError as error:
            raise UnavailableError(f"a rank of the engine is gone or silent: {error}") from error
        return parts
