"""Augmentation of picture batches, each picture by its own draw: crop, mirror, shift, turn, colour. No torchvision.

The defaults change nothing. BEiT v2 (arXiv 2208.06366) trains its tokenizer with `crop_scale: [0.08, 1]`, bicubic, and
`flip: 0.5`, without colour. Mirror and shift move whole pixels and are exact; turn and crop are one affine map and one
bicubic sampling, so nothing is blurred twice. A crop is only ever enlarged, hence no antialiasing.

Dimension key: B pictures, C colours, H rows, W columns.
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from anygen.config import Config
from anygen.errors import ConfigError

_GREY = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601, as in Pillow's `L`."""


class AugmentationConfig(Config):
    """What may happen to a picture in training; the defaults change nothing."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the area that a crop keeps, from and to, in (0, 1]; it is resized to full size. (1, 1) is no crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of a crop, from and to, drawn evenly in the logarithm; a side too long is cut."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal mirror. Leave 0 where the captions say left and right."""
    max_shift_px: int = Field(0, ge=0)
    """A shift by whole pixels, each way up to this; it must be smaller than the picture."""
    max_turn_deg: float = Field(0.0, ge=0, le=180)
    """A turn about the middle, each way up to this."""
    colour: float = Field(0.0, ge=0, le=1)
    """Strength of jitter: brightness, contrast and saturation are each scaled by 1 - colour to 1 + colour."""
    fill: float = Field(1.0, ge=0, le=1)
    """What a shift or turn leaves empty; 1 is white."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is (from, to) with 0 < from <= to <= 1; got {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0.1 <= low <= high <= 10:
            raise ValueError(f"crop_ratio is (from, to) with 0.1 <= from <= to <= 10; got {self.crop_ratio}")
        return self


def augment(
    pixels_BCHW: Tensor,
    config: AugmentationConfig,
    generator: torch.Generator,
    *,
    rows: slice = slice(None),
    of: int = 0,
) -> Tensor:
    """Each picture mirrored, shifted, cropped, turned and coloured by its own draw.

    Args:
        pixels_BCHW: floats in [0, 1]; 3 colours where `config.colour` is above 0.
        config: what may happen; where it is nothing, the very same tensor comes back and nothing is drawn.
        generator: on the CPU whatever the pictures' device, so that draws are the same everywhere. It moves on by the
            same amount for every config that does something.
        rows: of the whole batch, where the pictures are a part of one: each has the draw that it has there.
        of: pictures of that whole batch.

    Returns:
        B x C x H x W in [0, 1], of the same type and on the same device, without gradients.

    Raises:
        ConfigError: a shift as large as the picture.
    """
    assert pixels_BCHW.ndim == 4 and pixels_BCHW.is_floating_point(), (pixels_BCHW.shape, pixels_BCHW.dtype)
    if len(pixels_BCHW) == 0 or config == AugmentationConfig(crop_ratio=config.crop_ratio, fill=config.fill):
        return pixels_BCHW
    if config.max_shift_px >= min(pixels_BCHW.shape[2:]):
        raise ConfigError(
            f"max_shift_px={config.max_shift_px} leaves nothing of a picture of {tuple(pixels_BCHW.shape[2:])} pixels; "
            "make it smaller than the picture's sides"
        )
    # Every draw is made, used or not: turning one setting on leaves the draws of the others as they were.
    draws_NB = torch.rand(of or len(pixels_BCHW), 11, generator=generator)[rows].T.to(pixels_BCHW.device)
    mirror_B, shifts_2B, crop_4B, turn_B, colour_3B = draws_NB.split([1, 2, 4, 1, 3])
    with torch.no_grad():
        if config.flip > 0:
            mirrored_B111 = (mirror_B[0] < config.flip)[:, None, None, None]
            pixels_BCHW = torch.where(mirrored_B111, pixels_BCHW.flip(-1), pixels_BCHW)
        if config.max_shift_px > 0:
            pixels_BCHW = _shifted(pixels_BCHW, config, shifts_2B)
        if config.crop_scale[0] < 1 or config.max_turn_deg > 0:
            pixels_BCHW = _sampled(pixels_BCHW, config, crop_4B, turn_B[0])
        if config.colour > 0:
            pixels_BCHW = _coloured(pixels_BCHW, 1 + config.colour * (2 * colour_3B - 1))
        return pixels_BCHW.clamp(0, 1)


def _shifted(pixels_BCHW: Tensor, config: AugmentationConfig, draws_2B: Tensor) -> Tensor:
    """Each picture moved by whole pixels, every shift from -max to max equally likely."""
    most, (height, width) = config.max_shift_px, pixels_BCHW.shape[2:]
    start_2B1 = (draws_2B * (2 * most + 1)).long().clamp(max=2 * most)[:, :, None]
    rows_BH = start_2B1[0] + torch.arange(height, device=pixels_BCHW.device)
    columns_BW = start_2B1[1] + torch.arange(width, device=pixels_BCHW.device)
    padded_BHWC = F.pad(pixels_BCHW, (most,) * 4, value=config.fill).permute(0, 2, 3, 1)
    pictures_B11 = torch.arange(len(pixels_BCHW), device=pixels_BCHW.device)[:, None, None]
    return padded_BHWC[pictures_B11, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _sampled(pixels_BCHW: Tensor, config: AugmentationConfig, crop_4B: Tensor, turn_B: Tensor) -> Tensor:
    """Crop and turn in one bicubic sampling; what lies outside the picture is `fill`."""
    height, width = pixels_BCHW.shape[2:]
    grid_BHW2 = F.affine_grid(
        _affine(config, crop_4B, turn_B, height, width), [len(turn_B), 1, height, width], align_corners=False
    )
    # Half precision cannot tell the pixels of a large picture apart, and the CPU samples no bfloat16.
    sampled = F.grid_sample(pixels_BCHW.float(), grid_BHW2, "bicubic", padding_mode="border", align_corners=False)
    if config.max_turn_deg > 0:
        inside_B1HW = (grid_BHW2.abs() <= 1).all(-1)[:, None]
        sampled = torch.where(inside_B1HW, sampled, config.fill)
    return sampled.to(pixels_BCHW.dtype)


def _affine(config: AugmentationConfig, crop_4B: Tensor, turn_B: Tensor, height: int, width: int) -> Tensor:
    """B x 2 x 3: from a place in the result to its place in the picture, both from -1 to 1."""
    low, high = config.crop_scale
    scale_B = low + (high - low) * crop_4B[0]
    log_low, log_high = (math.log(ratio) for ratio in config.crop_ratio)
    aspect_B = (log_low + (log_high - log_low) * crop_4B[1]).exp()
    if low == 1:  # no crop: the ratio does not count
        wide_B = tall_B = torch.ones_like(scale_B)
    else:
        # torchvision draws ten times until a crop fits and else takes the middle; here a side too long is cut.
        area_B = scale_B * height * width
        wide_B = ((area_B * aspect_B).sqrt() / width).clamp(max=1)
        tall_B = ((area_B / aspect_B).sqrt() / height).clamp(max=1)
    middle_x_B, middle_y_B = (1 - wide_B) * (2 * crop_4B[2] - 1), (1 - tall_B) * (2 * crop_4B[3] - 1)
    angle_B = (2 * turn_B - 1) * math.radians(config.max_turn_deg)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    # a turn is one in pixels: in a wide picture -1 to 1 is longer across than down
    across_B3 = torch.stack([wide_B * cos_B, -wide_B * sin_B * height / width, middle_x_B], dim=1)
    down_B3 = torch.stack([tall_B * sin_B * width / height, tall_B * cos_B, middle_y_B], dim=1)
    return torch.stack([across_B3, down_B3], dim=1)


def _coloured(pixels_BCHW: Tensor, strength_3B: Tensor) -> Tensor:
    """Brightness, contrast, saturation: blends with black, with the mean grey, with each pixel's own grey."""
    brightness, contrast, saturation = strength_3B.to(pixels_BCHW.dtype)[..., None, None, None]
    pixels_BCHW = (pixels_BCHW * brightness).clamp(0, 1)
    mean_B111 = _grey(pixels_BCHW).mean(dim=(2, 3), keepdim=True)
    pixels_BCHW = (mean_B111 + (pixels_BCHW - mean_B111) * contrast).clamp(0, 1)
    grey_B1HW = _grey(pixels_BCHW)
    return grey_B1HW + (pixels_BCHW - grey_B1HW) * saturation


def _grey(pixels_BCHW: Tensor) -> Tensor:
    weights_C11 = torch.tensor(_GREY, dtype=pixels_BCHW.dtype, device=pixels_BCHW.device)[:, None, None]
    return (pixels_BCHW * weights_C11).sum(1, keepdim=True)
