"""The utterances of records with pictures, as windows of one length for the sound tower."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anygen.data.records import RecordStore
from anygen.seeding import seed_of


class SoundPairs:
    """Windows of the utterances of some records, decoded once each while they fit `cache_bytes` (16 bit a sample).

    Args:
        store: the records.
        indices: which of them, by item.
        rate_hz: that sounds are resampled to.
        num_samples: of a window; longer utterances are cut, shorter ones padded with silence.
        cache_bytes: limit of the cache.
    """

    def __init__(
        self, store: RecordStore, indices: list[int], *, rate_hz: int, num_samples: int, cache_bytes: int = 2**30
    ) -> None:
        self._store, self._indices = store, indices
        self._rate_hz, self._num_samples = rate_hz, num_samples
        self._cache: dict[tuple[int, int], tuple[npt.NDArray[np.int16], int]] = {}
        self._limit = cache_bytes // (2 * num_samples)

    def __len__(self) -> int:
        return sum(self._store.num_sounds(index) for index in self._indices)

    def batch(
        self, items: list[int], generator: random.Random | None = None, *, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """One utterance of each item that has any: `sounds` S x T, `owners` (places in `items`) and `texts` S.

        Utterances are drawn from `generator`, and are the first of each where there is none. With `rows`, only those of
        these items are made, as they are in the whole batch, and owners count from the first of them.
        """
        places = [place for place, item in enumerate(items) if self._num_sounds(item)]
        turns = {p: generator.randrange(self._num_sounds(items[p])) if generator else 0 for p in places}
        own = range(len(items))[rows]
        windows = [self._window(items[place], turn) for place, turn in turns.items() if place in own]
        owners = [place - own.start for place in places if place in own]
        sounds_ST = np.zeros((len(owners), self._num_samples), np.float32)
        for row, (samples_T, _) in enumerate(windows):
            sounds_ST[row, : len(samples_T)] = samples_T / np.float32(32767)
        return {
            "sounds": torch.from_numpy(sounds_ST),
            "owners": torch.tensor(owners, dtype=torch.long),
            "texts": torch.tensor([number for _, number in windows], dtype=torch.long),
        }

    def _num_sounds(self, item: int) -> int:
        return self._store.num_sounds(self._indices[item])

    def _window(self, item: int, turn: int) -> tuple[npt.NDArray[np.int16], int]:
        if (item, turn) in self._cache:
            return self._cache[item, turn]
        utterance = self._store[self._indices[item]].utterances[turn]
        samples_T = utterance.audio(self._rate_hz).samples_T[: self._num_samples]
        number = seed_of(utterance.text)  # the same on every process
        window = (np.round(np.clip(samples_T, -1, 1) * 32767).astype(np.int16), number)
        if len(self._cache) < self._limit:
            self._cache[item, turn] = window
        return window
