"""Spectral losses of neural codecs: log-mel distances at several window sizes (EnCodec, arXiv 2210.13438, section 3.4).

Dimension key: B sounds, T samples, F frequency bins, M mel bands, N frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tokenizers_mm import compat  # noqa: F401  before transformers

WINDOWS = (64, 128, 256, 512, 1024, 2048)


def mel_distance(predicted_BT: Tensor, sound_BT: Tensor, *, rate_hz: int, floor_db: float | None = None) -> Tensor:
    """Mean absolute difference of log-mel spectra over all window sizes; fp32. `floor_db` is that of `log_mel`."""
    distances = []
    for window in WINDOWS:
        if window <= sound_BT.shape[1]:
            predicted, sound = (
                log_mel(x, rate_hz=rate_hz, window=window, floor_db=floor_db) for x in (predicted_BT, sound_BT)
            )
            distances.append((predicted - sound).abs().mean())
    return torch.stack(distances).mean()


def log_mel(sound_BT: Tensor, *, rate_hz: int, window: int, floor_db: float | None = None) -> Tensor:
    """Log-mel spectrum, B x M x N, hop a quarter of the window; fp32, also under autocast.

    Args:
        sound_BT: waveforms in [-1, 1].
        rate_hz: of the waveforms.
        window: samples of the STFT.
        floor_db: added to every band, in dB of a full-scale sine, so that what nobody hears weighs nothing; None
            clips at 1e-5 instead (-148 dB at a window of 1024).
    """
    with torch.autocast(sound_BT.device.type, enabled=False):
        spectrum_BFN = torch.stft(
            sound_BT.float(),
            window,
            hop_length=window // 4,
            window=torch.hann_window(window, device=sound_BT.device),
            return_complex=True,
            pad_mode="constant",
        ).abs()
        filters_FM = _mel_filters(rate_hz, window).to(sound_BT.device)
        mel_BMN = (spectrum_BFN.transpose(1, 2) @ filters_FM).transpose(1, 2)
        if floor_db is None:
            return torch.log(mel_BMN.clamp_min(1e-5))
        return torch.log(mel_BMN + window / 4 * 10 ** (floor_db / 20))


@lru_cache(maxsize=32)
def _mel_filters(rate_hz: int, window: int) -> Tensor:
    """F x M triangles; the smaller the window the fewer bands, so that none is empty."""
    from transformers.audio_utils import mel_filter_bank

    bands = max(5, min(80, window // 16))
    filters = mel_filter_bank(
        num_frequency_bins=window // 2 + 1,
        num_mel_filters=bands,
        min_frequency=0.0,
        max_frequency=rate_hz / 2,
        sampling_rate=rate_hz,
        norm=None,
        mel_scale="slaney",
    )
    filters = torch.from_numpy(filters).float()
    return filters / filters.sum(0, keepdim=True).clamp_min(1e-6)
