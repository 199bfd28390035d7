"""What of an encoded picture reaches the decoder: the parts that hold the first frame's pixels, and nothing else.

Text, profiles, thumbnails, EXIF and later frames are where hostile files spend memory and time: a GIF comment of
25 MB takes Pillow minutes, an EXIF directory may point to the same megabytes 65,535 times. They are left out before
anything is decoded; of EXIF only the orientation is read. Nothing is decompressed here and pixels are not touched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers_mm.errors import InputError

MAX_PARTS = 20_000
"""Chunks of a PNG or WEBP, segments of a JPEG: 25 MB in chunks of 4 KB are 6,400."""
MAX_GIF_BLOCKS = 200_000
"""Data blocks of up to 255 bytes: 25 MB are 103,000."""
MAX_JPEG_SCANS = 24
"""Progressive files have about ten. Each costs a pass over all pixels, however few bytes it has."""
MAX_EXIF_TAGS = 1_000

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_SOF_READ, _SOF_UNREAD = (0xC0, 0xC1, 0xC2), (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SOS, _EOI, _JFIF, _EXIF, _ADOBE, _COMMENT = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
ORIENTATION, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class PictureFile:
    """A file reduced to its first frame."""

    data: bytes
    orientation: int = 1
    """EXIF's: 1 upright, 2 to 8 mirrored or turned."""


def first_frame(data: bytes, name: str) -> PictureFile:
    """The file without what does not belong to its first frame; other formats come back as they are.

    Args:
        data: the whole file.
        name: what a message calls it.

    Raises:
        InputError: more parts than an honest file has, or a variant that no limit of time holds for.
    """
    if data.startswith(_PNG):
        return _png(data, name)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data, name)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return PictureFile(_gif(data, name))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return PictureFile(data, _webp_orientation(data, name))
    if data.startswith(b"BM") and len(data) >= 34 and _integer(data, 14) >= 40 and _integer(data, 30) in (1, 2):
        raise InputError(f"{name} is a run-length coded BMP, which is not read: save it as PNG")  # decoded in Python
    return PictureFile(data)


def orientation_of(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8, of a TIFF block; 1 where there is none or the block is broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * min(count, MAX_EXIF_TAGS), 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, place)
            if tag == ORIENTATION:
                return int(value) if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:  # it points beyond its end
        pass
    return 1


def _png(data: bytes, name: str) -> PictureFile:
    view, kept, exif, place = memoryview(data), [memoryview(data)[:8]], b"", 8
    for _ in _counted(MAX_PARTS, name):
        if place + 12 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if kind in _PNG_PARTS:
            kept.append(view[place:end])
        elif kind == b"eXIf" and not exif:
            exif = data[place + 8 : end - 4]
        place = end
        if kind == b"IEND":
            break
    return PictureFile(b"".join(kept), orientation_of(exif))


def _jpeg(data: bytes, name: str) -> PictureFile:
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise InputError(f"{name} has more than {MAX_JPEG_SCANS} scans, which no camera writes: save it anew")
    view, kept, exif, place = memoryview(data), [memoryview(data)[:2]], b"", 2
    for _ in _counted(MAX_PARTS, name):
        place = data.find(b"\xff", place)
        if place < 0 or place + 4 > len(data):
            break
        marker, end = data[place + 1], place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if marker == _SOS:  # from here on libjpeg reads alone
            kept.append(view[place:])
            break
        if marker in _SOF_UNREAD:
            raise InputError(f"{name} is an arithmetic-coded or lossless JPEG, which is not read: save it as PNG")
        if marker == 0xFF:  # filling
            place += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= _EOI:  # without a length
            place += 2
        else:
            if not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or marker in (_JFIF, _ADOBE):
                kept.append(view[place:end])
            elif marker == _EXIF and not exif and data[place + 4 : place + 10] == b"Exif\0\0":
                exif = data[place + 4 : end]
            place = end
    return PictureFile(b"".join(kept), orientation_of(exif))


def _gif(data: bytes, name: str) -> bytes:
    """Screen, colours, the last graphic control before the first frame, that frame."""
    if len(data) < 13:
        return data
    place = head = 13 + _colours(data[10])
    control, blocks = b"", _counted(MAX_GIF_BLOCKS, name)
    for _ in blocks:
        kind = data[place : place + 1]
        if kind == b"!":
            end = _blocks_end(data, place + 2, blocks)
            if data[place + 1 : place + 2] == b"\xf9":
                control = data[place:end]
            place = end
        elif kind == b"," and place + 10 <= len(data):
            end = _blocks_end(data, place + 11 + _colours(data[place + 9]), blocks)
            return b"".join((data[:head], control, memoryview(data)[place:end], b";"))
        elif not kind or kind == b";":
            break
        else:  # as Pillow does: what stands between blocks is skipped
            place += 1
    return data[:head] + b";"


def _colours(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _blocks_end(data: bytes, place: int, blocks: Iterator[int]) -> int:
    """Where a GIF's chain of data blocks ends, its empty block included."""
    for _ in blocks:
        if place >= len(data):
            break
        size = data[place]
        place += 1 + size
        if size == 0:
            break
    return min(place, len(data))


def _webp_orientation(data: bytes, name: str) -> int:
    place = 12
    for _ in _counted(MAX_PARTS, name):
        if place + 8 > len(data):
            break
        length = _integer(data, place + 4)
        if data[place : place + 4] == b"EXIF":
            return orientation_of(data[place + 8 : place + 8 + length])
        place += 8 + length + length % 2
    return 1


def _counted(limit: int, name: str) -> Iterator[int]:
    yield from range(limit)
    raise InputError(f"{name} is cut into more than {limit:,} parts, which no camera or program writes: save it anew")


def _integer(data: bytes, place: int) -> int:
    return int(struct.unpack_from("<I", data, place)[0])
