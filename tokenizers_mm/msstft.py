"""EnCodec's discriminator: a convolutional judge of complex spectrograms at several window sizes, and its losses.

Source: EnCodec, arXiv 2210.13438, section 3.4 and figure 2; sizes as in audiocraft's configuration.
Dimension key: B sounds, T samples, N frames, F frequency bins, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tokenizers_mm.config import Config
from tokenizers_mm.together import averaged


class MSSTFTConfig(Config):
    """When and how strongly sounds are also judged."""

    weight: float = Field(0.0, ge=0)
    """Of the adversarial loss; 0 leaves discriminator and feature matching out."""
    feature_weight: float = Field(1.0, ge=0)
    """Of feature matching: the judge's inner states for the decoded sound should be those for the real one."""
    start_share: float = Field(0.3, ge=0, le=1)
    """Share of the steps before the first judgement."""
    channels: int = Field(32, ge=1)
    windows: tuple[PositiveInt, ...] = Field((2048, 1024, 512, 256, 128), min_length=1)
    """Samples of each STFT; its hop is a quarter."""

    @field_validator("windows")
    @classmethod
    def _quarters(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if any(window % 4 or window < 32 for window in windows):
            raise ValueError("windows are multiples of 4, at least 32 samples")
        return windows


class Judgement(NamedTuple):
    """What one scale says of a batch of sounds."""

    score: Tensor
    """B x 1 x N x f; high is real."""
    features: list[Tensor]
    """States after each convolution, B x C x N x f."""


class STFTDiscriminator(nn.Module):
    """One scale."""

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window = window
        self.hann: Tensor
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        wide: dict[str, Any] = {"kernel_size": (3, 9), "stride": (1, 2)}
        self.layers = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(2, channels, (3, 9), padding=(1, 4))),
                *(
                    weight_norm(nn.Conv2d(channels, channels, **wide, dilation=(step, 1), padding=(step, 4)))
                    for step in (1, 2, 4)
                ),
                weight_norm(nn.Conv2d(channels, channels, 3, padding=1)),
            ]
        )
        self.to_score = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, sound_BT: Tensor) -> Judgement:
        """Waveforms of at least one window to a judgement."""
        spectrum_BFN = torch.stft(
            sound_BT.float(),
            self.window,
            hop_length=self.window // 4,
            window=self.hann,
            center=False,
            normalized=True,
            return_complex=True,
        )
        x = torch.stack([spectrum_BFN.real, spectrum_BFN.imag], dim=1).transpose(2, 3)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return Judgement(self.to_score(x), features)


class MultiScaleSTFTDiscriminator(nn.Module):
    """All scales, each with weights of its own."""

    def __init__(self, config: MSSTFTConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(STFTDiscriminator(window, config.channels) for window in config.windows)

    def forward(self, sound_BT: Tensor) -> list[Judgement]:
        """Waveforms to one judgement a scale."""
        return [scale(sound_BT) for scale in self.scales]


def judge_frozen(discriminator: MultiScaleSTFTDiscriminator, sound_BT: Tensor) -> list[Judgement]:
    """The same judgements, with gradients for the sound only."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    judged: list[Judgement] = torch.func.functional_call(discriminator, frozen, (sound_BT,))
    return judged


def discriminator_loss(real: list[Judgement], decoded: list[Judgement]) -> Tensor:
    """Hinge, mean of the scales: real above 1, decoded below -1."""
    return torch.stack(
        [
            F.relu(1 - ours.score.float()).mean() + F.relu(1 + theirs.score.float()).mean()
            for ours, theirs in zip(real, decoded, strict=True)
        ]
    ).mean()


def adversarial_loss(decoded: list[Judgement]) -> Tensor:
    """What the codec minimises to be taken for real, mean of the scales."""
    return torch.stack([-judgement.score.float().mean() for judgement in decoded]).mean()


def feature_loss(real: list[Judgement], decoded: list[Judgement]) -> Tensor:
    """Mean over scales and layers of |real - decoded| / mean |real| (EnCodec, equation 2)."""
    return torch.stack(
        [
            (target.detach().float() - state.float()).abs().mean()
            / averaged(target.detach().float().abs().mean()).clamp_min(1e-8)
            for ours, theirs in zip(real, decoded, strict=True)
            for target, state in zip(ours.features, theirs.features, strict=True)
        ]
    ).mean()
