"""Media values and their bounded loaders: pictures (Pillow) and sounds (soundfile, soxr).

Files are untrusted. A 9 KB PNG can hold 243 MB of pixels and a 0.7 MB FLAC 1.4 GB of samples, so every limit is on
the *decoded* size and is checked before decoding. URLs are never opened.

Dimension key: H rows, W columns, C colours, T samples.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tokenizers_mm.errors import InputError
from tokenizers_mm.picture_files import ORIENTATION, first_frame
from tokenizers_mm.rgb import to_rgb, upright

_OPENING = threading.Lock()  # warning filters belong to the process: threads that change them at once lose them

FloatArray = npt.NDArray[np.float32]
PictureSource = Image.Image | str | Path | bytes | npt.NDArray[Any]

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PICTURE_BYTES = 25 * 2**20
MAX_PICTURE_PIXELS = 25_000_000
"""Photographs of 24 million pixels are read; decoding needs up to 10 bytes a pixel (progressive JPEG)."""
MAX_CMYK_PIXELS = 20_000_000
"""Up to 12 bytes a pixel, in progressive JPEGs."""
MAX_WEBP_PIXELS = 12_500_000
"""Pillow's WEBP decoder holds two canvases, a copy and the picture: 16 to 20 bytes a pixel."""
MAX_PICTURE_SIDE_PX = 16_384

MAX_SOUND_BYTES = 50 * 2**20
MAX_SOUND_DURATION_S = 60.0
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 192_000
MAX_CHANNELS = 8
MAX_AMPLITUDE = 8.0
"""Beyond full scale is allowed, sound may be hot; beyond this it is not in [-1, 1] at all."""

# soundfile 0.14 bundles libsndfile 1.2.2, whose ADPCM and MAT4 readers have open CVEs: only these WAV codecs reach it.
_SOUND_BLOCK = 2**16  # frames read at once: eight channels of a minute would be 370 MB
_WAV_PCM, _WAV_FLOAT, _WAV_EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True, eq=False)
class Audio:
    """One mono sound: float32 samples in [-1, 1] and their rate."""

    samples_T: FloatArray
    rate_hz: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples_T) / self.rate_hz

    def save(self, path: str | Path) -> Path:
        """Write as WAV, FLAC or OGG by the file's ending, 16 bit; samples beyond [-1, 1] are clipped."""
        import soundfile  # loads libsndfile: not needed to handle text and pictures

        path = Path(path)
        clipped_T = np.clip(self.samples_T, -1.0, 1.0)
        try:
            soundfile.write(path, clipped_T, self.rate_hz)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise InputError(f"cannot write the sound to {path}: {error}; use a name ending in .wav") from error
        return path

    def resampled(self, rate_hz: int) -> Audio:
        """The same sound at another rate (soxr, high quality)."""
        if rate_hz == self.rate_hz:
            return self
        import soxr

        return Audio(soxr.resample(self.samples_T, self.rate_hz, rate_hz).astype(np.float32), rate_hz)


SoundSource = Audio | str | Path | bytes | tuple[npt.NDArray[Any], int]


