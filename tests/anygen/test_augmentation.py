"""Augmentation: what is promised to be exact is exact, every picture has its own draw, and the defaults do nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from pydantic import ValidationError
from torch import Tensor

from anygen.data.augmentation import AugmentationConfig, augment
from anygen.errors import ConfigError

EVERYTHING = AugmentationConfig(crop_scale=(0.08, 1.0), flip=0.5, max_shift_px=2, max_turn_deg=15, colour=0.4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 6, height: int = 9, width: int = 13) -> Tensor:
    return torch.rand(count, 3, height, width, generator=generator(99))


def changed(pixels: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    return augment(pixels, AugmentationConfig(**settings), generator(seed))


def test_the_defaults_give_the_same_tensor_and_draw_nothing() -> None:
    pixels, chooser = pictures(), generator()
    assert augment(pixels, AugmentationConfig(fill=0.5, crop_ratio=(0.5, 0.6)), chooser) is pixels
    assert torch.equal(chooser.get_state(), generator().get_state())


def test_the_generator_decides_and_the_global_one_is_not_touched() -> None:
    pixels, state = pictures(), torch.get_rng_state()
    kept = pixels.clone()
    first = augment(pixels, EVERYTHING, generator(1))
    assert torch.equal(first, augment(pixels, EVERYTHING, generator(1)))
    assert not torch.equal(first, augment(pixels, EVERYTHING, generator(2)))
    assert torch.equal(pixels, kept), "the batch itself is not written to"
    assert torch.equal(state, torch.get_rng_state())


def test_a_flip_is_exactly_a_flip() -> None:
    pixels = pictures()
    assert torch.equal(changed(pixels, flip=1.0), pixels.flip(-1))
    many = pictures(400, 2, 3)
    flipped = (changed(many, flip=0.5) == many.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(changed(many, flip=0.5)[~flipped], many[~flipped])
    assert 160 < int(flipped.sum()) < 240


def test_a_crop_of_everything_is_the_picture() -> None:
    pixels = pictures()
    assert torch.allclose(changed(pixels, crop_scale=(1 - 1e-9, 1.0), crop_ratio=(13 / 9, 13 / 9)), pixels, atol=1e-5)


@pytest.mark.parametrize("fill", [1.0, 0.25])
def test_a_shift_moves_whole_pixels_and_leaves_the_fill(fill: float) -> None:
    pixels = pictures(200, 5, 7)
    moved, seen = changed(pixels, max_shift_px=2, fill=fill), set()
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=fill)
    for before, after in zip(padded, moved, strict=True):
        fits = [
            (down, across)
            for down in range(5)
            for across in range(5)
            if torch.equal(before[:, down : down + 5, across : across + 7], after)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25, "every shift from -2 to 2 occurs"
    with pytest.raises(ConfigError, match="max_shift_px=5 leaves nothing"):
        changed(pixels, max_shift_px=5)


def test_a_crop_is_a_part_of_the_picture_of_the_asked_size() -> None:
    down, across = torch.meshgrid(torch.arange(64) / 64, torch.arange(48) / 48, indexing="ij")
    ramps = torch.stack([across, down, torch.zeros_like(down)])[None].repeat(100, 1, 1, 1)
    cut = changed(ramps, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    # on a ramp the slope tells the crop's side; bicubic with a = -0.75 is not quite linear on it
    side_px = (0.25 * 64 * 48) ** 0.5
    assert torch.allclose(cut[:, 0, 30, 44] - cut[:, 0, 30, 4], torch.tensor(40 / 48 * side_px / 48), atol=4e-3)
    assert torch.allclose(cut[:, 1, 60, 20] - cut[:, 1, 4, 20], torch.tensor(56 / 64 * side_px / 64), atol=4e-3)
    assert cut[:, 0, 30, 24].std() > 0.05 and cut[:, 1, 30, 24].std() > 0.05, "each has its own place"


def test_a_turn_is_a_turn_in_pixels_and_white_beyond_the_picture() -> None:
    black = torch.zeros(60, 1, 16, 40)
    shares = changed(black, max_turn_deg=180.0).mean(dim=(1, 2, 3))
    assert 0.4 < float(shares.max()) <= 1 - 16 / 40 + 0.05, "a quarter turn leaves a square of 16 in 16 x 40"
    square = torch.zeros(1, 3, 31, 31)
    square[:, :, 10:21, 10:21] = 1
    picture = Image.fromarray((square[0].permute(1, 2, 0) * 255).byte().numpy())
    draw = float(torch.rand(1, 11, generator=generator())[0, 7])
    expected = picture.rotate(-(2 * draw - 1) * 40, Image.Resampling.BICUBIC, fillcolor="white")
    got = changed(square, max_turn_deg=40.0)[0].permute(1, 2, 0).numpy()
    either = [
        np.asarray(p, dtype=np.float32) / 255 for p in (expected, expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    ]
    assert min(np.abs(got - e).mean() for e in either) < 0.02


def test_a_turn_of_a_wide_picture_does_not_shear_it() -> None:
    middle = torch.ones(8, 3, 31, 31)
    middle[:, :, 9:22, 9:22] = torch.rand(8, 3, 13, 13, generator=generator(5))
    wide = torch.nn.functional.pad(middle, (15, 15, 0, 0), value=1.0)
    turned, turned_wide = (changed(p, max_turn_deg=90.0) for p in (middle, wide))
    assert not torch.allclose(turned, middle, atol=0.1)
    assert torch.allclose(turned_wide[..., 15:46], turned, atol=1e-4)


def test_crops_of_a_plain_picture_are_plain_to_the_edge() -> None:
    grey = torch.full((50, 3, 9, 13), 0.5)
    assert torch.allclose(changed(grey, crop_scale=(0.08, 1.0)), grey, atol=1e-6)
    turned = changed(grey, max_turn_deg=30.0)
    assert bool(((turned - 0.5).abs().lt(1e-5) | turned.eq(1.0)).all()), "the picture or white, nothing between"


def test_colour_is_brightness_then_contrast_then_saturation() -> None:
    pixels = pictures(4)
    draws = torch.rand(4, 11, generator=generator())[:, 8:].tolist()
    for before, after, draw in zip(pixels, changed(pixels, colour=0.6), draws, strict=True):
        picture = Image.fromarray((before.permute(1, 2, 0) * 255).round().byte().numpy())
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, number in zip(enhancers, draw, strict=True):
            picture = enhancer(picture).enhance(1 + 0.6 * (2 * number - 1))
        gaps = np.abs(np.asarray(picture) - 255 * after.permute(1, 2, 0).numpy())
        assert gaps.mean() < 2 and gaps.max() < 6, "Pillow rounds after each step"


def test_colour_keeps_grey_grey_and_places_as_they_are() -> None:
    grey = torch.full((50, 3, 4, 4), 0.5)
    out = changed(grey, colour=0.5)
    assert torch.allclose(out, out[:, :1, :1, :1].expand_as(out), atol=1e-6)
    assert 0.25 <= float(out.min()) < 0.35 and 0.65 < float(out.max()) <= 0.75, "only brightness shows on grey"
    black = torch.zeros(3, 3, 4, 4)
    assert torch.equal(changed(black, colour=1.0), black)
    vivid = torch.zeros(200, 3, 4, 4)
    vivid[:, 0] = 0.5
    red, green = changed(vivid, colour=0.4)[:, :2].mean(dim=(2, 3)).T
    assert float((red - green).std()) > 0.05 and bool((red > green).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9, 13), (1, 16, 16), (0, 8, 8)], ids=str)
def test_the_result_stays_a_picture(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    sharp = (pictures(*shape) > 0.5).to(dtype)
    out = augment(sharp, EVERYTHING, generator())
    assert out.shape == sharp.shape and out.dtype == dtype
    assert bool(((out >= 0) & (out <= 1)).all())


def test_no_gradient_flows() -> None:
    pixels = pictures().requires_grad_()
    assert not augment(pixels, EVERYTHING, generator()).requires_grad


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    pixels = pictures()
    other = 1 - pixels
    other[3] = pixels[3]
    assert torch.equal(augment(pixels, EVERYTHING, generator())[3], augment(other, EVERYTHING, generator())[3])
    same = pixels[:1].repeat(5, 1, 1, 1)
    out = augment(same, EVERYTHING, generator())
    assert all(not torch.equal(out[i], out[j]) for i in range(5) for j in range(i)), "each has its own draw"
    assert torch.allclose(augment(pixels[:2], EVERYTHING, generator()), augment(pixels, EVERYTHING, generator())[:2])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"crop_ratio": (float("nan"), 1.0)}, "crop_ratio"),
        ({"flip": 1.1}, "flip"),
        ({"max_shift_px": -1}, "max_shift_px"),
        ({"max_turn_deg": 181}, "max_turn_deg"),
        ({"colour": 2}, "colour"),
        ({"color": 0.5}, "color"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        AugmentationConfig(**settings)
