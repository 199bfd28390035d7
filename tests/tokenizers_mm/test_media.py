"""Pictures and sounds from untrusted files: limits on decoded size, typed errors, upright and exact pixels."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from tokenizers_mm.errors import InputError
from tokenizers_mm.media import Audio, load_picture, load_sound
from tokenizers_mm.picture_files import orientation_of

RANDOM = np.random.default_rng(0)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate_hz: int = 8000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


PIXELS = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def test_every_way_to_pass_a_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    for source in (PICTURE, path, str(path), path.read_bytes(), PIXELS):
        assert np.array_equal(np.asarray(load_picture(source)), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(PICTURE, kind, exif=exif, **options)
    turned = load_picture(data)
    transposes = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    expected = plain if transposes[orientation] is None else plain.transpose(transposes[orientation])
    assert np.array_equal(np.asarray(turned), np.asarray(expected))
    assert load_picture(turned).size == turned.size, "it is not turned a second time"
    assert np.array_equal(np.asarray(load_picture(Image.open(io.BytesIO(data)))), np.asarray(expected))


def test_transparency_is_over_white_and_odd_modes_become_rgb() -> None:
    clear = Image.new("RGBA", (3, 3), (255, 0, 0, 0))
    assert np.asarray(load_picture(encoded(clear, "PNG"))).min() == 255
    palette = PICTURE.convert("P")
    palette.info["transparency"] = 0
    for picture in (
        palette,
        PICTURE.convert("L"),
        PICTURE.convert("CMYK"),
        PICTURE.convert("1"),
        PICTURE.convert("LA"),
    ):
        kind = "JPEG" if picture.mode == "CMYK" else "PNG"
        assert load_picture(encoded(picture, kind)).mode == "RGB"
    deep = Image.fromarray((np.linspace(0, 65535, 12).reshape(3, 4)).astype(np.uint16))
    values = np.asarray(load_picture(encoded(deep, "PNG")))[..., 0]
    assert values.min() == 0 and values.max() == 255 and len(np.unique(values)) == 12, "16 bits are scaled, not clipped"
    shades = load_picture(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))
    assert np.asarray(shades)[0, :, 0].tolist() == [0, 128, 255], "floats in [0, 1] are scaled too"


@pytest.mark.parametrize(("mode", "clear"), [("L", 5), ("RGB", (5, 5, 5)), ("1", 0)])
def test_a_transparent_colour_is_white(mode: str, clear: Any) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (3, 3), clear).save(buffer, "PNG", transparency=clear)
    assert np.asarray(load_picture(buffer.getvalue())).min() == 255
    assert load_picture(Image.new("LA", (3, 3)).convert("La")).mode == "RGB"


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_picture(buffer.getvalue()))[0, 0].tolist() == [255, 0, 0]


def test_only_the_first_frame_is_looked_at() -> None:
    frames = [Image.fromarray(RANDOM.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(5)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        first = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.asarray(load_picture(data)), first)
        broken = data[: -len(data) // 3] + bytes(len(data) // 3 + 1)  # in the last frames
        assert np.array_equal(np.asarray(load_picture(broken if kind != "WEBP" else data)), first)


def test_cmyk_photographs_have_their_colours() -> None:
    colours = {
        (0, 255, 255, 0): (255, 0, 0),
        (255, 255, 0, 0): (0, 0, 255),
        (0, 0, 0, 0): (255,) * 3,
        (0, 0, 0, 255): (0,) * 3,
    }
    for ink, light in colours.items():
        data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
        assert b"Adobe" in data, "Adobe's marker: the inks are stored inverted"
        assert np.abs(np.asarray(load_picture(data), dtype=int) - light).max() <= 3


def test_adobes_marker_decides_how_inks_are_stored() -> None:
    inks = Image.fromarray(RANDOM.integers(0, 256, (2, 2, 4), dtype=np.uint8), "CMYK").resize((32, 32))
    plain = bytearray(encoded(inks, "JPEG"))
    plain[plain.index(b"Adobe") + 11] = 2  # now the same numbers are luma, two colours and key
    seen, expected = load_picture(bytes(plain)), Image.open(io.BytesIO(plain)).convert("RGB")
    assert np.array_equal(np.asarray(seen), np.asarray(expected))
    assert not np.array_equal(np.asarray(seen), np.asarray(load_picture(encoded(inks, "JPEG"))))


def test_a_comment_does_not_hide_what_is_transparent_in_a_gif() -> None:
    data = encoded(Image.new("P", (3, 3), 1), "GIF", transparency=1)
    place = data.index(b"!\xf9") + 8  # behind the graphic control
    for gif in (data, data[:place] + b"!\xfe\x03abc\0" + data[place:]):
        assert np.asarray(load_picture(gif)).min() == 255


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """PICTURE with chunks behind its header."""
    data = encoded(PICTURE, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def test_sixteen_bits_are_scaled_by_what_white_is() -> None:
    dark = Image.fromarray(np.array([[0, 128, 255]], np.uint16))
    assert np.asarray(load_picture(encoded(dark, "PNG"))).max() == 1, "255 of 65,535 is nearly black"
    rows = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0, 0xFF00)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(load_picture(data)).tolist() == [[[0, 128, 255], [18, 0, 255]]]


def test_strips_join_without_a_seam() -> None:
    tall = Image.fromarray(RANDOM.integers(0, 256, (3000, 500, 4), dtype=np.uint8))
    over_white = Image.new("RGBA", tall.size, "white")
    over_white.alpha_composite(tall)
    assert np.array_equal(np.asarray(load_picture(tall)), np.asarray(over_white.convert("RGB")))


def test_large_photographs_may_come_smaller_but_not_too_small() -> None:
    photo = Image.fromarray(RANDOM.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((1600, 1200))
    data = encoded(photo, "JPEG")
    sizes = {side: load_picture(data, max_side_px=side).size for side in (1, 150, 200, 201, 401, 801, 1600, 9999)}
    assert sizes == {
        1: (200, 150), 150: (200, 150), 200: (200, 150), 201: (400, 300), 401: (800, 600), 801: (1600, 1200),
        1600: (1600, 1200), 9999: (1600, 1200),
    }  # fmt: skip
    small, expected = load_picture(data, max_side_px=200), photo.resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, dtype=float) - np.asarray(expected)).mean() < 3
    for other in (photo, encoded(photo, "PNG"), np.asarray(photo)):
        assert load_picture(other, max_side_px=100).size == photo.size
    lazy = Image.open(io.BytesIO(data))
    assert load_picture(lazy, max_side_px=100).size == lazy.size == photo.size, "the user's picture stays as it is"


def exif_bomb() -> bytes:
    """A directory of 60,000 tags that all point to the same 20 MB."""
    tags = b"".join(struct.pack("<HHII", 0x9000 + i % 1000, 7, 20_000_000, 8) for i in range(60_000))
    return b"II*\0" + struct.pack("<IH", 8, 60_000) + tags + bytes(20_000_000)


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    data = encoded(PICTURE, "JPEG")
    between = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + between + data[2:]


def gif_with_comment(block: bytes, count: int) -> bytes:
    data = encoded(PICTURE.convert("P"), "GIF")
    place = 13 + (3 << (data[10] & 7) + 1)
    return data[:place] + b"!\xfe" + (bytes([len(block)]) + block) * count + b"\0" + data[place:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        lambda: png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**8)))),
        lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        lambda: png_with(chunk(b"eXIf", exif_bomb())),
        lambda: png_with(*[chunk(b"tEXt", b"a\0b")] * 10_000),
        lambda: jpeg_with(*[(0xE1, b"Exif\0\0" + exif_bomb()[:60_000])] * 400),
        lambda: jpeg_with(*[(0xE1, b"Exif\0\0" + b"x" * 50)] * 19_000),
        lambda: jpeg_with(*[(0xFE, bytes(60_000))] * 400),
        lambda: jpeg_with((0xE2, b"MPF\0" + bytes(100)), (0xED, b"Photoshop 3.0\0" + b"8BIM" * 9000)),
        lambda: gif_with_comment(bytes(255), 100_000),
    ],
)  # fmt: skip
def test_what_stands_beside_the_pixels_costs_nothing(make: Any) -> None:
    data = make()
    assert len(data) <= 25 * 2**20
    begin = time.process_time()
    assert load_picture(data).size == PICTURE.size
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: png_with(*[chunk(b"tEXt", b"")] * 20_001), "cut into more than 20,000 parts"),
        (lambda: jpeg_with(*[(0xFE, b"")] * 20_001), "cut into more than 20,000 parts"),
        (lambda: b"\xff\xd8" + b"\xff" * 10**7, "cut into more than 20,000 parts"),
        (lambda: gif_with_comment(b"x", 10**6), "cut into more than 200,000 parts"),
        (lambda: b"RIFF\0\0\0\0WEBP" + bytes(10**6), "cut into more than 20,000 parts"),
        (lambda: jpeg_with() + b"\xff\xda" * 24, "more than 24 scans"),
        (lambda: jpeg_with((0xC9, bytes(9))), "arithmetic-coded or lossless JPEG"),
        (lambda: b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 5, 5, 1, 8, 1) + bytes(99), "run-length coded BMP"),
        (lambda: encoded(Image.new("CMYK", (5000, 4100)), "JPEG"), "1 to 20,000,000 pixels"),
        (lambda: encoded(Image.new("RGB", (4000, 3200)), "WEBP"), "1 to 12,500,000 pixels"),
        (lambda: encoded(Image.new("1", (5001, 5001)), "PNG"), "1 to 25,000,000 pixels"),
    ],
)  # fmt: skip
def test_files_that_would_cost_too_much_are_refused(make: Any, match: str) -> None:
    data = make()
    begin = time.process_time()
    with pytest.raises(InputError, match=match):
        load_picture(data)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_from_whole_and_broken_exif(order: str) -> None:
    def exif(tag: int = 0x0112, kind: int = 3, value: int = 6, start: int = 8) -> bytes:
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
        return head + struct.pack(f"{order}HHHIHH", 1, tag, kind, 1, value, 0)

    assert orientation_of(exif()) == orientation_of(b"Exif\0\0" + exif()) == 6
    for broken in (
        exif(value=9),
        exif(value=0),
        exif(kind=4),
        exif(tag=0x0113),
        exif(start=2**31),
        exif()[:16],
        b"",
        b"XX",
    ):
        assert orientation_of(broken) == 1


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims many pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(min(width, 10**6) + 1) * 3)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"hello, I am text", "not a readable picture"),
        (encoded(PICTURE, "PNG")[:40], "not a readable picture"),
        (encoded(PICTURE, "JPEG")[:100], "not a readable picture"),
        (encoded(PICTURE, "PNG")[:-30], "not a readable picture"),
        (bomb(9000, 9000), "9000 x 9000 pixels"),
        (bomb(20_000, 10), "20000 x 10 pixels"),
        (bomb(60_000, 60_000), "pixels"),
        (b"%PDF-1.4 ...", "not a readable picture"),
    ],
)
def test_bad_pictures_are_typed_errors(data: bytes, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_picture(data)


def closed() -> Image.Image:
    picture = Image.open(io.BytesIO(encoded(PICTURE, "PNG")))
    picture.close()
    return picture


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("/nowhere/cat.png", "cannot read the picture '/nowhere/cat.png': No such file"),
        ("", "'': it is not a file"),
        (Path("/dev/zero"), "it is not a file"),
        ("https://example.com/cat.png", "addresses are never opened"),
        ("a\0b", "null"),
        (3, "cannot use int as a picture; pass a PIL image, a path"),
        (np.zeros((2, 2)), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((1, 20_000), np.uint8), "20000 x 1 pixels"),
        (Image.new("RGB", (0, 3)), "0 x 3 pixels"),
        (Image.new("1", (20_000, 20_000)), "at most 16384 per side"),
        (Image.open(io.BytesIO(encoded(PICTURE, "PNG")[:-30])), "not a readable picture"),
        (closed(), "not a readable picture"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN"),
    ],
)
def test_unusable_picture_sources(source: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_picture(source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat.png")
    with pytest.raises(InputError, match="it is not a file"):
        load_picture(tmp_path / "cat.png")


def test_a_text_file_named_png(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("just notes")
    with pytest.raises(InputError, match=r"notes\.png is not a readable picture"):
        load_picture(path)


def test_mutated_pictures_and_sounds_never_escape_as_other_errors() -> None:
    seeds = [encoded(PICTURE, k) for k in ("PNG", "JPEG", "WEBP")] + [
        wav(RANDOM.normal(0, 0.1, 400), kind=k, subtype=s)
        for k, s in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("WAV", "FLOAT"))
    ]
    random = np.random.default_rng(1)
    for number in range(1500):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(int(random.integers(1, 6))):
            data[int(random.integers(len(data)))] = int(random.integers(256))
        if number % 5 == 0:
            data = data[: int(random.integers(1, len(data)))]
        for load in (load_picture, load_sound):
            try:
                load(bytes(data))
            except InputError:
                pass


# -- sound


def test_every_way_to_pass_a_sound(tmp_path: Path) -> None:
    samples = (RANDOM.normal(0, 0.1, 1000)).astype(np.float32)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(samples, subtype="FLOAT"))
    for source in (path, str(path), path.read_bytes(), (samples, 8000), Audio(samples, 8000)):
        sound = load_sound(source)
        assert sound.rate_hz == 8000 and np.allclose(sound.samples_T, samples, atol=1e-6)


def test_channels_are_mixed_and_rates_changed() -> None:
    stereo = np.stack([np.ones(800), np.zeros(800)], axis=1).astype(np.float32) * 0.5
    assert np.allclose(load_sound((stereo, 8000)).samples_T, 0.25)
    tone = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 440).astype(np.float32)
    up = load_sound((tone, 8000), rate_hz=16_000)
    assert len(up.samples_T) == 16_000 and up.duration_s == 1.0
    spectrum = np.abs(np.fft.rfft(up.samples_T))
    assert int(spectrum.argmax()) == 440


def test_saved_sounds_come_back(tmp_path: Path) -> None:
    samples = (RANDOM.normal(0, 0.1, 1000)).astype(np.float32)
    for ending in ("wav", "flac"):
        path = Audio(samples, 16_000).save(tmp_path / f"a.{ending}")
        assert np.allclose(load_sound(path).samples_T, samples, atol=1e-4)
    with pytest.raises(InputError, match=r"\.wav"):
        Audio(samples, 16_000).save(tmp_path / "a.docx")


def claimed_frames(count: int) -> bytes:
    data = bytearray(wav(np.zeros(10)))
    place = data.find(b"data") + 4
    data[place : place + 4] = struct.pack("<I", count * 2)
    return bytes(data)


def adpcm() -> bytes:
    return wav(np.zeros(1000), subtype="IMA_ADPCM")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (b"", "empty"),
        (b"RIFF....WAVE", "expected a WAV"),
        (b"hello there", "expected a WAV"),
        (wav(np.zeros(0)), "no samples"),
        (wav(np.array([0.0, np.nan]), subtype="FLOAT"), "NaN"),
        (wav(np.array([0.0, np.inf]), subtype="FLOAT"), "NaN"),
        (adpcm(), "codec 17"),
        (wav(np.zeros((10, 9))), "9 channels"),
        (wav(np.zeros(10), rate_hz=100), "100 Hz"),
        (wav(np.zeros(61 * 8000, np.float32), kind="FLAC"), "longer than 60 s"),
        ((np.zeros(3, np.int16), 8000), "type int16"),
        ((np.zeros((2, 3, 4), np.float32), 8000), "shape"),
        ((np.zeros(5, np.float32), 2**31 - 1), "rate"),
        ((np.zeros(5, np.float32), "8000"), "rate"),
        ((np.zeros(0, np.float32), 8000), "no samples"),
        ("/nowhere/a.wav", "cannot read"),
        ([1, 2, 3], "cannot use list"),
        (([0.0, 0.1], 8000), "numpy array"),
        (Audio([0.0, 0.1], 8000), "samples in a list"),  # type: ignore[arg-type]
        ((np.full(10, 1e4), 8000), "samples up to 1e\\+04; expected floats"),
        ((np.zeros((2, 100)), 8000), "transpose it"),
        (np.zeros(10), r"pass a path, bytes or \(array, rate\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "sound",  # a float WAV holds the time of its writing
)
def test_bad_sounds_are_typed_errors(source: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_sound(source)


def test_a_header_that_claims_a_billion_frames_reads_what_is_there() -> None:
    try:
        sound = load_sound(claimed_frames(10**9))
    except InputError:
        return
    assert len(sound.samples_T) <= 10 + 1


def test_files_beyond_the_limit_are_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "cat.png").open("wb") as file:
        file.truncate(2**40)  # sparse: reading all of it would end the test
    with pytest.raises(InputError, match=r"cat\.png is too large: a picture may have 26,214,400 bytes"):
        load_picture(tmp_path / "cat.png")
