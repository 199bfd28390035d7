"""Randomness from seeds that say what they are for; the global random state is borrowed and given back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part.

    >>> seed_of(0, "train") != seed_of(0, "validation")
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def borrowed_randomness(seed: int | None = None) -> Iterator[None]:
    """Inside, torch's global generators may be used, from `seed` where given; after it they are as before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if seed is not None:
            torch.manual_seed(seed)
        yield
