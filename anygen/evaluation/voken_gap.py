"""Do vokens say anything? Pictures drawn with their own vokens against pictures drawn with another picture's.

A decoder that ignores its condition has a flow loss as low as one that heeds it, or lower; only the gap tells. Two
figures a picture: code agreement (the share of patches whose re-encoding gives the picture's code) and PSNR.

Dimension key: B pictures, P patches, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over pictures, with its bootstrap confidence interval of 95 %."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values_B: Floats, *, seed: int = 0, resamples: int = 2000) -> Interval:
        """Resample the pictures.

        >>> interval = Interval.of(np.array([1.0, 2.0, 3.0, 4.0] * 25))
        >>> interval.mean, interval.low < 2.5 < interval.high, interval.high - interval.low < 0.5
        (2.5, True, True)
        """
        random = np.random.default_rng(seed)
        means = values_B[random.integers(0, len(values_B), (resamples, len(values_B)))].mean(1)
        return cls(float(values_B.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Figures of each of B drawings."""

    agreement_B: Floats
    """0 to 1."""
    psnr_B: Floats
    """dB."""


def compare(drawn_BCHW: Tensor, true_BCHW: Tensor, codes_BP: Tensor, encode: Callable[[Tensor], Tensor]) -> Drawn:
    """Drawings against true pictures and their codes.

    Args:
        drawn_BCHW: in [0, 1].
        true_BCHW: in [0, 1].
        codes_BP: of the true pictures.
        encode: pictures to codes, B x P.
    """
    error_B = (drawn_BCHW.clamp(0, 1) - true_BCHW).square().flatten(1).mean(1).clamp_min(1e-10)
    agreement_B = (encode(drawn_BCHW.clamp(0, 1)) == codes_BP).double().mean(1)
    return Drawn(agreement_B.cpu().numpy(), (-10 * error_B.double().log10()).cpu().numpy())


def shuffled(count: int) -> Tensor:
    """Every item gets another one's place: a derangement, always the same.

    >>> shuffled(4).tolist()
    [1, 2, 3, 0]
    """
    return torch.arange(count).roll(-1)
