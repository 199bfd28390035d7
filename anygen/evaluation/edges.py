"""A space of pictures that needs no weights: edges and colours.

Edges are histograms of oriented gradients (Dalal and Triggs 2005, scikit-image: 8 directions, cells of 8 px, blocks of
2 x 2 cells), colours are means on a 4 x 4 grid. Each half is scaled to the same total variance over the pictures that
the space is fitted on. Distances between sets (FID's and KID's formulas) are taken in its first 32 principal
components: few enough for the covariance of a hundred pictures.

Dimension key: N fitted pictures, M other pictures, D features, P principal components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
NUM_COMPONENTS = 32
_GRID = 4


class EdgeSpace:
    """Edges and colours, scaled by the pictures it is fitted on (equal squares, RGB)."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        raw = [_raw(picture) for picture in pictures]
        self._scales = [1 / max(1e-9, float(np.sqrt(np.var(half, axis=0).sum()))) for half in _halves(raw)]
        self._fitted_ND = self._scaled(raw)
        self._mean_D = self._fitted_ND.mean(axis=0)
        _, vectors_DD = np.linalg.eigh(np.cov(self._fitted_ND.T))
        self._components_DP = vectors_DD[:, ::-1][:, :NUM_COMPONENTS]

    def features(self, pictures: Sequence[Image.Image]) -> Floats:
        """M x D."""
        return self._scaled([_raw(picture) for picture in pictures])

    def components(self, pictures: Sequence[Image.Image]) -> Floats:
        """The first principal components, M x P."""
        projected_MP: Floats = (self.features(pictures) - self._mean_D) @ self._components_DP
        return projected_MP

    def nearest(self, pictures: Sequence[Image.Image]) -> npt.NDArray[np.int64]:
        """Index of the nearest fitted picture, M; of equals the first."""
        x_MD = self.features(pictures)
        squares_MN = np.square(self._fitted_ND).sum(axis=1) - 2 * x_MD @ self._fitted_ND.T
        found_M: npt.NDArray[np.int64] = squares_MN.argmin(axis=1)
        return found_M

    def _scaled(self, raw: Sequence[tuple[Floats, Floats]]) -> Floats:
        halves = [half * scale for half, scale in zip(_halves(raw), self._scales, strict=True)]
        return np.concatenate(halves, axis=1)


def _halves(raw: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.stack([edges for edges, _ in raw]), np.stack([colours for _, colours in raw])


def _raw(picture: Image.Image) -> tuple[Floats, Floats]:
    """Edges and colours of one picture."""
    from skimage.feature import hog

    pixels_HWC = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    edges = hog(pixels_HWC, orientations=8, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=2)
    small = picture.convert("RGB").resize((_GRID, _GRID), Image.Resampling.BOX)
    return edges, np.asarray(small, dtype=np.float64).ravel() / 255
