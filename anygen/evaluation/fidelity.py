"""How alike two pictures look, picture by picture, and means over pictures with their intervals.

Dimension key: N pictures, H x W pixels, C colours.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from anygen.evaluation.picture_samples import Bytes
from anygen.evaluation.scores import Score

Doubles = npt.NDArray[np.float64]
MAX_PSNR_DB = 60.0
"""Of a picture that comes back exactly, whose PSNR is infinite: just above what rounding allows (59 dB)."""
SSIM_WINDOW_PX = 11


def psnr(real_NHWC: Bytes, drawn_NHWC: Bytes) -> Doubles:
    """Peak signal to noise ratio of each picture in dB, at most `MAX_PSNR_DB`.

    >>> psnr(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)).tolist()
    [0.0]
    """
    errors_N = np.array(
        [np.square(a.astype(np.float64) - b).mean() for a, b in zip(real_NHWC, drawn_NHWC, strict=True)]
    )
    least = 255**2 / 10 ** (MAX_PSNR_DB / 10)
    decibels: Doubles = 10 * np.log10(255**2 / errors_N.clip(least))
    return decibels


def ssim(real_NHWC: Bytes, drawn_NHWC: Bytes) -> Doubles:
    """Structural similarity of each picture: the window and constants of Wang et al. 2004, mean of the colours."""
    from skimage.metrics import structural_similarity

    options = {"channel_axis": 2, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    return np.array(
        [
            structural_similarity(a, b, use_sample_covariance=False, **options)
            for a, b in zip(real_NHWC, drawn_NHWC, strict=True)
        ]
    )


def mean_of(values_N: npt.NDArray[np.floating]) -> Score:
    """Mean with its normal 95 % interval.

    >>> mean_of(np.array([1.0, 1.0, 1.0])).low
    1.0
    """
    return difference_of(values_N, np.zeros(1))


def difference_of(left_N: npt.NDArray[np.floating], right_N: npt.NDArray[np.floating]) -> Score:
    """Difference of two means with its normal 95 % interval, none of one value; the count is the left one's."""
    if not len(left_N) or not len(right_N):
        return Score(math.nan, math.nan, math.nan, 0)
    value = float(left_N.mean(dtype=np.float64) - right_N.mean(dtype=np.float64))
    spread = 1.96 * math.sqrt(sum(_squared_error(part) for part in (left_N, right_N)))
    spread = math.nan if len(left_N) == 1 else spread
    return Score(value, value - spread, value + spread, len(left_N))


def _squared_error(values_N: npt.NDArray[np.floating]) -> float:
    return float(values_N.var(ddof=1, dtype=np.float64) / len(values_N)) if len(values_N) > 1 else 0.0
