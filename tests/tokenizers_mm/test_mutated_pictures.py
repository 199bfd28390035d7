"""3,000 mutated picture files: no crash, a typed error or an RGB picture, at most 300 MB extra and 2 s each.

They run in one process of their own, so that a crash of a decoder is seen too, and says which file it was:
`mutated(seed)` gives its bytes again.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import Chooser, assert_bounded, check_all, flipped, flipped_in_the_header, inserted, shuffled, truncated
from PIL import Image

from tokenizers_mm.media import load_picture

LARGE = (0, 1, 3, 255, 3500, 4900, 5000, 16_384, 16_385, 40_000, 65_535, 10**6, 2**31 - 1, 2**32 - 1)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def originals() -> dict[str, bytes]:
    """Valid files of every kind that is read, each of 61 x 43 pixels."""
    chooser = np.random.default_rng(0)
    coarse = Image.fromarray(chooser.integers(0, 256, (6, 8, 4), dtype=np.uint8))
    rgba = coarse.resize((61, 43), Image.Resampling.BICUBIC)
    rgb, frames = rgba.convert("RGB"), [rgba.rotate(90 * turn) for turn in range(1, 4)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    deep = Image.fromarray(chooser.integers(0, 2**16, (43, 61), dtype=np.uint16))
    return {
        "png": encoded(rgb, "PNG", exif=exif),
        "png-rgba": encoded(rgba, "PNG"),
        "png-palette": encoded(rgb.quantize(40), "PNG", transparency=3),
        "png-16": encoded(deep, "PNG"),
        "png-1": encoded(rgb.convert("1"), "PNG"),
        "png-animated": encoded(rgba, "PNG", save_all=True, append_images=frames),
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg-progressive": encoded(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG", progressive=True),
        "jpeg-exif": encoded(rgb, "JPEG", exif=exif, restart_marker_rows=1),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp-alpha": encoded(rgba, "WEBP", quality=60),
        "webp-lossless": encoded(rgba, "WEBP", lossless=True),
        "webp-animated": encoded(rgba, "WEBP", save_all=True, append_images=frames, lossless=True),
        "gif": encoded(rgb.quantize(60), "GIF", interlace=1, comment=b"a picture"),
        "gif-animated": encoded(rgba, "GIF", save_all=True, append_images=frames),
        "bmp": encoded(rgb, "BMP"),
        "bmp-palette": encoded(rgb.quantize(16), "BMP"),
    }


def mutated(seed: int) -> bytes:
    """One mutated file; the seed says which original, which mutation and where."""
    names = sorted(originals())
    name, mutate = names[seed % len(names)], MUTATIONS[seed // len(names) % len(MUTATIONS)]
    chooser = np.random.default_rng(seed)
    data = mutate(originals()[name], chooser)
    # Half of the PNGs get right checksums, or no mutation would come further than these.
    return with_right_checksums(data) if name.startswith("png") and chooser.random() < 0.5 else data


def rearranged(data: bytes, chooser: Chooser) -> bytes:
    """Two chunks swapped, or one repeated up to 200 times, or one left out."""
    return b"".join(shuffled(parts(data), chooser))


def resized(data: bytes, chooser: Chooser) -> bytes:
    """Width and height overwritten by large numbers where the header says them."""
    out = bytearray(data)
    place, form = size_field(data)
    most = 2 ** (8 * struct.calcsize(form[:2])) // (2 if form[1] == "i" else 1) - 1
    struct.pack_into(form, out, place, *(min(int(n), most) for n in chooser.choice(LARGE, 2)))
    return with_right_checksums(bytes(out)) if data[1:4] == b"PNG" else bytes(out)


MUTATIONS: tuple[Callable[[bytes, Chooser], bytes], ...] = (
    flipped, flipped_in_the_header, truncated, inserted, rearranged, resized,
)  # fmt: skip


def parts(data: bytes) -> list[bytes]:
    """Signature and chunks of a PNG or WEBP, segments of a JPEG, of others pieces of 40 bytes."""
    cuts = list(range(0, len(data), 40))
    if data[1:4] == b"PNG":
        cuts = [0, 8]
        while cuts[-1] < len(data):
            cuts.append(cuts[-1] + 12 + int.from_bytes(data[cuts[-1] : cuts[-1] + 4]))
    elif data[8:12] == b"WEBP":
        cuts = [0, 12]
        while cuts[-1] < len(data):
            length = int.from_bytes(data[cuts[-1] + 4 : cuts[-1] + 8], "little")
            cuts.append(cuts[-1] + 8 + length + length % 2)
    elif data[:2] == b"\xff\xd8":
        cuts = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


def size_field(data: bytes) -> tuple[int, str]:
    """Where the width and height are, and as what."""
    if data[1:4] == b"PNG":
        return 16, ">II"
    if data[:3] == b"GIF":
        return 6, "<HH"
    if data[:2] == b"BM":
        return 18, "<ii"
    if data[8:12] == b"WEBP":
        return {b"VP8X": (24, "<HH"), b"VP8 ": (26, "<HH"), b"VP8L": (21, "<HH")}[data[12:16]]
    frame = next(part for part in parts(data) if part[:2] in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"))
    return data.index(frame) + 5, ">HH"


def with_right_checksums(data: bytes) -> bytes:
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4])
        if end + 4 <= len(out):
            struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_mutated_pictures_cost_little_and_fail_by_typed_errors() -> None:
    assert_bounded(__file__)


def test_the_originals_are_pictures_and_mutations_come_again() -> None:
    for name, data in originals().items():
        assert load_picture(data).size == ((43, 61) if name in ("png", "jpeg-exif", "webp") else (61, 43))
        assert b"".join(parts(data)) == data and len(parts(data)) > 1
    some = [mutated(seed) for seed in range(200)]
    assert some == [mutated(seed) for seed in range(200)]
    assert len(set(some)) > 190 and len(set(some) & set(originals().values())) < 5, "few swap a chunk with itself"


if __name__ == "__main__":
    check_all(
        originals().values(), mutated, load_picture, lambda picture: picture.mode == "RGB" and 0 not in picture.size
    )