@dataclass(frozen=True)
class Region:
    """A box (x0, y0, x1, y1) or a point (x, y) on a picture, as fractions of its width and height."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.values, tuple)
            or len(self.values) not in (2, 4)
            or not all(
                isinstance(value, int | float | np.integer | np.floating) and 0.0 <= value <= 1.0
                for value in self.values
            )
        ):
            raise InputError(f"a region is 2 or 4 fractions in [0, 1]: (x, y) or (x0, y0, x1, y1); got {self.values}")


def load_picture(source: PictureSource, *, max_side_px: int | None = None) -> Image.Image:
    """Any picture a user may pass, as an RGB PIL image, upright, transparency over white, first frame.

    Encoded pictures (PNG, JPEG, WEBP, GIF, BMP) cost at most about 300 MB and 2 s of one core, whatever the file says:
    `tests/tokenizers_mm/test_mutated_pictures.py` measures it. Colour profiles are ignored: numbers are taken as sRGB.

    Args:
        source: PIL image, path, encoded bytes, or uint8 array H x W, H x W x 3 or H x W x 4.
        max_side_px: a JPEG may come smaller, for speed, with its longer side still at least this; the exact size is
            left to the caller. None keeps every pixel.

    Raises:
        InputError: missing or unreadable file, not a picture, or beyond the limits of this module.
    """
    name = str(source) if isinstance(source, str | Path) else "the picture"
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limits follow; Pillow's bomb warning would only repeat them
            picture, orientation = _open_picture(source, name)
        _check_size(picture, name)
        if max_side_px is not None and picture is not source:  # a user's own picture stays as it is
            _draft(picture, max_side_px)
        rgb = to_rgb(picture)
        del picture  # turning makes a second copy: not a third beside it
        return upright(rgb, orientation)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable picture ({', '.join(PICTURE_FORMATS)})") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, OverflowError, MemoryError) as error:
        raise InputError(
            f"{name} is not a readable picture ({', '.join(PICTURE_FORMATS)}): {_first_line(error)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} claims too many pixels: {_first_line(error)}") from error


def load_sound(source: SoundSource, *, rate_hz: int | None = None) -> Audio:
    """Any sound a user may pass, mixed to mono, resampled to `rate_hz` where given.

    Args:
        source: `Audio`, path or bytes (WAV, FLAC, OGG), or `(array of T or T x channels, rate)`.
        rate_hz: rate of the result; None keeps the sound's own.

    Raises:
        InputError: missing or unreadable file, no samples, NaN, or beyond the limits of this module.
    """
    if isinstance(source, Audio):
        sound = _checked(source.samples_T, source.rate_hz, "the sound")
    elif isinstance(source, tuple):
        if len(source) != 2 or not isinstance(source[0], np.ndarray):
            raise InputError("a sound in memory is a pair (numpy array of samples, rate in Hz)")
        sound = _checked(source[0], source[1], "the sound")
    else:
        data = _read_bytes(source, "sound", MAX_SOUND_BYTES, "a path, bytes or (array, rate)")
        sound = _decode_sound(data, str(source) if isinstance(source, str | Path) else "the sound")
    return sound if rate_hz is None else sound.resampled(rate_hz)


def _open_picture(source: PictureSource, name: str) -> tuple[Image.Image, int]:
    """The picture, not yet decoded, and its EXIF orientation."""
    if isinstance(source, Image.Image):
        return source, source.getexif().get(ORIENTATION, 1)
    if not isinstance(source, np.ndarray):
        data = _read_bytes(source, "picture", MAX_PICTURE_BYTES, "a PIL image, a path, bytes or a uint8 array")
        file = first_frame(data, name)
        return Image.open(io.BytesIO(file.data), formats=PICTURE_FORMATS), file.orientation
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
        raise InputError(f"a picture array is uint8, H x W, H x W x 3 or H x W x 4; got {source.dtype} {source.shape}")
    if 0 in source.shape:
        raise InputError(f"a picture has at least one pixel; got an array of shape {source.shape}")
    return Image.fromarray(source), 1


def _check_size(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    limit = MAX_CMYK_PIXELS if picture.mode == "CMYK" else MAX_PICTURE_PIXELS
    if picture.format == "WEBP":
        limit = MAX_WEBP_PIXELS
    if not 0 < width * height <= limit or max(width, height) > MAX_PICTURE_SIDE_PX:
        raise InputError(
            f"{name} has {width} x {height} pixels; 1 to {limit:,} pixels and at most "
            f"{MAX_PICTURE_SIDE_PX} per side are read: make it smaller first"
        )


def _draft(picture: Image.Image, side_px: int) -> None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size where the longer side stays at least `side_px`."""
    scale = side_px / max(picture.size)
    if scale < 1:
        picture.draft(None, (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))


def _read_bytes(source: Any, kind: str, limit: int, expected: str) -> bytes:
    if isinstance(source, bytes):
        data, name = source, f"the {kind}"
    elif isinstance(source, str | Path):
        data, name = _read_file(source, kind, limit), str(source)
    else:
        raise InputError(f"cannot use {type(source).__name__} as a {kind}; pass {expected}")
    if len(data) > limit:
        raise InputError(f"{name} is too large: a {kind} may have {limit:,} bytes")
    if not data:
        raise InputError(f"{name} is empty (0 bytes); expected a {kind}")
    return data


