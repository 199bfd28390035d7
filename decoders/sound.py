"""Sound as a decoder's data: a codec's latents, one channel a feature and one column a frame, at mean 0 and spread 1.

EnCodec's quantiser takes what was drawn back to codes of the vocabulary, so that a transformer can read it again, and
every codebook that a sequence left out (order `coarse`) is filled in by the drawing.

Dimension key: B sounds, L channels of the latents, T frames.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenizers_mm import compat  # noqa: F401  before diffusers


class LatentScale(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Mean and spread of a codec's latents, saved with the decoder that works in them.

    Args:
        channels: L.
    """

    @register_to_config
    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.mean_L: Tensor
        self.spread_L: Tensor
        self.register_buffer("mean_L", torch.zeros(channels))
        self.register_buffer("spread_L", torch.ones(channels))

    def measure(self, latents_BLT: Tensor) -> None:
        """Take mean and standard deviation of each channel from examples."""
        frames_LM = latents_BLT.transpose(0, 1).flatten(1)
        self.mean_L.copy_(frames_LM.mean(1))
        self.spread_L.copy_(frames_LM.std(1).clamp_min(1e-6))

    def data(self, latents_BLT: Tensor) -> Tensor:
        """Latents to what a denoiser sees, B x L x 1 x T."""
        return ((latents_BLT - self.mean_L[:, None]) / self.spread_L[:, None])[:, :, None]

    def latents(self, data_BL1T: Tensor) -> Tensor:
        """The inverse of `data`."""
        return data_BL1T[:, :, 0] * self.spread_L[:, None] + self.mean_L[:, None]
