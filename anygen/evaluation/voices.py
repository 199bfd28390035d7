"""Whose voice a sound has, and how far it is from a recording of the same words.

A voice is told by its spectrum alone: means and deviations of mel-frequency cepstra over the loud frames of a sound,
standardised over recordings of all known voices (the classical statistics of speaker recognition before there were
networks for it; no weights). How far a sound is from a recording is the mean difference of their log-mel spectra along
the best alignment in time (dynamic time warping), so that another tempo costs nothing.

Dimension key: N frames, M mel bands, D statistics, V voices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tokenizers_mm.media import Audio
from tokenizers_mm.spectral import log_mel

Doubles = npt.NDArray[np.float64]
_RATE_HZ, _WINDOW = 16_000, 1024
_FLOOR_DB, _LOUD_DB = -80.0, -30.0
_NUM_CEPSTRA = 20
_LEVEL = 0.1
"""Root mean square of a sound that is compared."""
_DB_PER_NEPER = 20 / np.log(10)


class Voices:
    """Known voices, from recordings of each."""

    def __init__(self, recordings: Mapping[str, Sequence[Audio]]) -> None:
        prints = {voice: np.stack([_statistics(sound) for sound in sounds]) for voice, sounds in recordings.items()}
        everything_ND = np.concatenate(list(prints.values()))
        self._mean_D, self._deviation_D = everything_ND.mean(axis=0), everything_ND.std(axis=0).clip(1e-6)
        self.names = tuple(prints)
        self._centres_VD = np.stack([self._standardised(found_ND.mean(axis=0)) for found_ND in prints.values()])

    def similarities(self, sound: Audio) -> dict[str, float]:
        """Cosine to the centre of each known voice, -1 to 1."""
        x_D = self._standardised(_statistics(sound))
        norms_V = np.linalg.norm(self._centres_VD, axis=1) * max(1e-9, float(np.linalg.norm(x_D)))
        return dict(zip(self.names, (self._centres_VD @ x_D / norms_V.clip(1e-9)).tolist(), strict=True))

    def nearest(self, sound: Audio) -> tuple[str, float]:
        """The known voice it is most like, and how much."""
        found = self.similarities(sound)
        voice = max(found, key=lambda name: found[name])
        return voice, found[voice]

    def _standardised(self, statistics_D: Doubles) -> Doubles:
        standardised_D: Doubles = (statistics_D - self._mean_D) / self._deviation_D
        return standardised_D


def aligned_mel_distance(sound: Audio, recording: Audio) -> float:
    """Mean absolute difference in dB of log-mel spectra, along the best alignment, both at one loudness.

    >>> tone = Audio(np.sin(np.arange(8000) / 5).astype(np.float32), 16_000)
    >>> round(aligned_mel_distance(tone, Audio(tone.samples_T * 0.5, 16_000)), 3)
    0.0
    """
    x_NM, y_NM = (_log_mel(_levelled(part)) for part in (sound, recording))
    costs_NN = np.abs(x_NM[:, None] - y_NM[None]).mean(axis=2)
    return float(_cheapest_path(costs_NN) * _DB_PER_NEPER)


def _cheapest_path(costs_NK: Doubles) -> float:
    """Mean cost along the cheapest monotonic path from corner to corner, by its cost and length."""
    rows, columns = costs_NK.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    steps = np.zeros((rows + 1, columns + 1))
    total[0, 0] = 0.0
    for diagonal in range(2, rows + columns + 1):  # the cells of an antidiagonal do not depend on one another
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        lengths = np.stack([steps[i - 1, j - 1], steps[i - 1, j], steps[i, j - 1]])
        best = before.argmin(axis=0)
        total[i, j] = costs_NK[i - 1, j - 1] + before[best, np.arange(len(i))]
        steps[i, j] = 1 + lengths[best, np.arange(len(i))]
    return float(total[rows, columns] / steps[rows, columns])


def _statistics(sound: Audio) -> Doubles:
    """Means and deviations of the cepstra of loud frames, without the first (loudness)."""
    from scipy.fft import dct

    mel_NM = _log_mel(sound)
    level_N = mel_NM.mean(axis=1) * _DB_PER_NEPER
    loud_NM = mel_NM[level_N >= level_N.max() + _LOUD_DB]
    cepstra_NC = dct(loud_NM, axis=1, norm="ortho")[:, 1:_NUM_CEPSTRA]
    return np.concatenate([cepstra_NC.mean(axis=0), cepstra_NC.std(axis=0)])


def _log_mel(sound: Audio) -> Doubles:
    """N x M in nepers."""
    samples_BT = torch.from_numpy(sound.resampled(_RATE_HZ).samples_T.copy())[None]
    mel_MN = log_mel(samples_BT, rate_hz=_RATE_HZ, window=_WINDOW, floor_db=_FLOOR_DB)[0]
    mel_NM: Doubles = mel_MN.T.double().numpy()
    return mel_NM


def _levelled(sound: Audio) -> Audio:
    size = float(np.sqrt(np.square(sound.samples_T).mean())) if len(sound.samples_T) else 0.0
    return Audio((sound.samples_T * (_LEVEL / max(size, 1e-9))).astype(np.float32), sound.rate_hz)
