"""Keys and values of every row and layer, in preallocated memory, and how many of them each row has.

The keys of a row's head stand one after another, and so do its values: attention of one query reads them all, and a CPU
does so twice as fast without gaps (benchmarks/README.md). So there lengths grow in small steps (`snug`), while a GPU,
whose shapes should stay the same, takes powers of two (`bucket`). Rows are allocated ahead: they join and leave without
new memory.

Dimension key: R rows allocated, B rows in use, G key/value heads, N length, E head width, M ids. 2 is keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST = 128
_STEP = 32


def bucket(length: int, longest: int) -> int:
    """The next power of two from `SHORTEST` on, at most `longest`.

    >>> bucket(5, 4096), bucket(129, 4096), bucket(3000, 3000)
    (128, 256, 3000)
    """
    return min(max(SHORTEST, 1 << max(0, length - 1).bit_length()), max(longest, length))


def snug(length: int, longest: int) -> int:
    """The next multiple of a small step, of a power of two up to an eighth of long ones; at most `longest`.

    >>> snug(5, 4096), snug(130, 4096), snug(2000, 4096), snug(90, 90)
    (32, 160, 2048, 90)
    """
    step = max(_STEP, 1 << (length // 8).bit_length() - 1 if length >= 8 * _STEP else 0)
    return max(min(-(-length // step) * step, longest), length)


@dataclass(frozen=True)
class Prompt:
    """What one row holds, taken out of the cache."""

    layers: list[Tensor]
    """2 x G x N x E each."""
    length: int


class Cache:
    """Rows 0 to B - 1 of `layers` are in use; `lengths_B` may be lowered to take ids back.

    What lies beyond a row's length is stale, or zero, but always finite: attention gives it no weight.
    """

    def __init__(
        self, num_layers: int, num_rows: int, length: int, heads: tuple[int, int], like: Tensor, *, ahead: int = 0
    ) -> None:
        """Memory for rows of length `ahead`, laid out without gaps for rows of `length`; heads are G x E."""
        shape = (2, num_rows, heads[0], length, heads[1])
        size = 2 * num_rows * heads[0] * max(length, ahead) * heads[1]
        self._memory = [like.new_zeros(size) for _ in range(num_layers)]
        self._spare: Tensor | None = None
        self.layers_2RGNE = [_laid_out(memory, shape) for memory in self._memory]
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long, device=like.device)
        self._first_slots, self._of = torch.empty(0), (0, 0)
        self._views: tuple[tuple[int, int], list[tuple[Tensor, Tensor]]] | None = None

    @property
    def first_slots_RP(self) -> Tensor:
        """Where each row's P = 2 G sequences (keys of each head, then values) begin, rows and positions in one line."""
        rows, length = self.capacity
        if self._of != (rows, length):
            num_kv, self._of = self.layers_2RGNE[0].shape[2], (rows, length)
            sequences = torch.arange(2 * rows * num_kv, device=self.lengths_B.device).view(2, rows, num_kv)
            self._first_slots = sequences.transpose(0, 1).flatten(1) * length
        return self._first_slots

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.lengths_B)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and length allocated."""
        return self.layers_2RGNE[0].shape[1], self.layers_2RGNE[0].shape[3]

    @property
    def num_bytes(self) -> int:
        """Memory allocated."""
        return sum(memory.nbytes for memory in self._memory)

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for at least so many rows, each of at least this length; what is there stays."""
        rows, longest = self.capacity
        if num_rows <= rows and length <= longest:
            return
        shape = (
            2,
            max(num_rows, rows),
            self.layers_2RGNE[0].shape[2],
            max(length, longest),
            self.layers_2RGNE[0].shape[4],
        )
        size, used = math.prod(shape), self.num_rows
        had = len(self._memory[0])  # as all of them, and the spare one
        is_larger = size > had
        if not is_larger and self._spare is None:
            self._spare = torch.zeros_like(self._memory[0])
        for index, old in enumerate(self.layers_2RGNE):
            memory = old.new_zeros(max(size, 2 * had)) if is_larger else self._spare
            assert memory is not None
            new = _laid_out(memory, shape)
            new[:, :used, :, :longest] = old[:, :used]
            self.layers_2RGNE[index], self._spare, self._memory[index] = new, self._memory[index], memory
        self._spare, self._views = None if is_larger else self._spare, None

    def heads(self, num_rows: int, num_keys: int) -> list[tuple[Tensor, Tensor]]:
        """Of each layer keys and values of the first rows and positions, (B G) x N x E each."""
        if self._views is None or self._views[0] != (num_rows, num_keys):
            first = [layer[:, :num_rows, :, :num_keys].flatten(1, 2) for layer in self.layers_2RGNE]
            self._views = (num_rows, num_keys), [(k_bNE, v_bNE) for k_bNE, v_bNE in first]
        return self._views[1]

    def write(self, layer: int, slots_X: Tensor, new_MPE: Tensor) -> None:
        """Keys and values of M ids, at the slots of each of their P sequences."""
        memory_2RGNE = self.layers_2RGNE[layer]
        new_XE = new_MPE.reshape(-1, new_MPE.shape[-1]).to(memory_2RGNE.dtype)
        memory_2RGNE.view(-1, new_XE.shape[-1]).index_copy_(0, slots_X, new_XE)

    def append(self, num_rows: int) -> list[int]:
        """Take so many more rows into use, empty; their numbers."""
        first = self.num_rows
        assert first + num_rows <= self.capacity[0], f"{first} + {num_rows} rows in a cache of {self.capacity[0]}"
        self.lengths_B = torch.cat([self.lengths_B, self.lengths_B.new_zeros(num_rows)])
        return list(range(first, first + num_rows))

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows, in this order, in new memory."""
        self.layers_2RGNE = [layer.index_select(1, rows) for layer in self.layers_2RGNE]
        self._memory, self._spare, self._views = [layer.view(-1) for layer in self.layers_2RGNE], None, None
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
        for layer in self.layers_2RGNE:
            layer[:, to_K, :, :longest] = layer[:, from_K, :, :longest]

    def take_out(self, row: int) -> Prompt:
        """A copy of one row."""
        length = int(self.lengths_B[row])
        return Prompt([layer[:, row, :, :length].clone() for layer in self.layers_2RGNE], length)

    def put(self, prompt: Prompt, rows: Sequence[int]) -> None:
        """Write what `take_out` gave into rows."""
        for layer, kept in zip(self.layers_2RGNE, prompt.layers, strict=True):
            for row in rows:
                layer[:, row, :, : prompt.length] = kept
        self.lengths_B[list(rows)] = prompt.length


def _laid_out(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
