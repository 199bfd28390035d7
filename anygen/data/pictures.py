"""Pictures of a record store as batches of pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from anygen.data.records import RecordStore
from anygen.errors import DataError
from tokenizers_mm.image import square
from tokenizers_mm.media import load_picture


class PictureSet:
    """The pictures of a record store as uint8 pixels, decoded once each while they fit `cache_bytes`."""

    def __init__(self, store: RecordStore, side_px: int, *, cache_bytes: int = 2**30) -> None:
        self.store, self.side_px = store, side_px
        self.indices = [index for index in range(len(store)) if store.has_picture(index)]
        if not self.indices:
            raise DataError("the data hold no pictures")
        self._cache: dict[int, Tensor] = {}
        self._limit = cache_bytes // (3 * side_px**2)
        self._pool = ThreadPoolExecutor(os.cpu_count())  # decoding lets other threads run

    def __len__(self) -> int:
        return len(self.indices)

    def pixels(self, items: list[int]) -> Tensor:
        """B x C x H x W in [0, 1]."""
        return torch.stack(list(self._pool.map(self._bytes, items))).float() / 255

    def _bytes(self, item: int) -> Tensor:
        if item in self._cache:
            return self._cache[item]
        data = self.store.picture(self.indices[item])
        assert data is not None
        pixels = _decoded(data, self.side_px)
        if len(self._cache) < self._limit:
            self._cache[item] = pixels
        return pixels

    def batches(self, device: torch.device, size: int = 64) -> Iterator[Tensor]:
        """All pictures in order, B x C x H x W in [0, 1]."""
        for start in range(0, len(self), size):
            yield self.pixels(list(range(start, min(start + size, len(self))))).to(device)


class NamedPictures:
    """Pictures of a record store by name: a record's key, or `key/2` for the third picture of its story."""

    def __init__(self, store: RecordStore, side_px: int) -> None:
        self.side_px = side_px
        self._store = store
        self._indices = {key: index for index, key in enumerate(store.keys())}
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def pixels(self, names: Sequence[str]) -> Tensor:
        """B x C x H x W in [0, 1]; there may be none.

        Raises:
            DataError: the data have no such picture: they are not those that were tokenized.
        """
        found = list(self._pool.map(self._bytes, names))
        return torch.stack(found).float() / 255 if found else torch.zeros(0, 3, self.side_px, self.side_px)

    def _bytes(self, name: str) -> Tensor:
        key, _, number = name.partition("/")
        index = self._indices.get(key)
        data = self._store.picture(index, of_story=int(number) if number else None) if index is not None else None
        if data is None:
            raise DataError(f"no picture {name!r} is in the data: run the stages data and tokenize again")
        return _decoded(data, self.side_px)


def _decoded(data: bytes, side_px: int) -> Tensor:
    picture = square(load_picture(data, max_side_px=side_px), side_px)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
