"""Structural similarity (Wang et al. 2004) with gradients: a pixel head that is judged by it leaves flat areas flat.

Dimension key: B pictures, C colours, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def structural_similarity(left_BCHW: Tensor, right_BCHW: Tensor) -> Tensor:
    """Mean over pictures, colours and pixels, in [-1, 1]; values in [0, 1], sides of 11 pixels or more.

    Windows are Gaussians of 11 x 11 pixels (sigma 1.5); only those that lie wholly inside count.
    """
    assert min(left_BCHW.shape[2:]) > 2 * _RADIUS, f"pictures of {tuple(left_BCHW.shape)} are smaller than a window"
    left, right = left_BCHW.float(), right_BCHW.float()
    planes = torch.stack([left, right, left * left, right * right, left * right])
    mean_l, mean_r, square_l, square_r, product = _blurred(planes).flatten(1)
    variance_l, variance_r, covariance = square_l - mean_l**2, square_r - mean_r**2, product - mean_l * mean_r
    means = (2 * mean_l * mean_r + _C1) / (mean_l**2 + mean_r**2 + _C1)
    spreads = (2 * covariance + _C2) / (variance_l + variance_r + _C2)
    return (means * spreads).mean()


def structure_loss(drawn_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """1 - SSIM, in fp32 also under autocast: it lives on differences of squares."""
    with torch.autocast(drawn_BCHW.device.type, enabled=False):
        return 1 - structural_similarity(drawn_BCHW, pixels_BCHW)


def _blurred(planes_SBCHW: Tensor) -> Tensor:
    # As products with band matrices: a convolution of one channel is 100x slower on a CPU.
    rows_hH, columns_wW = (_band(side, planes_SBCHW.device) for side in planes_SBCHW.shape[-2:])
    return rows_hH @ planes_SBCHW @ columns_wW.T


def _band(side_px: int, device: torch.device) -> Tensor:
    """A Gaussian window at every place where it fits, (side - 10) x side."""
    starts = torch.arange(side_px - 2 * _RADIUS, device=device)[:, None]
    offsets = torch.arange(side_px, device=device)[None] - starts - _RADIUS
    window = torch.exp(-(offsets.float() ** 2) / (2 * _SIGMA**2)) * (offsets.abs() <= _RADIUS)
    return window / window.sum(1, keepdim=True)
