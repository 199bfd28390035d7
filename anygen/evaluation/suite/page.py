"""What the page of an evaluation shows: sections of figures, and cards of what was given, answered and right.

Cards are the first cases of each group, in order; nothing is chosen by hand. Pictures and sounds are in the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from anygen.data.source import flac_of, png_of
from anygen.documents import Media
from anygen.evaluation.report import Figure
from anygen.evaluation.spectrogram import draw_spectrogram
from anygen.evaluation.suite.cases import Answer, Case, Part
from tokenizers_mm.media import Audio, Region

if TYPE_CHECKING:
    from anygen.evaluation.suite.evaluate import Result

_SHOWN_PX = 128


@dataclass(frozen=True)
class Shown:
    """One medium: a text, or a data URI of a picture or a sound (with its spectrogram)."""

    kind: str
    content: str
    spectrogram: str = ""


@dataclass(frozen=True)
class Card:
    """One case."""

    given: tuple[Shown, ...]
    answer: tuple[Shown, ...]
    truth: tuple[Shown, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Card:
        """From JSON."""
        return cls(*(tuple(Shown(**shown) for shown in facts[key]) for key in ("given", "answer", "truth")))


@dataclass(frozen=True)
class Section:
    """One direction on the page."""

    name: str
    about: str
    rows: dict[str, list[Figure]]
    """By name of the figure."""
    cards: dict[str, list[Card]]


def sections_of(parts: Sequence[Part], results: Mapping[str, Result]) -> list[Section]:
    """Every part with its figures, those of one name together."""
    sections = []
    for part in parts:
        result, rows = results[part.name], dict[str, list[Figure]]()
        for row in result.rows:
            rows.setdefault(row.figure.name, []).append(row.figure)
        sections.append(Section(part.name, part.about, rows, result.cards))
    return sections


def card_of(part: Part, case: Case, answer: Answer) -> Card:
    """What was given, what came, and what would have been right."""
    given = tuple(show(segment.content) for segment in case.request.inputs)  # type: ignore[arg-type]
    canvas = next((s.content for s in case.request.inputs if s.modality == "image"), None)
    shown = [tuple(show(media[m], canvas) for m in part.outputs) for media in (answer, case.truth)]
    return Card(given if part.answer is None else (), shown[0], shown[1])


def show(media: Media, canvas: Any = None) -> Shown:
    """A medium for the page; a box is drawn into the picture that it is about."""
    if isinstance(media, Image.Image):
        return Shown("image", _uri("image/png", png_of(media)))
    if isinstance(media, Audio):
        buffer = io.BytesIO()
        draw_spectrogram(media, height_px=48, px_per_s=80).save(buffer, "PNG", optimize=True)
        return Shown("audio", _uri("audio/flac", flac_of(media)), _uri("image/png", buffer.getvalue()))
    if isinstance(media, Region):
        if isinstance(canvas, Image.Image) and len(media.values) == 4:
            return Shown("image", _uri("image/png", png_of(_boxed(canvas, media))))
        return Shown("text", ", ".join(f"{value:.2f}" for value in media.values))
    return Shown("text", str(media))


def _boxed(picture: Image.Image, region: Region) -> Image.Image:
    large = picture.resize((_SHOWN_PX, _SHOWN_PX), Image.Resampling.NEAREST)
    x0, y0, x1, y1 = (value * (_SHOWN_PX - 1) for value in region.values)
    ImageDraw.Draw(large).rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline="red", width=2)
    return large


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
