"""The real emoji, where truth is exact: their pictures, captions and voices, and which of them a picture shows.

Which real emoji a picture is nearest to is asked in two spaces, neither of which any tokenizer or teacher has seen:
`pixels`, and `edges and colours` (`anygen.evaluation.edges`). Emoji whose pictures are identical in the font count as
one: no model could tell them apart.

Dimension key: N real emoji, M pictures, D features.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from anygen.data.emoji_names import captions, spoken_forms
from anygen.data.emoji_pictures import EmojiFont, on_white
from anygen.evaluation.edges import EdgeSpace

Floats = npt.NDArray[np.float32]
_NEAR = 20
"""Candidates that are compared to the last bit."""


class RealEmoji:
    """The real emoji: pictures, captions and voices to compare with."""

    def __init__(self, side_px: int) -> None:
        self.font, self.side_px = EmojiFont(), side_px
        self.emoji = self.font.catalogue()

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Every emoji, drawn."""
        return [on_white(self.font.draw(emoji.char, self.side_px)) for emoji in self.emoji]

    @cached_property
    def classes(self) -> npt.NDArray[np.int64]:
        """Class of every emoji: the index of the first one with the same pixels."""
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(picture.tobytes(), index) for index, picture in enumerate(self.pictures)])

    @cached_property
    def _pixels_ND(self) -> Floats:
        return np.stack([_flat(picture) for picture in self.pictures])

    @cached_property
    def _squares_N(self) -> Floats:
        return np.square(self._pixels_ND).sum(axis=1)

    @cached_property
    def edges(self) -> EdgeSpace:
        """The second space, fitted on the real emoji; needs scikit-image."""
        return EdgeSpace(self.pictures)

    def nearest(self, picture: Image.Image) -> int:
        """Class of the real emoji with the smallest mean squared pixel error."""
        return self.nearest_by_pixels([picture])[0]

    def nearest_by_pixels(self, pictures: Sequence[Image.Image]) -> list[int]:
        """The same, of several pictures."""
        found = []
        for picture in pictures:
            x_D = _flat(self.fitted(picture))
            rough_N = self._squares_N - 2 * (self._pixels_ND @ x_D)  # fast, and exact up to rounding
            near = np.argpartition(rough_N, min(_NEAR, len(rough_N) - 1))[: _NEAR + 1]
            near.sort()
            errors = np.square(self._pixels_ND[near].astype(np.float64) - x_D).sum(axis=1)
            found.append(int(self.classes[near[errors.argmin()]]))
        return found

    def nearest_by_edges(self, pictures: Sequence[Image.Image]) -> list[int]:
        """Class of the real emoji with the nearest edges and colours."""
        found_M = self.edges.nearest([self.fitted(picture) for picture in pictures])
        return [int(self.classes[index]) for index in found_M]

    def fitted(self, picture: Image.Image) -> Image.Image:
        """A picture at the side of the real ones, RGB."""
        return picture.convert("RGB").resize((self.side_px, self.side_px))

    def captions_of(self, index: int) -> set[str]:
        """Captions that are right for a picture: its own, and those of emoji that look exactly like it."""
        return {caption for i in self._twins_of(index) for caption in captions(self.emoji[i].parts)}

    def spoken_forms_of(self, index: int) -> list[str]:
        """Of these captions, those that voices speak."""
        return sorted({form for i in self._twins_of(index) for form in spoken_forms(self.emoji[i].parts)})

    def held_out(self) -> list[int]:
        """Emoji outside the training split, but for those that look exactly like one in it."""
        seen = {int(self.classes[i]) for i, emoji in enumerate(self.emoji) if emoji.split == "train"}
        return [i for i, emoji in enumerate(self.emoji) if emoji.split != "train" and int(self.classes[i]) not in seen]

    def groups(self, limit: int | None) -> dict[str, list[int]]:
        """Training and held-out names, at most `limit` of each, the same ones each time."""
        train = [i for i, emoji in enumerate(self.emoji) if emoji.split == "train"]
        groups = {"training names": train, "held-out names": self.held_out()}
        if limit is None:
            return groups
        return {name: sorted(random.Random(0).sample(items, min(limit, len(items)))) for name, items in groups.items()}

    def _twins_of(self, index: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.classes == self.classes[index])]


def _flat(picture: Image.Image) -> Floats:
    return (np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).ravel().astype(np.float32)
