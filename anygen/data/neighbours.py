"""Which other pictures of a set each picture could be mistaken for.

Dimension key: N pictures, K neighbours, D numbers that describe a picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.data.pictures import PictureSet
from anygen.errors import DataError

COUNT = 4
_GRID = 16
_SAME = 1e-6
_ROWS = 1024


def nearest_pictures(pictures: PictureSet, count: int = COUNT) -> Tensor:
    """The nearest others of each picture, N x K item numbers, nearest first, by the mean colours of 16 x 16 fields.

    Pictures that are equal are no neighbours: nothing tells them apart. The search is quadratic: 7,200 pictures take a
    core three seconds.

    Raises:
        DataError: there are not more than `count` pictures.
    """
    if len(pictures) <= count:
        raise DataError(
            f"{len(pictures)} pictures are too few to compare each with its {count} nearest others; add pictures, or "
            "set joint_neighbour_weight and neighbour_weight to 0"
        )
    fields = [F.adaptive_avg_pool2d(pixels, _GRID).flatten(1) for pixels in pictures.batches(torch.device("cpu"))]
    described_ND = torch.cat(fields)
    squares_N = described_ND.square().sum(1)
    found = []
    for start in range(0, len(described_ND), _ROWS):
        rows_MD = described_ND[start : start + _ROWS]
        distances_MN = squares_N[start : start + _ROWS, None] + squares_N - 2 * rows_MD @ described_ND.T
        distances_MN[distances_MN < _SAME * described_ND.shape[1]] = float("inf")  # itself, and twins
        found.append(distances_MN.topk(count, largest=False).indices)
    return torch.cat(found)
