"""Distances between two sets of features, in any space: the formulas of FID (arXiv 1706.08500) and KID (1801.01401).

Dimension key: N samples, D features.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from anygen.evaluation.scores import Score

Floats = npt.NDArray[np.float64]


def frechet_distance(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of two normal distributions with the samples' moments.

    Fewer than 2 D samples of either side are too few for a covariance: both are then shrunk (`covariance`).

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(100, 3))
    >>> round(frechet_distance(x, x), 9), round(frechet_distance(x, x + [3.0, 0.0, 4.0]), 9)
    (0.0, 25.0)
    """
    shrunk = is_too_small(min(len(left_ND), len(right_ND)), left_ND.shape[1])
    left_DD, right_DD = (covariance(x_ND.astype(np.float64), shrunk=shrunk) for x_ND in (left_ND, right_ND))
    values, vectors = np.linalg.eigh(left_DD)
    root_DD = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which are real and found more exactly.
    roots = np.sqrt(np.linalg.eigvalsh(root_DD @ right_DD @ root_DD).clip(0))
    shift_D = left_ND.mean(axis=0, dtype=np.float64) - right_ND.mean(axis=0, dtype=np.float64)
    distance = shift_D @ shift_D + np.trace(left_DD) + np.trace(right_DD) - 2 * roots.sum()
    return max(0.0, float(distance))


def kernel_distance(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating]) -> Score:
    """Squared maximum mean discrepancy with KID's kernel (x y / D + 1)^3, unbiased: around 0 for equal distributions.

    Rows are pairs (a picture and what was made of it), so the U-statistic over pairs (Gretton et al. 2012, lemma 6) is
    taken, with its normal interval. Features are first divided by the right side's root mean square distance from its
    mean, so that the value does not depend on the unit of the space (KID's own features have theirs).

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(200, 3)), rng.normal(size=(200, 3))
    >>> kernel_distance(x, y).low < 0 < kernel_distance(x + 1, y).low
    True
    """
    assert left_ND.shape == right_ND.shape, (left_ND.shape, right_ND.shape)
    num_pairs = len(left_ND)
    if num_pairs < 2:
        return Score(math.nan, math.nan, math.nan, num_pairs)
    centre_D = right_ND.mean(axis=0, dtype=np.float64)
    unit = float(np.sqrt(np.square(right_ND - centre_D).mean())) or 1.0
    x_ND, y_ND = ((side - centre_D) / unit for side in (left_ND, right_ND))
    cross_NN = _kernel(x_ND, y_ND)
    terms_NN = _kernel(x_ND, x_ND) + _kernel(y_ND, y_ND) - cross_NN - cross_NN.T
    np.fill_diagonal(terms_NN, 0.0)
    rows_N = terms_NN.sum(axis=1) / (num_pairs - 1)
    value, spread = float(rows_N.mean()), 1.96 * 2 * float(rows_N.std(ddof=1)) / math.sqrt(num_pairs)
    return Score(value, value - spread, value + spread, num_pairs)


def _kernel(x_ND: Floats, y_MD: Floats) -> Floats:
    cubes_NM: Floats = (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3
    return cubes_NM


def is_too_small(num_samples: int, num_features: int) -> bool:
    """True where the covariance of so many samples has to be shrunk."""
    return num_samples < 2 * num_features


def covariance(x_ND: Floats, *, shrunk: bool) -> Floats:
    """Covariance of samples, shrunk on wish towards a multiple of the identity (Ledoit and Wolf 2004, section 3.3)."""
    centred_ND = x_ND - x_ND.mean(axis=0)
    num_samples, num_features = x_ND.shape
    sample_DD: Floats = centred_ND.T @ centred_ND / num_samples
    if not shrunk:
        return sample_DD
    identity_DD = np.eye(num_features) * np.trace(sample_DD) / num_features
    spread = np.square(sample_DD - identity_DD).sum()
    noise = (np.square(np.square(centred_ND).sum(axis=1)).mean() - np.square(sample_DD).sum()) / num_samples
    share = min(1.0, float(noise / spread)) if spread > 0 else 0.0
    blended_DD: Floats = share * identity_DD + (1 - share) * sample_DD
    return blended_DD
