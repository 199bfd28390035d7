"""Spectrograms as pictures: log magnitudes over time, low frequencies at the bottom."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tokenizers_mm.media import Audio

_WINDOW, _HOP = 512, 128
_FLOOR_DB = -70.0
# Five stops from dark blue over magenta to pale yellow, like the perceptually even maps people know.
_STOPS = np.array([[13, 8, 60], [94, 13, 118], [186, 54, 85], [249, 142, 32], [252, 255, 200]], dtype=float)


def draw_spectrogram(audio: Audio, *, height_px: int = 96, px_per_s: int = 160) -> Image.Image:
    """A picture of a sound; its width grows with its length."""
    samples_T = np.pad(audio.samples_T, (0, max(0, _WINDOW - len(audio.samples_T))))
    frames_NW = np.lib.stride_tricks.sliding_window_view(samples_T, _WINDOW)[::_HOP]
    magnitudes_NF = np.abs(np.fft.rfft(frames_NW * np.hanning(_WINDOW), axis=1))
    level_NF = 20 * np.log10(magnitudes_NF / max(float(magnitudes_NF.max()), 1e-9) + 1e-9)
    share_FN = np.clip((level_NF - _FLOOR_DB) / -_FLOOR_DB, 0, 1).T[::-1]
    stops = np.linspace(0, 1, len(_STOPS))
    colours = np.stack([np.interp(share_FN, stops, _STOPS[:, c]) for c in range(3)], axis=-1)
    picture = Image.fromarray(colours.astype(np.uint8))
    width = max(32, round(audio.duration_s * px_per_s))
    return picture.resize((width, height_px), Image.Resampling.BILINEAR)
