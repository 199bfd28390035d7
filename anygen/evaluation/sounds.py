"""The figures of a sound tokenizer, on sounds that were never in training: can it be understood, how much does it cost.

Dimension key: K codebooks, T code frames, N samples.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from anygen.data.records import RecordStore
from anygen.errors import DataError, MissingDependency
from anygen.evaluation.fidelity import mean_of
from anygen.evaluation.report import Explained, Figure, figure_of
from anygen.training.metrics import Progress
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio
from tokenizers_mm.spectral import mel_distance
from tokenizers_mm.usage import usage_of

Doubles = npt.NDArray[np.float64]
_Place = tuple[RecordStore, int, int]
HELD_OUT, UNHEARD = ("validation", "test"), ("unheard",)
MAX_VOICES = 8
"""Unheard voices that are measured one by one; more are one group."""
MAX_SOUNDS = 200
"""Of one group, unless a limit says otherwise."""
_WIDE_HZ, _NARROW_HZ = 16_000, 8_000
_SPEED_SOUNDS = 10
_STOI_S = 0.0256
"""One frame of its spectrum."""
_WORST_PESQ = 1.0

EXPLAINED: Explained = {
    "codes used": ("%", "Share of the codebook that occurs."),
    "perplexity / codebook size": ("%", "1 where all codes are used alike. Few sounds cannot fill a large codebook."),
    "codes per second": ("codes/s", "Of all codebooks together: what a transformer reads and writes."),
    "bits per second": ("bits/s", "Codes per second times the bits of one."),
    "STOI": ("", "Short-time objective intelligibility, 0 to 1 (pystoi)."),
    "ESTOI": ("", "Extended STOI, stricter where loudness changes (pystoi)."),
    "PESQ": ("MOS", "ITU-T P.862, wide band at 16 kHz, narrow band where the tokenizer has less: noise 1.0, best 4.6."),
    "SI-SDR": (
        "dB",
        "Scale-invariant signal to distortion ratio, -60 to 60: low where phases are free, as in vocoders.",
    ),
    "mel distance": ("", "Mean absolute difference of log-mel spectrograms at six window sizes."),
    "real-time factor": ("", "Seconds of work for one second of sound, one sound at a time."),
}


@dataclass(frozen=True)
class Heard:
    """One held-out sound and what comes back from all its codes."""

    group: str
    text: str
    voice: str
    original: Audio
    decoded: Audio
    estoi: float


@dataclass(frozen=True)
class SoundEvaluation:
    """The figures, and what the page plays."""

    figures: tuple[Figure, ...]
    skipped: dict[str, str]
    """What was not measured -> why."""
    heard: tuple[Heard, ...]


@dataclass(frozen=True)
class _Sound:
    text: str
    voice: str
    audio: Audio
    codes: Codes


def evaluate_sounds(tokenizer: AudioTokenizer, data: Path, *, limit: int | None = None) -> SoundEvaluation:
    """Measure everything that can be measured.

    Args:
        tokenizer: on its device.
        data: shards as stage `data` writes them.
        limit: at most so many sounds of each group.

    Raises:
        MissingDependency: pystoi is not there; told before any work.
        DataError: no sound is held out.
    """
    measures = SoundMeasures(tokenizer.sample_rate_hz)
    groups = _groups(tokenizer, data, limit or MAX_SOUNDS)
    figures: list[Figure] = []
    heard: list[Heard] = []
    for group, sounds in groups.items():
        figures += _usage(tokenizer, group, sounds)
        for books in _book_counts(tokenizer.num_codebooks):
            name = group if books == tokenizer.num_codebooks else f"{group}, first {books} of {tokenizer.num_codebooks}"
            decoded = [
                tokenizer.decode(replace(sound.codes, codes_KT=sound.codes.codes_KT[:books])) for sound in sounds
            ]
            values = measures.of(group, [sound.audio for sound in sounds], decoded)
            figures += [
                figure_of(m, name, mean_of(v[~np.isnan(v)])) for m, v in values.items() if not np.isnan(v).all()
            ]
        heard += [
            Heard(group, sound.text, sound.voice, sound.audio, back, float(estoi))
            for sound, back, estoi in zip(sounds, decoded, values["ESTOI"], strict=True)
        ]
    figures += [*_rates(tokenizer), *_speed(tokenizer, next(iter(groups.values())))]
    order = list(EXPLAINED)
    figures.sort(key=lambda figure: order.index(figure.name))  # stable: groups keep their order
    return SoundEvaluation(tuple(figures), measures.skipped, tuple(heard))


def si_sdr(original_N: npt.NDArray[np.floating], decoded_N: npt.NDArray[np.floating]) -> float:
    """Scale-invariant signal to distortion ratio in dB (arXiv 1811.02508), within 60 of 0; NaN without a signal.

    >>> round(si_sdr(np.array([1.0, 0.0, -1.0]), np.array([2.0, 0.2, -2.0])), 1)
    23.0
    """
    original_N, decoded_N = original_N.astype(np.float64), decoded_N.astype(np.float64)
    energy = float(original_N @ original_N)
    target_N = (float(decoded_N @ original_N) / energy if energy else 0.0) * original_N
    distortion = float(np.square(decoded_N - target_N).sum())
    if not energy:
        return math.nan
    ratio = float(target_N @ target_N) / distortion if distortion else math.inf if target_N.any() else 0.0
    return 10 * math.log10(min(max(ratio, 1e-6), 1e6))


def _groups(tokenizer: AudioTokenizer, data: Path, limit: int) -> dict[str, list[_Sound]]:
    chosen = {"held out": _places(data, HELD_OUT)}
    unheard = _places(data, UNHEARD)
    voices = [store[index].utterances[turn].voice for store, index, turn in unheard]
    are_few = len(set(voices)) <= MAX_VOICES
    for place, voice in zip(unheard, voices, strict=True):
        chosen.setdefault(f"unheard: {voice}" if are_few else "unheard voices", []).append(place)
    found: dict[str, list[_Sound]] = {}
    for group, places in chosen.items():
        places = random.Random(0).sample(places, min(limit, len(places)))
        progress = Progress(f"encoding, {group}", len(places))
        sounds = []
        for store, index, turn in places:
            utterance = store[index].utterances[turn]
            audio = utterance.audio(tokenizer.sample_rate_hz)
            sounds.append(_Sound(utterance.text, utterance.voice, audio, tokenizer.encode(audio)))
            progress.advance()
        progress.close()
        if sounds:
            found[group] = sounds
    if not found:
        raise DataError(f"no sound is held out in {data}: validation, test and unheard shards hold none")
    return found


def _places(data: Path, splits: tuple[str, ...]) -> list[_Place]:
    """Every sound of some splits: store, record, utterance."""
    stores = [RecordStore(paths) for split in splits if (paths := sorted(data.glob(f"{split}-*.tar")))]
    return [(store, i, turn) for store in stores for i in range(len(store)) for turn in range(store.num_sounds(i))]


def _book_counts(num_codebooks: int) -> list[int]:
    """Powers of two, and all.

    >>> _book_counts(6)
    [1, 2, 4, 6]
    """
    return sorted({2**i for i in range(num_codebooks.bit_length())} | {num_codebooks})


def _usage(tokenizer: AudioTokenizer, group: str, sounds: list[_Sound]) -> Iterator[Figure]:
    codes_KT = np.concatenate([sound.codes.codes_KT for sound in sounds], axis=1)
    for book, codes_T in enumerate(codes_KT):
        used, perplexity = usage_of(torch.from_numpy(codes_T), tokenizer.codebook_size)
        where = f"{group}, codebook {book + 1}" if len(codes_KT) > 1 else group
        yield Figure("codes used", where, used, None, None, len(sounds))
        yield Figure("perplexity / codebook size", where, perplexity / tokenizer.codebook_size, None, None, len(sounds))


def _rates(tokenizer: AudioTokenizer) -> Iterator[Figure]:
    for books in _book_counts(tokenizer.num_codebooks):
        rate = books * tokenizer.rate_hz
        name = f"{books} of {tokenizer.num_codebooks} codebooks"
        yield Figure("codes per second", name, rate, None, None, 0)
        yield Figure("bits per second", name, rate * math.log2(tokenizer.codebook_size), None, None, 0)


def _speed(tokenizer: AudioTokenizer, sounds: list[_Sound]) -> Iterator[Figure]:
    chosen = sounds[:_SPEED_SOUNDS]
    seconds = sum(sound.audio.duration_s for sound in chosen)
    where = f"threads: {torch.get_num_threads()}" if tokenizer.device.type == "cpu" else tokenizer.device.type
    works: dict[str, Callable[[_Sound], object]] = {
        "encoding": lambda sound: tokenizer.encode(sound.audio),
        "decoding": lambda sound: tokenizer.decode(sound.codes),
    }
    for name, work in works.items():
        work(chosen[0])
        start = time.perf_counter()
        for sound in chosen:
            work(sound)
        factor = (time.perf_counter() - start) / seconds
        yield Figure("real-time factor", f"{name}, {where}", factor, None, None, len(chosen))


class SoundMeasures:
    """Original and decoded sound to numbers; NaN where a measure does not apply to a sound."""

    def __init__(self, rate_hz: int) -> None:
        try:
            import pystoi
        except ImportError as error:
            raise MissingDependency("evaluating sound needs pystoi: pip install 'anygen[eval]'") from error
        self._rate_hz, self._stoi = rate_hz, pystoi.stoi
        self._pesq: Any = None
        self.skipped: dict[str, str] = {}
        try:
            from pesq import pesq

            self._pesq = pesq
        except ImportError:
            self.skipped["PESQ"] = "the package pesq is not there: pip install 'anygen[pesq]' (it needs a C compiler)"

    def of(self, group: str, originals: list[Audio], decoded: list[Audio]) -> dict[str, Doubles]:
        """Name of a measure -> its value for each sound."""
        measures: dict[str, Callable[[Audio, Audio], float]] = {
            "STOI": partial(self._intelligibility, extended=False),
            "ESTOI": partial(self._intelligibility, extended=True),
            "SI-SDR": lambda a, b: si_sdr(a.samples_T, b.samples_T),
            "mel distance": self._mel,
        }
        if self._pesq is not None:
            measures["PESQ"] = self._quality
        table: dict[str, list[float]] = {name: [] for name in measures}
        progress = Progress(f"measuring, {group}", len(originals))
        for original, back in zip(originals, decoded, strict=True):
            length = min(len(original.samples_T), len(back.samples_T))
            a, b = (Audio(sound.samples_T[:length], self._rate_hz) for sound in (original, back))
            for name, measure in measures.items():
                table[name].append(measure(a, b))
            progress.advance()
        progress.close()
        missing = {name: int(np.isnan(values).sum()) for name, values in table.items()}
        self.skipped |= {
            f"{name} of {count} sounds ({group})": "too short or too quiet for it"
            for name, count in missing.items()
            if count
        }
        return {name: np.array(values) for name, values in table.items()}

    def _intelligibility(self, original: Audio, decoded: Audio, *, extended: bool) -> float:
        if not original.samples_T.any() or len(original.samples_T) < _STOI_S * self._rate_hz:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # it returns 1e-5 where too little is not silent
            try:
                return float(self._stoi(original.samples_T, decoded.samples_T, self._rate_hz, extended=extended))
            except RuntimeWarning:
                return math.nan

    def _quality(self, original: Audio, decoded: Audio) -> float:
        from pesq import PesqError

        rate_hz, mode = (_WIDE_HZ, "wb") if self._rate_hz >= _WIDE_HZ else (_NARROW_HZ, "nb")
        a, b = (sound.resampled(rate_hz).samples_T for sound in (original, decoded))
        if not a.any():
            return math.nan
        if not b.any():  # it would divide by the loudness
            return _WORST_PESQ
        try:
            return float(self._pesq(rate_hz, a, b, mode))
        except PesqError:
            return math.nan

    def _mel(self, original: Audio, decoded: Audio) -> float:
        a, b = (torch.from_numpy(sound.samples_T.copy())[None] for sound in (original, decoded))
        return float(mel_distance(b, a, rate_hz=self._rate_hz)) if a.shape[1] >= 64 else math.nan
