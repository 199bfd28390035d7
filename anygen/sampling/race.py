"""Waiting times for the race that chooses ids: a pure function of a sample's key, the place of the id, and the id.

A sample draws one key from its generator. Everything after is SplitMix64's finaliser (Steele et al., OOPSLA 2014) over
a counter, as in Philox (Salmon et al., SC 2011): no state, so any place can be asked at any time, in any batch, on any
device, inside a CUDA graph, and again. torch's `exponential_` costs 15 ns a number on a CPU and needs a call a row.

Dimension key: B rows of one group, A allowed ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLACE, _ID = -7046029254386353131, -4417276706812531889  # odd, high entropy: 64-bit golden ratio, xxHash's prime 2
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # multipliers of SplitMix64, as signed numbers
_HIGH_34, _HIGH_37, _FRACTION = (1 << 34) - 1, (1 << 37) - 1, (1 << 52) - 1
_ONE = (0x3FF << 52) + 1
"""A double in (1, 2): its exponent, and a last bit that keeps waits above 0."""


def draw_key(generator: torch.Generator) -> int:
    """The key of a sample: 63 bits of its generator, whose only draw this is."""
    return int(torch.randint(2**63 - 1, (), generator=generator))


def waits(keys_B: Tensor, places_B: Tensor, ids_A: Tensor) -> Tensor:
    """Independent times from the exponential distribution of rate 1, fp64, above 0; B x A.

    Args:
        keys_B: int64, of the samples.
        places_B: int64, how many ids each has before the one to be chosen.
        ids_A: int64, what may be chosen: a wait belongs to an id, whatever else is allowed.

    >>> key, place = torch.tensor([7]), torch.tensor([0])
    >>> waits(key, place, torch.tensor([5, 6])).round(decimals=3).tolist()
    [[0.574, 2.683]]
    >>> waits(key, place, torch.tensor([6])).round(decimals=3).tolist()
    [[2.683]]
    """
    z_BA = torch.add(_mixed(torch.add(keys_B, places_B, alpha=_PLACE))[:, None], ids_A, alpha=_ID)
    bits_BA = _mixed(z_BA).bitwise_right_shift_(12).bitwise_and_(_FRACTION).bitwise_or_(_ONE)
    return torch.rsub(bits_BA.view(torch.float64), 2).log_().neg_()


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64 without its last shift, which serves the low bits: only the high ones are used, or mixed again."""
    z = (z ^ ((z >> 30) & _HIGH_34)).mul_(_FIRST)
    return z.bitwise_xor_((z >> 27).bitwise_and_(_HIGH_37)).mul_(_SECOND)
