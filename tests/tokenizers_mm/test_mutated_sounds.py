"""3,000 mutated sound files: no crash, a typed error or a mono sound, at most 300 MB extra and 2 s each.

They run in one process of their own, so that a crash of a decoder is seen too, and says which file it was:
`mutated(seed)` gives its bytes again.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mutations import (
    ROOT,
    Chooser,
    assert_bounded,
    check_all,
    flipped,
    flipped_in_the_header,
    inserted,
    peak_mb,
    shuffled,
    truncated,
)

from tokenizers_mm.errors import InputError
from tokenizers_mm.media import MAX_CHANNELS, MAX_SOUND_DURATION_S, Audio, load_sound

LARGE = (0, 1, 2, 9, 256, 3999, 4000, 192_000, 192_001, 65_535, 10**6, 2**31 - 1, 2**32 - 1)


@cache
def originals() -> dict[str, bytes]:
    """Valid files of every kind that is read."""
    import soundfile

    chooser = np.random.default_rng(0)
    time = np.arange(2000) / 8000
    tone_T = 0.3 * np.sin(2 * np.pi * 300 * time) + 0.01 * chooser.normal(size=2000)
    three_TC = np.stack([tone_T, -0.5 * tone_T, chooser.normal(size=2000) * 0.1], axis=1)
    kinds = {
        "wav-8": (tone_T, "WAV", "PCM_U8"),
        "wav-16": (tone_T, "WAV", "PCM_16"),
        "wav-24": (three_TC, "WAVEX", "PCM_24"),
        "wav-32": (three_TC, "WAV", "PCM_32"),
        "wav-float": (tone_T, "WAV", "FLOAT"),
        "wav-double": (three_TC, "WAVEX", "DOUBLE"),
        "flac-16": (three_TC, "FLAC", "PCM_16"),
        "flac-24": (tone_T, "FLAC", "PCM_24"),
        "ogg-vorbis": (three_TC[:, :2], "OGG", "VORBIS"),
        "ogg-opus": (tone_T, "OGG", "OPUS"),
    }
    files = {}
    for name, (samples, kind, subtype) in kinds.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 8000, format=kind, subtype=subtype)
        files[name] = buffer.getvalue()
    return files


def mutated(seed: int) -> bytes:
    """One mutated file; the seed says which original, which mutation and where."""
    names = sorted(originals())
    name, mutate = names[seed % len(names)], MUTATIONS[seed // len(names) % len(MUTATIONS)]
    return mutate(originals()[name], np.random.default_rng(seed))


def lied(data: bytes, chooser: Chooser) -> bytes:
    """Channels, rate or lengths of the header overwritten by large numbers."""
    out = bytearray(data)
    if data[:4] == b"RIFF":
        form, content = data.index(b"fmt "), data.index(b"data")
        fields = [(form + 4, "<I"), (form + 10, "<H"), (form + 12, "<I"), (form + 20, "<H"), (content + 4, "<I")]
    elif data[:4] == b"fLaC":  # 20 bits of rate, 3 of channels, 5 of bits a sample, 36 of length
        fields = [(8, ">H"), (10, ">H"), (18, ">I"), (22, ">I")]
    else:
        header = data.index(b"OpusHead" if b"OpusHead" in data else b"\x01vorbis")
        fields = [(header + 9, "<B"), (header + 12, "<I"), (6, "<I"), (26, "<B")]
    for place, form_of in chooser.choice(np.array(fields, dtype=object), int(chooser.integers(1, 3))):
        most = 2 ** (8 * struct.calcsize(form_of)) - 1
        struct.pack_into(form_of, out, place, min(int(chooser.choice(LARGE)), most))
    return bytes(out)


def rearranged(data: bytes, chooser: Chooser) -> bytes:
    """Pieces of 40 bytes: two swapped, or one repeated up to 200 times, or one left out."""
    return b"".join(shuffled([data[i : i + 40] for i in range(0, len(data), 40)], chooser))


MUTATIONS: tuple[Callable[[bytes, Chooser], bytes], ...] = (
    flipped, flipped_in_the_header, truncated, inserted, rearranged, lied,
)  # fmt: skip


def is_good(audio: Audio) -> bool:
    """Mono, finite, in the limits."""
    samples_T = audio.samples_T
    good = samples_T.ndim == 1 and samples_T.dtype == np.float32 and bool(np.isfinite(samples_T).all())
    return good and 0 < len(samples_T) <= MAX_SOUND_DURATION_S * audio.rate_hz


def load(data: bytes) -> Audio:
    """As a tokenizer does, and then some: resampling reads every sample."""
    audio = load_sound(data)
    audio.resampled(16_000)
    return audio


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_mutated_sounds_cost_little_and_fail_by_typed_errors() -> None:
    assert_bounded(__file__)


def test_the_originals_are_sounds_and_mutations_come_again() -> None:
    for name, data in originals().items():
        assert is_good(load(data)), name
    some = [mutated(seed) for seed in range(200)]
    assert some == [mutated(seed) for seed in range(200)]
    assert len(set(some)) > 190 and len(set(some) & set(originals().values())) < 5


def wav(samples: np.ndarray, rate_hz: int = 8000, **options: str) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=options.pop("format", "WAV"), **options)
    return buffer.getvalue()


def test_hostile_sounds_are_refused_before_they_are_decoded() -> None:
    silence = np.zeros(8000)
    claims = bytearray(wav(silence[:10]))
    struct.pack_into("<I", claims, 40, 2**31 - 2)
    assert len(load_sound(bytes(claims)).samples_T) == 10, "what the header claims is not believed"
    hour = wav(np.zeros(3600 * 8000, np.int16), format="FLAC", subtype="PCM_16")
    assert len(hour) < 10**6
    for data, match in (
        (wav(silence[:0]), "no samples"),
        (hour, "longer than 60 s"),
        (wav(np.array([0.1, np.nan]), subtype="FLOAT"), "NaN"),
        (wav(np.zeros((8, MAX_CHANNELS + 1))), "at most 8 channels"),
        (wav(np.zeros((8, 256))), "at most 8 channels"),
        (wav(silence, subtype="MS_ADPCM"), "only PCM and float"),
        (wav(silence, format="MAT4", subtype="PCM_16"), "expected a WAV, FLAC or OGG"),
        (wav(silence, rate_hz=1000), "4000 to 192000 Hz"),
    ):
        with pytest.raises(InputError, match=match):
            load_sound(data)
    assert len(load_sound(wav(silence[:1])).samples_T) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_minute_of_eight_channels_is_never_held_at_once(tmp_path: Path) -> None:
    """In a process of its own: a peak that was reached before would hide it."""
    path = tmp_path / "loud.flac"
    path.write_bytes(wav(np.zeros((59 * 96_000, 8), np.int16), 96_000, format="FLAC", subtype="PCM_16"))
    program = [sys.executable, __file__, str(path)]
    result = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 100, "the channels alone are 181 MB"


def peak_of(path: Path) -> None:
    """Memory that loading a file takes beyond the file itself."""
    data = path.read_bytes()
    load_sound(next(iter(originals().values())))
    before_mb = peak_mb()
    load_sound(data)
    print(peak_mb() - before_mb)


if __name__ == "__main__" and len(sys.argv) > 1:
    peak_of(Path(sys.argv[1]))
elif __name__ == "__main__":
    check_all(originals().values(), mutated, load, is_good)
