"""Keys and values of the sequences that are being generated."""

from __future__ import annotations

import torch


class KvCache:
    """Preallocated: row i belongs to the i-th running sequence, column j to its position j.

    Nothing is masked here: a reader must not look beyond the positions that it wrote.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        columns: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, rows, columns, heads, head_dim)
        self._memory = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        """The most sequences."""
        return self._memory.shape[2]

    @property
    def columns(self) -> int:
        """The most positions of one sequence."""
        return self._memory.shape[3]

    def clear(self, rows: int, columns: int) -> None:
        """Zeros, so that what an earlier generation left (NaN, say) cannot pass through a mask."""
        self._memory[:, :, :rows, :columns].zero_()

    def write(
        self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Puts keys and values [rows, count, heads, head_dim] at `positions` [rows, count]."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self._memory[layer, 0][rows, positions] = keys
        self._memory[layer, 1][rows, positions] = values

    def read(self, layer: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values, each [rows, heads, columns, head_dim]."""
        keys, values = self._memory[layer, :, :rows, :columns].transpose(2, 3)
        return keys, values

    def keep(self, rows: torch.Tensor, columns: int) -> None:
        """Moves the given rows, ascending, to the front."""
        self._memory[:, :, : len(rows), :columns] = self._memory[:, :, rows, :columns]
