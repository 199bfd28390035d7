"""Orders without memory: which example comes n-th is a pure function of (seed, n).

`Permutation` shuffles 0 ... size - 1 by a small Feistel network with cycle walking; `Mixture` deals examples out to
weighted kinds in exact proportion, and within a kind walks through all items before any comes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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

    Raises:
        ConfigError: no kind has weight, or one that has, has no items.
    """

    def __init__(self, weights: Mapping[str, float], num_items: Mapping[str, int], *, seed: int) -> None:
        kinds = [kind for kind, weight in weights.items() if weight > 0]
        if not kinds or any(weight < 0 for weight in weights.values()):
            raise ConfigError(f"a mixture needs positive weights; got {dict(weights)}")
        for kind in kinds:
            if num_items.get(kind, 0) < 1:
                raise ConfigError(f"the mixture asks for {kind!r}, but the data have nothing for it")
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

    def __call__(self, number: int) -> Draw:
        """The draw of example `number`."""
        cycle, slot = divmod(number, _CYCLE)
        index = int(self._slots[slot])
        kind = self._kinds[index]
        ordinal = cycle * int(self._counts[index]) + int(self._rank[slot])
        epoch, place = divmod(ordinal, self._num_items[kind])
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}|{kind}|{epoch}".encode()).digest()[:6], "big")
        item = Permutation(self._num_items[kind], seed)(place)
        return Draw(kind, item, _mix(self._seed * 0x9E3779B97F4A7C15 + number + 1 & 0xFFFFFFFFFFFFFFFF) >> 1)