def _read_file(source: str | Path, kind: str, limit: int) -> bytes:
    path = Path(source)
    if "://" in str(source):
        raise InputError(f"cannot read the {kind} {str(source)!r}: addresses are never opened, download it first")
    try:
        if path.exists() and not path.is_file():  # a device never ends, a pipe may never begin
            raise InputError(f"cannot read the {kind} {str(source)!r}: it is not a file")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        raise InputError(f"cannot read the {kind} {str(source)!r}: {reason}") from error


def _decode_sound(data: bytes, name: str) -> Audio:
    import soundfile

    _check_container(data, name)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ or not 1 <= file.channels <= MAX_CHANNELS:
                raise InputError(
                    f"{name} says {file.samplerate} Hz and {file.channels} channels; "
                    f"{MIN_RATE_HZ} to {MAX_RATE_HZ} Hz and at most {MAX_CHANNELS} channels are read"
                )
            return _checked(_mono(file), file.samplerate, name)
    except (soundfile.LibsndfileError, ValueError, OSError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "error_string", None) or _first_line(error)  # libsndfile's line names our buffer
        raise InputError(f"{name} is not a readable sound (WAV, FLAC, OGG): {reason}") from error


def _mono(file: Any) -> FloatArray:
    """Its samples, up to just beyond the limit, which shows excess; the header's count can be a lie of 10^12."""
    left, parts = int(MAX_SOUND_DURATION_S * file.samplerate) + 1, [np.zeros(0, np.float32)]
    while left > 0 and len(part_TC := file.read(min(left, _SOUND_BLOCK), dtype="float32", always_2d=True)):
        parts.append(part_TC.mean(axis=1))
        left -= len(part_TC)
    return np.concatenate(parts)


def _check_container(data: bytes, name: str) -> None:
    if data[:4] in (b"fLaC", b"OggS"):
        return
    position = data.find(b"fmt ", 12, 4096) if data[:4] == b"RIFF" and data[8:12] == b"WAVE" else -1
    if position < 0 or len(data) < position + 10:
        raise InputError(f"{name} is not a readable sound: expected a WAV, FLAC or OGG file")
    (codec,) = struct.unpack_from("<H", data, position + 8)
    if codec not in (_WAV_PCM, _WAV_FLOAT, _WAV_EXTENSIBLE):
        raise InputError(f"{name} is a WAV file with codec {codec}; only PCM and float are read: convert it first")


def _checked(samples: npt.NDArray[Any], rate_hz: Any, name: str) -> Audio:
    if not isinstance(rate_hz, int | np.integer) or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise InputError(f"{name} has rate {rate_hz!r}; expected an integer from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    if not isinstance(samples, np.ndarray):
        raise InputError(f"{name} has samples in a {type(samples).__name__}; expected a numpy array")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS):
        raise InputError(
            f"{name} has shape {samples.shape}; expected T or T x channels (at most {MAX_CHANNELS}): transpose it?"
        )
    if not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"{name} has samples of type {samples.dtype}; expected floats in [-1, 1]")
    if len(samples) == 0:
        raise InputError(f"{name} has no samples")
    if len(samples) > MAX_SOUND_DURATION_S * rate_hz:
        raise InputError(f"{name} is longer than {MAX_SOUND_DURATION_S:.0f} s: cut it first")
    mono_T = samples.mean(axis=1) if samples.ndim == 2 else samples
    mono_T = np.ascontiguousarray(mono_T, dtype=np.float32)
    if not np.isfinite(mono_T).all():
        raise InputError(f"{name} holds NaN or infinite samples")
    if np.abs(mono_T).max() > MAX_AMPLITUDE:
        raise InputError(
            f"{name} has samples up to {np.abs(mono_T).max():.4g}; expected floats in [-1, 1]: "
            "divide 16-bit values by 32768"
        )
    return Audio(mono_T, int(rate_hz))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
