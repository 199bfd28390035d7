"""Reading a scene back from its picture, without any network: which things stand in which of the four cells.

What is not white in a cell is cut out, brought to one size, and compared with every thing that scenes are made of, cut
out in the same way. Reading real scenes says how far the reader itself can be trusted: reported beside the figures.

Dimension key: N things, F values of a cut-out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from anygen.data.emoji_pictures import EmojiFont, on_white

_WHITE, _INK = 225, 0.06
"""A pixel is ink where a colour is below the first; a cell is full where this share of it is ink."""
_SIDE = 24
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Read:
    """One thing in a cell."""

    name: str
    row: int
    column: int


class SceneReader:
    """Knows how things look.

    Args:
        things: (name, character) pairs.
        font: draws them.
    """

    def __init__(self, things: Sequence[tuple[str, str]], font: EmojiFont) -> None:
        self._names = [name for name, _ in things]
        drawn = [np.asarray(on_white(font.draw(char, 2 * _SIDE))) for _, char in things]
        self._looks_NF = np.stack([_cut_out(pixels) for pixels in drawn])

    def read(self, picture: Image.Image) -> list[Read]:
        """The things of a picture, cell by cell."""
        pixels_HWC = np.asarray(picture.convert("RGB"))
        height, width = pixels_HWC.shape[0] // 2, pixels_HWC.shape[1] // 2
        found = []
        for row in range(2):
            for column in range(2):
                cell = pixels_HWC[row * height : (row + 1) * height, column * width : (column + 1) * width]
                if _ink(cell).mean() >= _INK:
                    errors_N = np.square(self._looks_NF - _cut_out(cell)).sum(axis=1)
                    found.append(Read(self._names[int(errors_N.argmin())], row, column))
        return found


def _ink(pixels_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    ink_HW: npt.NDArray[np.bool_] = pixels_HWC.min(axis=2) < _WHITE
    return ink_HW


def _cut_out(pixels_HWC: npt.NDArray[np.uint8]) -> Floats:
    ink_HW = _ink(pixels_HWC)
    rows, columns = np.flatnonzero(ink_HW.any(axis=1)), np.flatnonzero(ink_HW.any(axis=0))
    box = pixels_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    small = Image.fromarray(box).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel() / np.float32(255)
