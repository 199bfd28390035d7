"""The pixel head: code vectors to pixels, a transformer over the grid and a small convolution over patch borders.

Dimension key: B pictures, N patches, D width, X code dimension, C colours, H x W pixels.
"""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizers_mm.config import Config
from tokenizers_mm.vit import Transformer, check_width, from_patches

_NEAREST = 2e-4
"""Added to the MSE between two pictures (45 dB): what is nearer than that need not be told apart."""


class PixelHeadConfig(Config):
    """Architecture; saved with the tokenizer."""

    width: int = Field(256, ge=1)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(8, ge=1)
    refine_channels: int = Field(24, ge=0)
    """Channels of the convolution at full size; 0 leaves it out."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_width(self.width, self.num_heads)
        return self


class PixelHead(nn.Module):
    """Draws pictures from code vectors."""

    def __init__(self, config: PixelHeadConfig, *, code_dim: int, patch_px: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.embed = nn.Linear(code_dim, config.width)
        self.transformer = Transformer(config.width, config.depth, config.num_heads)
        channels = config.refine_channels
        self.to_pixels = nn.Linear(config.width, (3 + channels) * patch_px**2)
        self.refine = nn.Sequential(nn.GELU(), nn.Conv2d(channels, 3, 5, padding=2)) if channels else None

    def forward(self, vectors_BNX: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Code vectors to pixels B x C x H x W, about in [0, 1] but not clipped: a loss has gradients everywhere."""
        patches = self.to_pixels(self.transformer(self.embed(vectors_BNX), grid_hw))
        planes = from_patches(patches, grid_hw, self.patch_px)
        pixels = planes[:, :3]
        if self.refine is not None:
            pixels = pixels + self.refine(planes[:, 3:])
        return pixels * 0.5 + 0.5


def neighbour_loss(predicted_BCHW: Tensor, pixels_BCHW: Tensor, neighbours_BCHW: Tensor) -> Tensor:
    """How far the errors lead to another picture: the square of the share of the way, mean over pictures.

    0 is the picture itself, 1 the other one, and from 1/4 on (half of the way) the drawing is nearer to the other one.
    An error in what tells the two apart weighs the more the less that is, where the MSE would hardly see it: the skin
    tone of a face of eight pixels.
    """
    way_BD = (neighbours_BCHW - pixels_BCHW).flatten(1).float()
    error_BD = (predicted_BCHW.float() - pixels_BCHW).flatten(1)
    share_B = (error_BD * way_BD).mean(1) / (way_BD.square().mean(1) + _NEAREST)
    return share_B.square().mean()


def pixel_loss(predicted_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """L1 and MSE in equal parts: the first keeps edges, the second punishes wrong colours."""
    predicted_BCHW = predicted_BCHW.float()
    return F.l1_loss(predicted_BCHW, pixels_BCHW) + F.mse_loss(predicted_BCHW, pixels_BCHW)
