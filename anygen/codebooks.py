"""Codebook orders: how K x T codes become S steps of one sequence, as pure values with an inverse.

One step carries one code (one token, one softmax). With K = 3 books, T = 4 frames and `kt` for the code of book k in
frame t:

    flat        00 10 20 01 11 21 02 12 22 03 13 23      frame by frame
    sequential  00 01 02 03 10 11 12 13 20 21 22 23      book by book (MIO, arXiv 2409.17692)
    delay       00 01 10 02 11 20 03 12 21 13 22 23      book k trails by k frames (MusicGen, arXiv 2306.05284)
    coarse      00 01 02 03                              the first `num_kept` books, flat; a decoder adds the rest

Dimension key: K codebooks, T frames, S sequence steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from anygen.errors import ConfigError, DataError
from tokenizers_mm.codes import IntArray

OrderName = Literal["flat", "sequential", "delay", "coarse"]


@dataclass(frozen=True)
class CodebookOrder:
    """One order for a codec of `num_codebooks` books.

    >>> order = CodebookOrder("delay", num_codebooks=2)
    >>> codes_KT = np.array([[1, 2, 3], [4, 5, 6]])
    >>> order.apply(codes_KT).tolist()
    [1, 2, 4, 3, 5, 6]
    >>> order.codebook_S(3).tolist()
    [0, 0, 1, 0, 1, 1]
    >>> order.invert(order.apply(codes_KT)).tolist()
    [[1, 2, 3], [4, 5, 6]]

    Raises:
        ConfigError: an unknown name, or a number of kept books that does not fit.
    """

    name: OrderName
    num_codebooks: int
    num_kept: int = 0
    """Books in the sequence; 0 means all. Fewer than `num_codebooks` with `coarse` only."""

    def __post_init__(self) -> None:
        if self.name not in get_args(OrderName):
            raise ConfigError(f"unknown codebook order {self.name!r}; expected one of {', '.join(get_args(OrderName))}")
        kept = self.num_kept or self.num_codebooks
        if not 1 <= kept <= self.num_codebooks or (kept < self.num_codebooks and self.name != "coarse"):
            raise ConfigError(f"order {self.name!r} cannot keep {kept} of {self.num_codebooks} codebooks")
        object.__setattr__(self, "num_kept", kept)

    def num_steps(self, num_frames: int) -> int:
        """S for T frames."""
        return self.num_kept * num_frames

    def coordinates_S2(self, num_frames: int) -> IntArray:
        """(book, frame) of every step."""
        return _coordinates(self.name, self.num_kept, num_frames)

    def codebook_S(self, num_frames: int) -> IntArray:
        """The book that each step belongs to."""
        return self.coordinates_S2(num_frames)[:, 0]

    def num_whole(self, num_frames: int) -> IntArray:
        """After each number of steps, 0 to S: how many leading frames have all their codes.

        >>> CodebookOrder("delay", num_codebooks=2).num_whole(3).tolist()
        [0, 0, 0, 1, 1, 2, 3]
        """
        frame_S = self.coordinates_S2(num_frames)[:, 1]
        last_T = np.zeros(num_frames, dtype=np.int64)
        np.maximum.at(last_T, frame_S, np.arange(len(frame_S)))
        return np.searchsorted(np.maximum.accumulate(last_T), np.arange(len(frame_S) + 1), side="left")

    def apply(self, codes_KT: IntArray) -> IntArray:
        """K x T codes to S codes.

        Raises:
            DataError: fewer books than this order keeps.
        """
        if codes_KT.shape[0] < self.num_kept:
            raise DataError(f"order keeps {self.num_kept} codebooks; the codes have {codes_KT.shape[0]}")
        coordinates_S2 = self.coordinates_S2(codes_KT.shape[1])
        return codes_KT[coordinates_S2[:, 0], coordinates_S2[:, 1]]

    def invert(self, codes_S: IntArray) -> IntArray:
        """S codes to num_kept x T codes; the inverse of `apply` on the kept books.

        Raises:
            DataError: S is not a multiple of the number of kept books.
        """
        num_frames, rest = divmod(len(codes_S), self.num_kept)
        if rest:
            raise DataError(f"{len(codes_S)} steps are not whole frames of {self.num_kept} codebooks")
        coordinates_S2 = self.coordinates_S2(num_frames)
        codes_KT = np.empty((self.num_kept, num_frames), dtype=np.int64)
        codes_KT[coordinates_S2[:, 0], coordinates_S2[:, 1]] = codes_S
        return codes_KT


@lru_cache(maxsize=4096)
def _coordinates(name: OrderName, num_kept: int, num_frames: int) -> IntArray:
    book_KT, frame_KT = np.indices((num_kept, num_frames))
    if name == "sequential":
        keys = (frame_KT, book_KT)
    elif name == "delay":
        keys = (book_KT, frame_KT + book_KT)
    else:
        keys = (book_KT, frame_KT)
    order = np.lexsort(tuple(key.ravel() for key in keys))  # the last key sorts first
    coordinates_S2 = np.stack([book_KT.ravel()[order], frame_KT.ravel()[order]], axis=1).astype(np.int64)
    coordinates_S2.flags.writeable = False  # cached and shared
    return coordinates_S2
