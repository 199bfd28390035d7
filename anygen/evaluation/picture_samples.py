"""The real pictures that a picture tokenizer is measured on: which are held out, which are twins, which is nearest.

Dimension key: B, N pictures, H x W pixels, C colours, P = H W C values of a picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anygen.data.pictures import PictureSet
from anygen.data.records import Record, RecordStore
from anygen.errors import DataError
from anygen.training.metrics import Progress

Bytes = npt.NDArray[np.uint8]
HELD_OUT = ("validation", "test")
MAX_PICTURES = 4000
"""Of one kind and split, unless a limit says otherwise: enough for intervals of a percent and a half."""
_BLOCK_VALUES = 2**23
"""Of one block of the search for the nearest picture: 64 MB."""


class RealPictures:
    """Every picture of a data folder, numbered through: training, then validation, then test.

    Args:
        folder: shards as stage `data` writes them: `train-*.tar`, `validation-*.tar`, `test-*.tar`.
        side_px: the side that they are scaled and padded to.

    Raises:
        DataError: no training pictures, or neither validation nor test pictures.
    """

    def __init__(self, folder: Path, side_px: int) -> None:
        self.side_px = side_px
        self.splits: list[str] = []
        self.records: list[Record] = []
        """Without their media, which would not fit the memory."""
        self._places: list[tuple[PictureSet, int]] = []
        for split in ("train", *HELD_OUT):
            paths = sorted(folder.glob(f"{split}-*.tar"))
            if paths:
                self._add(split, PictureSet(RecordStore(paths), side_px))
        if "train" not in self.splits or not set(HELD_OUT) & set(self.splits):
            raise DataError(
                f"{folder} needs training shards (train-*.tar) and held-out ones (validation-*.tar or test-*.tar), "
                f"got {sorted(set(self.splits)) or 'none'}: name the folder that stage data wrote"
            )
        self.classes = self._find_twins()

    def __len__(self) -> int:
        return len(self.records)

    def _add(self, split: str, pictures: PictureSet) -> None:
        for item, index in enumerate(pictures.indices):
            self.records.append(dataclasses.replace(pictures.store[index], picture=None, utterances=()))
            self.splits.append(split)
            self._places.append((pictures, item))

    def _find_twins(self) -> npt.NDArray[np.int64]:
        """Class of every picture: the number of the first one with the same pixels."""
        first: dict[bytes, int] = {}
        progress = Progress("reading", len(self))
        classes = []
        for number in range(len(self)):
            classes.append(first.setdefault(hashlib.sha256(self.bytes_of([number]).tobytes()).digest(), number))
            progress.advance()
        progress.close()
        return np.array(classes)

    def pixels(self, numbers: Iterable[int]) -> Tensor:
        """B x C x H x W in [0, 1]."""
        return torch.cat([pictures.pixels([item]) for pictures, item in (self._places[n] for n in numbers)])

    def bytes_of(self, numbers: Iterable[int]) -> Bytes:
        """B x H x W x C."""
        return to_bytes(self.pixels(numbers))

    def is_seen(self, number: int) -> bool:
        """True where training has exactly these pixels (some names are drawn alike)."""
        return self.splits[int(self.classes[number])] == "train"

    def nearest(self, pictures_BHWC: Bytes, among: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class of the real picture of `among` with the smallest mean squared pixel error; ties take the first."""
        assert among, "there is nothing to search"
        flat_BP = pictures_BHWC.reshape(len(pictures_BHWC), -1)
        step = max(1, _BLOCK_VALUES // flat_BP.shape[1])
        least_B, found_B = np.full(len(flat_BP), np.inf), np.zeros(len(flat_BP), dtype=np.int64)
        for start in range(0, len(among), step):
            block = among[start : start + step]
            # In float64 sums of squares of bytes are exact, so twins tie and the order of blocks does not matter.
            real_NP = self.bytes_of(block).reshape(len(block), -1).astype(np.float64)
            norms_N = np.einsum("np,np->n", real_NP, real_NP)
            for row in range(0, len(flat_BP), step):
                rows = slice(row, row + step)
                errors_BN = norms_N - 2 * (flat_BP[rows].astype(np.float64) @ real_NP.T)
                best_B = errors_BN.argmin(axis=1)
                errors_B = errors_BN[np.arange(len(best_B)), best_B]
                is_less = errors_B < least_B[rows]
                least_B[rows] = np.where(is_less, errors_B, least_B[rows])
                found_B[rows] = np.where(is_less, np.array(block)[best_B], found_B[rows])
        return self.classes[found_B]


@dataclass(frozen=True)
class Samples:
    """Numbers of the pictures that figures are taken of, in ascending order."""

    held_out: tuple[int, ...]
    """Of validation and test, without those whose very pixels are in training."""
    train: tuple[int, ...]
    same_kinds: tuple[int, ...]
    """Of `train`, as many of each kind as are held out where there are so many: to compare with."""
    num_seen: int
    """Pictures of validation and test that were left out."""


def draw_samples(real: RealPictures, *, limit: int | None = None) -> Samples:
    """At most `limit` pictures of each kind and split, the same ones each time.

    Raises:
        DataError: training holds every picture of validation and test.
    """
    generator = random.Random(0)
    groups: dict[tuple[str, str], list[int]] = {}
    num_seen = 0
    for number, (split, record) in enumerate(zip(real.splits, real.records, strict=True)):
        if split != "train" and real.is_seen(number):
            num_seen += 1
            continue
        groups.setdefault((split, record.kind), []).append(number)
    if all(split == "train" for split, _ in groups):
        raise DataError("training holds every picture of validation and test: nothing is held out")
    drawn = {key: _some(numbers, limit or MAX_PICTURES, generator) for key, numbers in groups.items()}
    held_out = sorted(n for (split, _), numbers in drawn.items() if split != "train" for n in numbers)
    same_kinds: list[int] = []
    for (split, kind), numbers in drawn.items():
        if split == "train":
            same_kinds += _some(numbers, sum(real.records[n].kind == kind for n in held_out), generator)
    train = sorted(n for (split, _), numbers in drawn.items() if split == "train" for n in numbers)
    return Samples(tuple(held_out), tuple(train), tuple(sorted(same_kinds)), num_seen)


def _some(numbers: list[int], count: int, generator: random.Random) -> list[int]:
    return generator.sample(numbers, min(count, len(numbers)))


def to_bytes(pixels_BCHW: Tensor) -> Bytes:
    """Pixels in [0, 1] as B x H x W x C of 0 to 255, rounded: what a file of them holds."""
    # In numpy: torch would wake all its threads for each small picture, and wait for them where cores are shared.
    rounded_BCHW: Bytes = np.rint(pixels_BCHW.numpy() * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded_BCHW.transpose(0, 2, 3, 1))
