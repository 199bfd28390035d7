"""Pictures and sounds from untrusted files: limits on decoded size, typed errors, upright and exact pixels."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from tokenizers_mm.errors import InputError
from tokenizers_mm.media import Audio, load_picture, load_sound

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = load_picture(encoded(PICTURE, "PNG", exif=exif))
    transposes = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    expected = PICTURE if transposes[orientation] is None else PICTURE.transpose(transposes[orientation])
    assert np.array_equal(np.asarray(turned), np.asarray(expected))


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


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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
