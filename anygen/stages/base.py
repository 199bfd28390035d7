"""What every stage shares: where it works, what it returns, and how it finds the work of the stages before it.

A stage works in `root/<stage>/` and reads `root/<other stage>/`. It may be killed at any moment: run again, it goes on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from anygen.config import Config
from anygen.data.order import Permutation
from anygen.data.records import RecordStore
from anygen.errors import DataError
from tokenizers_mm.image import square, to_pixels
from tokenizers_mm.media import load_picture
from tokenizers_mm.text import TextTokenizer


class StageConfig(Config):
    """Fields that every recipe has."""

    stage: str
    root: Path = Path("runs/default")
    """Folder of the run; the stage works in `root/<stage>`."""

    @property
    def folder(self) -> Path:
        """Where this stage works."""
        return self.root / self.stage

    def outside_inputs(self) -> Mapping[str, str]:
        """Fingerprints of what the stage reads from outside the run; the stage is done anew when they change."""
        return {}


@dataclass(frozen=True)
class StageResult:
    """What a stage made."""

    folder: Path
    outputs: tuple[Path, ...]
    """Files and folders that later stages or users read."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def open_records(root: Path, *splits: str) -> RecordStore:
    """The records that stage `data` wrote for these splits."""
    paths = [path for split in splits for path in (root / "data").glob(f"{split}-*.tar")]
    if not paths:
        raise DataError(f"{root / 'data'} has no shards of split {' or '.join(splits)}: run the stage data first")
    return RecordStore(paths)


def open_text_tokenizer(root: Path) -> TextTokenizer:
    """What stage `text_tokenizer` made."""
    return TextTokenizer.load(root / "text_tokenizer")


class PictureSet:
    """The pictures of a record store as uint8 pixels, decoded once each while they fit `cache_bytes`."""

    def __init__(self, store: RecordStore, side_px: int, *, cache_bytes: int = 2**30) -> None:
        self.store, self.side_px = store, side_px
        self.indices = [index for index in range(len(store)) if store.has_picture(index)]
        if not self.indices:
            raise DataError("the data hold no pictures")
        self._cache: dict[int, Tensor] = {}
        self._limit = cache_bytes // (3 * side_px**2)

    def __len__(self) -> int:
        return len(self.indices)

    def pixels(self, items: list[int]) -> Tensor:
        """B x C x H x W in [0, 1]."""
        return torch.stack([self._bytes(item) for item in items]).float() / 255

    def _bytes(self, item: int) -> Tensor:
        if item in self._cache:
            return self._cache[item]
        data = self.store[self.indices[item]].picture
        assert data is not None
        pixels = (to_pixels(square(load_picture(data), self.side_px)) * 255).byte()
        if len(self._cache) < self._limit:
            self._cache[item] = pixels
        return pixels


class Shuffled:
    """Endless batches of item numbers, every item once an epoch; its state is one integer."""

    def __init__(self, num_items: int, batch_size: int, *, seed: int) -> None:
        self._num_items, self._batch_size, self._seed = num_items, batch_size, seed
        self.position = 0

    def next(self) -> list[int]:
        """The next batch."""
        items = [self._item(self.position + i) for i in range(self._batch_size)]
        self.position += self._batch_size
        return items

    def generator(self) -> random.Random:
        """A generator for choices about the batch that `next` gave last."""
        return random.Random(f"{self._seed}|{self.position}")

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, self._num_items)
        return Permutation(self._num_items, self._seed * 1_000_003 + epoch)(place)


def usage_of(codes: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codebook that occurs, and the perplexity of its use."""
    hits = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    share = hits / hits.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return float((hits > 0).double().mean()), float(entropy.exp())


def usage_in_batch(codes: Tensor, codebook_size: int) -> Tensor:
    """Share of the codebook that occurs in one batch, as a tensor: to be reported without waiting for it."""
    return (torch.bincount(codes.flatten(), minlength=codebook_size) > 0).float().mean()
