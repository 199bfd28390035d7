"""Any Pillow picture as 8-bit RGB: every mode, transparency over white, upright; in strips, so that no copy is whole.

Dimension key: H rows, W columns.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tokenizers_mm.errors import InputError

_STRIP_PIXELS = 2**20
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(picture: Image.Image) -> Image.Image:
    """A new RGB picture of the same size, with no metadata; transparent pixels are laid over white.

    16-bit greys are scaled from 65,535, 32-bit ones from 255 or 65,535 and floats from 1, 255 or 65,535: the first
    that none exceeds. Colour profiles are ignored: numbers are taken as sRGB.

    Raises:
        InputError: a picture of floats holds NaN or infinity.
    """
    picture.load()
    width, height = picture.size
    top = _largest_value(picture) if picture.mode in _DEEP else None
    rgb = Image.new("RGB", picture.size)
    rows = max(1, _STRIP_PIXELS // width)
    for row in range(0, height, rows):
        strip = picture.crop((0, row, width, min(height, row + rows)))
        rgb.paste(_strip_rgb(strip, top), (0, row))
    return rgb


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture turned as EXIF's orientation (1 to 8) says; other numbers leave it as it is."""
    method = _UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(method)


def _strip_rgb(strip: Image.Image, top: float | None) -> Image.Image:
    if top is not None:
        shades_HW = np.asarray(strip, dtype=np.float32) * np.float32(255 / top)
        if not np.isfinite(shades_HW).all():
            raise InputError("the picture holds NaN or infinite values")
        strip = Image.fromarray(shades_HW.clip(0, 255).round().astype(np.uint8))
    if strip.mode == "La":  # Pillow converts it to LA only
        strip = strip.convert("LA")
    if strip.has_transparency_data:
        layer = strip.convert("RGBA")
        strip = Image.new("RGBA", layer.size, "white")
        strip.alpha_composite(layer)
    return strip.convert("RGB")


def _largest_value(picture: Image.Image) -> float:
    """What white is."""
    if picture.mode.startswith("I;16"):
        return 65535.0
    largest = picture.getextrema()[1]
    tops = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
    return next((top for top in tops if float(largest) <= top), tops[-1])  # type: ignore[arg-type]
