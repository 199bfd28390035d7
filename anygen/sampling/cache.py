"""Keys and values of every row and layer, in preallocated memory, and how many of them each row has.

Keys and values of one position stand side by side, so that what a pass adds is one copy a layer. Lengths are rounded up
to buckets, and rows are allocated ahead: rows join and leave without new memory.

Dimension key: R rows allocated, B rows in use, N length, C = 2 G E numbers a position (the G
key heads, then the G value heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST = 128


def bucket(length: int, longest: int) -> int:
    """The next power of two from `SHORTEST` on, at most `longest`.

    >>> bucket(5, 4096), bucket(129, 4096), bucket(3000, 3000)
    (128, 256, 3000)
    """
    return min(max(SHORTEST, 1 << max(0, length - 1).bit_length()), max(longest, length))


@dataclass(frozen=True)
class Prompt:
    """What one row holds, taken out of the cache."""

    layers: list[Tensor]
    """N x C each."""
    length: int


class Cache:
    """Rows 0 to B - 1 of `layers` are in use; `lengths_B` may be lowered to take ids back."""

    def __init__(self, num_layers: int, num_rows: int, length: int, numbers: int, like: Tensor) -> None:
        self.layers_RNC = [like.new_zeros(num_rows, length, numbers) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long, device=like.device)
        self._first_slots, self._stride = self.lengths_B[:0], 0

    @property
    def first_slots_B(self) -> Tensor:
        """Row x length of the rows allocated: where each begins when rows and positions are one dimension."""
        rows, length = self.capacity
        if len(self._first_slots) != rows or self._stride != length:
            self._stride, device = length, self.lengths_B.device
            self._first_slots = torch.arange(rows, device=device) * length
        return self._first_slots

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.lengths_B)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and length allocated."""
        return self.layers_RNC[0].shape[0], self.layers_RNC[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory allocated."""
        return sum(layer.nbytes for layer in self.layers_RNC)

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for at least so many rows, each of at least this length; what is there stays."""
        rows, longest = self.capacity
        if num_rows <= rows and length <= longest:
            return
        shape = (max(num_rows, rows), max(length, longest), self.layers_RNC[0].shape[2])
        used = self.num_rows
        for index, old in enumerate(self.layers_RNC):
            new = old.new_zeros(shape)
            new[:used, :longest] = old[:used]
            self.layers_RNC[index] = new

    def append(self, num_rows: int) -> list[int]:
        """Take so many more rows into use, empty; their numbers."""
        first = self.num_rows
        assert first + num_rows <= self.capacity[0], f"{first} + {num_rows} rows in a cache of {self.capacity[0]}"
        self.lengths_B = torch.cat([self.lengths_B, self.lengths_B.new_zeros(num_rows)])
        return list(range(first, first + num_rows))

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows, in this order, in new memory."""
        self.layers_RNC = [layer.index_select(0, rows) for layer in self.layers_RNC]
        self.lengths_B = self.lengths_B.index_select(0, rows)

    def rearrange(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` is, for fewer rows than before; rows that stay in place are not touched."""
        moves = [(target, source) for target, source in enumerate(rows) if target != source]
        self._copy([source for _, source in moves], [target for target, _ in moves])
        self.lengths_B = self.lengths_B[torch.tensor(rows, dtype=torch.long, device=self.lengths_B.device)]

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Give rows the content of another."""
        self._copy([source] * len(targets), targets)
        self.lengths_B[list(targets)] = int(self.lengths_B[source])

    def _copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if not sources:
            return
        device = self.lengths_B.device
        from_K, to_K = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        longest = int(self.lengths_B[from_K].max())
        for layer in self.layers_RNC:
            layer[to_K, :longest] = layer[from_K, :longest]

    def take_out(self, row: int) -> Prompt:
        """A copy of one row."""
        length = int(self.lengths_B[row])
        return Prompt([layer[row, :length].clone() for layer in self.layers_RNC], length)

    def put(self, prompt: Prompt, rows: Sequence[int]) -> None:
        """Write what `take_out` gave into rows."""
        for layer, kept in zip(self.layers_RNC, prompt.layers, strict=True):
            layer[list(rows), : prompt.length] = kept
        self.lengths_B[list(rows)] = prompt.length
