"""Orders without memory: which example comes n-th is a pure function of (seed, n).

`Permutation` shuffles 0 ... size - 1 by a small Feistel network with cycle walking; `ShardwiseOrder` does it so that a
few shards at a time are visited; `Mixture` deals examples out to weighted kinds in exact proportion, and within a kind
walks through all items before any comes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anygen.errors import ConfigError

_ROUNDS = 4
_CYCLE = 1000


@dataclass(frozen=True)
class Permutation:
    """A shuffle of 0 ... size - 1 that is computed, not stored.

    >>> sorted(Permutation(10, seed=3)(i) for i in range(10)) == list(range(10))
    True
    """

    size: int
    seed: int

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        assert 0 <= index < self.size, f"{index} is not in [0, {self.size})"
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        mask = (1 << half_bits) - 1
        while True:  # outside [0, size) we walk on: fewer than four turns on average
            left, right = index >> half_bits, index & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            index = left << half_bits | right
            if index < self.size:
                return index

    @cached_property
    def _keys(self) -> tuple[int, ...]:
        digest = hashlib.sha256(f"{self.seed}|{self.size}".encode()).digest()
        return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(_ROUNDS))


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


class ShardwiseOrder:
    """A shuffle that visits few shards at a time: the shards are shuffled, and the items of each block of them.

    Args:
        counts: items of each shard; items are numbered shard by shard.
        block: shards that are visited together.
        seed: of the order.

    >>> order = ShardwiseOrder([2, 3, 1], block=1, seed=0)
    >>> [order(place) for place in range(6)]
    [5, 2, 3, 4, 0, 1]
    """

    def __init__(self, counts: Sequence[int], *, block: int, seed: int) -> None:
        shuffle = Permutation(len(counts), seed)
        self._order = np.array([shuffle(place) for place in range(len(counts))])
        self._firsts = np.cumsum([0, *counts])
        self._ends = np.cumsum(np.asarray(counts)[self._order])  # of each shard, in the order of visits
        self._block, self._seed = block, seed

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        begin = int(np.searchsorted(self._ends, index, side="right")) // self._block * self._block
        start = int(self._ends[begin - 1]) if begin else 0
        stop = int(self._ends[min(begin + self._block, len(self._ends)) - 1])
        place = start + Permutation(stop - start, self._seed + 1 + begin)(index - start)
        visit = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[visit - 1]) if visit else 0
        return int(self._firsts[self._order[visit]]) + place - before


@dataclass(frozen=True)
class Draw:
    """What the n-th example is made of."""

    kind: str
    item: int
    """Index among the items of the kind."""
    seed: int
    """For every other choice about this example."""


class Mixture:
    """Kinds of examples in proportion to their weights.

    Examples come in cycles of 1,000; a cycle holds each kind as often as its weight says, in an order drawn from the
    seed.

    Args:
        weights: kind to weight, any positive scale; kinds of weight 0 are left out.
        num_items: kind to number of items.
        seed: of the order.
        shard_counts: kind to its items in each shard, to go through them shard by shard; see `ShardwiseOrder`.
        block: shards that are visited together.

    Raises:
        ConfigError: no kind has weight, or one that has, has no items.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        num_items: Mapping[str, int],
        *,
        seed: int,
        shard_counts: Mapping[str, Sequence[int]] | None = None,
        block: int = 1,
    ) -> None:
        kinds = [kind for kind, weight in weights.items() if weight > 0]
        if not kinds or any(weight < 0 for weight in weights.values()):
            raise ConfigError(f"a mixture needs positive weights; got {dict(weights)}")
        for kind in kinds:
            if num_items.get(kind, 0) < 1:
                raise ConfigError(
                    f"the mixture asks for {kind!r}, but the data have nothing for it: delete it, or add such data"
                )
        total = sum(weights[kind] for kind in kinds)
        edges = np.rint(np.cumsum([weights[kind] / total for kind in kinds]) * _CYCLE).astype(int)
        counts = np.diff(edges, prepend=0)
        if (counts == 0).any():
            raise ConfigError(f"weight of {kinds[int(counts.argmin())]!r} is below 1/{_CYCLE} of the mixture")
        slots = np.repeat(np.arange(len(kinds)), counts)
        np.random.default_rng([seed, 0]).shuffle(slots)
        self._kinds, self._counts, self._slots, self._seed = kinds, counts, slots, seed
        self._rank = np.zeros(_CYCLE, dtype=int)  # how many slots of the same kind come before
        for index, count in enumerate(counts):
            self._rank[slots == index] = np.arange(count)
        self._num_items = {kind: num_items[kind] for kind in kinds}
        self._shard_counts, self._block = shard_counts, block
        self._orders: dict[tuple[str, int], ShardwiseOrder] = {}

    def __call__(self, number: int) -> Draw:
        """The draw of example `number`."""
        cycle, slot = divmod(number, _CYCLE)
        index = int(self._slots[slot])
        kind = self._kinds[index]
        ordinal = cycle * int(self._counts[index]) + int(self._rank[slot])
        epoch, place = divmod(ordinal, self._num_items[kind])
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}|{kind}|{epoch}".encode()).digest()[:6], "big")
        item = self._order(kind, seed)(place)
        return Draw(kind, item, _mix(self._seed * 0x9E3779B97F4A7C15 + number + 1 & 0xFFFFFFFFFFFFFFFF) >> 1)

    def _order(self, kind: str, seed: int) -> Callable[[int], int]:
        if self._shard_counts is None:
            return Permutation(self._num_items[kind], seed)
        if (kind, seed) not in self._orders:
            if len(self._orders) >= 2 * len(self._kinds):  # the epoch that a kind is in, and the one it looks ahead to
                del self._orders[next(iter(self._orders))]
            self._orders[kind, seed] = ShardwiseOrder(self._shard_counts[kind], block=self._block, seed=seed)
        return self._orders[kind, seed]
