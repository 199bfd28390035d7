"""`anygen evaluate TOKENIZER` for sound: measures it, and writes a report and a page with players.

The page is one file without scripts; its sounds and spectrograms are in it. What it shows is chosen by rule.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anygen._version import __version__
from anygen.data.source import flac_of
from anygen.evaluation.report import check_out, data_of, rows_of, write_report
from anygen.evaluation.sounds import EXPLAINED, Heard, SoundEvaluation, evaluate_sounds
from anygen.evaluation.spectrogram import draw_spectrogram
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

NUM_SHOWN, NUM_WORST = 8, 8


@dataclass(frozen=True)
class Player:
    """A sound as data URIs."""

    sound: str
    spectrogram: str


@dataclass(frozen=True)
class Shown:
    """An original above what its codes give."""

    original: Player
    decoded: Player
    label: str


def evaluate_folder(folder: Path, *, data: Path | None = None, out: Path, limit: int | None = None) -> dict[str, Any]:
    """Evaluate the sound tokenizer in a folder; writes `report.json` and `index.html` and returns the report.

    Args:
        folder: of the tokenizer, `RUN/audio_tokenizer/tokenizer` or any EnCodec checkpoint.
        data: folder of record shards; `RUN/data` by default.
        out: where to write; an older evaluation there is replaced.
        limit: at most so many sounds of each group.

    Raises:
        InputError: no data, or `out` holds something that is not an evaluation.
        AnyGenError: tokenizer or data are broken, or a package is missing.
    """
    out = check_out(out)
    data = data_of(folder, data)
    tokenizer = AudioTokenizer.load(folder)
    tokenizer.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    evaluation = evaluate_sounds(tokenizer, data, limit=limit)
    counts = Counter(heard.group for heard in evaluation.heard)
    report = {
        "tokenizer": str(folder),
        "data": str(data),
        "anygen": __version__,
        "sample_rate_hz": tokenizer.sample_rate_hz,
        "frames_per_second": tokenizer.rate_hz,
        "codebook_size": tokenizer.codebook_size,
        "num_codebooks": tokenizer.num_codebooks,
        "sounds": dict(counts),
        "figures": rows_of(evaluation.figures),
        "skipped": evaluation.skipped,
        "warnings": [],
    }
    galleries = _galleries(evaluation)
    write_report(
        out, report, evaluation.figures, template="sounds.html.jinja", explained=EXPLAINED, galleries=galleries
    )
    return report


def _galleries(evaluation: SoundEvaluation) -> dict[str, list[Shown]]:
    """Heading -> sounds: the first of each group, and the least intelligible."""
    chosen: dict[str, list[Heard]] = {}
    for group in dict.fromkeys(heard.group for heard in evaluation.heard):
        sounds = [heard for heard in evaluation.heard if heard.group == group]
        chosen[f"The first {min(NUM_SHOWN, len(sounds))} sounds, {group}"] = sounds[:NUM_SHOWN]
    rated = sorted((heard for heard in evaluation.heard if heard.estoi == heard.estoi), key=lambda heard: heard.estoi)
    chosen[f"The {min(NUM_WORST, len(rated))} sounds with the lowest ESTOI"] = rated[:NUM_WORST]
    return {heading: [_shown(heard) for heard in sounds] for heading, sounds in chosen.items() if sounds}


def _shown(heard: Heard) -> Shown:
    label = f"{heard.text} ({heard.voice}), ESTOI {heard.estoi:.2f}"
    return Shown(_player(heard.original), _player(heard.decoded), label)


def _player(audio: Audio) -> Player:
    buffer = io.BytesIO()
    draw_spectrogram(audio).save(buffer, "PNG", optimize=True)
    return Player(_uri("audio/flac", flac_of(audio)), _uri("image/png", buffer.getvalue()))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
