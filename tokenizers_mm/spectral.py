"""Spectral losses of neural codecs: log-mel distances at several window sizes (EnCodec, arXiv 2210.13438, section 3.4).

Dimension key: B sounds, T samples, F frequency bins, M mel bands, N frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tokenizers_mm import compat  # noqa: F401  before transformers

WINDOWS = (64, 128, 256, 512, 1024, 2048)


def mel_distance(predicted_BT: Tensor, sound_BT: Tensor, *, rate_hz: int) -> Tensor:
    """Mean absolute difference of log-mel spectra over all window sizes; fp32."""
    distances = [
        (log_mel(predicted_BT, rate_hz=rate_hz, window=window) - log_mel(sound_BT, rate_hz=rate_hz, window=window))
        .abs()
        .mean()
        for window in WINDOWS
        if window <= sound_BT.shape[1]
    ]
    return torch.stack(distances).mean()


def log_mel(sound_BT: Tensor, *, rate_hz: int, window: int) -> Tensor:
    """Log-mel spectrum, B x M x N, hop a quarter of the window; fp32, also under autocast."""
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
        return torch.log(mel_BMN.clamp_min(1e-5))


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
