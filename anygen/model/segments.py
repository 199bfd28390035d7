"""Where the documents of a packed batch begin and end, as each attention room wants it.

Dimension key: T packed ids, N offsets, P places of the padded segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_BUCKET = 32
_FEWEST_OFFSETS = 64
_SHORTEST_BOUND = 128


@dataclass(frozen=True)
class Group:
    """Segments whose lengths round up to the same padded length."""

    num_segments: int
    padded_length: int


@dataclass(frozen=True)
class Segments:
    """Lengths of the packed segments (0 is allowed), and what the rooms derive from them, made once a batch.

    >>> segments = Segments((2, 3), torch.device("cpu"))
    >>> segments.gather.view(2, -1)[:, :4].tolist()  # padding repeats a segment's own last id
    [[0, 1, 1, 1], [2, 3, 4, 4]]
    >>> segments.scatter.tolist()
    [0, 1, 32, 33, 34]
    >>> segments.offsets_N[:5].tolist(), len(segments.offsets_N), segments.max_length
    ([0, 2, 5, 5, 5], 64, 128)
    """

    lengths: tuple[int, ...]
    device: torch.device
    offsets_N: Tensor = field(init=False, repr=False, compare=False)
    """Starts of the segments, then T repeated: `cu_seqlens` of nearly constant length, so that few graphs serve batches
    of any number of segments. What follows the last segment are empty ones."""
    max_length: int = field(init=False, repr=False, compare=False)
    """A power of two that no length exceeds. Kernels start their blocks by it: with T they would start far too many."""

    def __post_init__(self) -> None:
        num_offsets = max(_FEWEST_OFFSETS, _power_of_two(len(self.lengths) + 1))
        offsets_N = torch.full((num_offsets,), sum(self.lengths), dtype=torch.int32)
        offsets_N[0] = 0
        offsets_N[1 : len(self.lengths) + 1] = torch.tensor(self.lengths, dtype=torch.int32).cumsum(0)
        object.__setattr__(self, "offsets_N", offsets_N.to(self.device))  # not lazily: compiled code reads them
        object.__setattr__(self, "max_length", max(_SHORTEST_BOUND, _power_of_two(max(self.lengths, default=0))))

    @cached_property
    def groups(self) -> list[Group]:
        """Groups in the order of `gather`; empty segments are in none."""
        counts: dict[int, int] = {}
        for length in sorted(filter(None, self.lengths)):
            padded = _padded(length)
            counts[padded] = counts.get(padded, 0) + 1
        return [Group(count, padded) for padded, count in counts.items()]

    @cached_property
    def gather(self) -> Tensor:
        """For every place of every padded segment, the packed id it reads."""
        return self._maps[0]

    @cached_property
    def scatter(self) -> Tensor:
        """For every packed id, its place in the padded segments."""
        return self._maps[1]

    @cached_property
    def is_real(self) -> Tensor:
        """False for places that are padding; as long as `gather`."""
        return self._maps[2]

    @cached_property
    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        starts = lengths.cumsum(0) - lengths
        gather = [torch.empty(0, dtype=torch.long)]
        is_real = [torch.empty(0, dtype=torch.bool)]
        for index in torch.argsort(lengths, stable=True).tolist():
            length = self.lengths[index]
            place = torch.arange(_padded(length))
            gather.append(starts[index] + place.clamp(max=length - 1))
            is_real.append(place < length)
        gather_P, is_real_P = torch.cat(gather), torch.cat(is_real)
        scatter_T = torch.empty(int(lengths.sum()), dtype=torch.long)
        scatter_T[gather_P[is_real_P]] = torch.arange(len(gather_P))[is_real_P]
        return gather_P.to(self.device), scatter_T.to(self.device), is_real_P.to(self.device)


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
