"""What generation gives back: media in order, with the seed and everything else that made them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from anygen.documents import Segment
from anygen.errors import InputError
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio, Region

_NUMBERED = re.compile(r"(\d{2,})[-.]")


@dataclass(frozen=True)
class Sample:
    """One answer."""

    segments: tuple[Segment, ...]
    """Media, in the order in which they were generated."""
    seed: int | None
    """The seed of this very sample, of a chain of calls (`anygen.chains`) the first one; None where the caller passed a
    generator."""
    finish_reason: Literal["eos", "length", "stopped"]
    """`length` where `max_new_tokens` cut a text short, made a picture or sound smaller, or left no room for more;
    `stopped` where a callback ended it: whole segments, and the text so far."""
    ids: tuple[int, ...] = field(repr=False)
    """The generated ids, those of `via` first; of a text that was answered alone, an answer of its own with its end."""
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Bundle, prompt, options and versions; JSON-able."""
    via: tuple[Segment, ...] = ()
    """What was written before the answer and is no part of it: what the model heard or saw (`Request.via`)."""

    def of(self, modality: str) -> list[Any]:
        """The media of one modality, in order."""
        return [segment.content for segment in self.segments if segment.modality == modality]


@dataclass(frozen=True)
class Output:
    """The answers of one call."""

    samples: tuple[Sample, ...]

    @property
    def texts(self) -> list[str]:
        """Every text, sample by sample."""
        return self._all("text")

    @property
    def images(self) -> list[Image.Image]:
        """Every picture, sample by sample."""
        return self._all("image")

    @property
    def audios(self) -> list[Audio]:
        """Every sound, sample by sample."""
        return self._all("audio")

    @property
    def regions(self) -> list[Region]:
        """Every box or point, sample by sample."""
        return self._all("region")

    @property
    def text(self) -> str:
        """The first text; InputError where there is none."""
        return str(self._first("text"))

    @property
    def image(self) -> Image.Image:
        """The first picture; InputError where there is none."""
        picture: Image.Image = self._first("image")
        return picture

    @property
    def audio(self) -> Audio:
        """The first sound; InputError where there is none."""
        sound: Audio = self._first("audio")
        return sound

    def _all(self, modality: str) -> list[Any]:
        return [content for sample in self.samples for content in sample.of(modality)]

    def _first(self, modality: str) -> Any:
        found = self._all(modality)
        if not found:
            raise InputError(f"this answer holds no {modality}; ask for it with output={modality!r}")
        return found[0]

    def save(self, folder: str | Path) -> list[Path]:
        """Write every medium and, beside each sample, a JSON with its provenance; returns the media files.

        Samples are numbered on from those that are there: nothing is written over.

        Raises:
            InputError: `folder` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; generated media go to a folder")
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(found[1]) for path in folder.iterdir() if (found := _NUMBERED.match(path.name))]
        written = []
        for index, sample in enumerate(self.samples, max(taken, default=-1) + 1):
            files = [
                _save_segment(folder / f"{index:02d}-{place}-{segment.modality}", segment, sample)
                for place, segment in enumerate(sample.segments)
            ]
            facts = {**sample.provenance, "seed": sample.seed, "finish_reason": sample.finish_reason, "ids": sample.ids}
            facts["files"] = [path.name for path in files]
            if sample.via:
                facts["via"] = [str(segment.content) for segment in sample.via]
            (folder / f"{index:02d}.json").write_text(
                json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            written += files
        return written


def _save_segment(stem: Path, segment: Segment, sample: Sample) -> Path:
    content = segment.content
    if isinstance(content, Image.Image):
        path = stem.with_suffix(".png")
        save_png(content, path, {**sample.provenance, "seed": sample.seed})
        return path
    if isinstance(content, Audio):
        return content.save(stem.with_suffix(".wav"))
    path = stem.with_suffix(".txt")
    text = json.dumps(content.values) if isinstance(content, Region) else str(content)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def save_png(picture: Image.Image, path: Path, provenance: Mapping[str, Any]) -> None:
    """A picture as PNG, with its provenance as JSON in the text chunk `anygen`."""
    info = PngImagePlugin.PngInfo()
    info.add_text("anygen", json.dumps(dict(provenance), ensure_ascii=True))
    picture.save(path, pnginfo=info)


@dataclass(frozen=True)
class Event:
    """Something that happened in a stream."""

    sample: int
    """Index of the sample it happened to."""


@dataclass(frozen=True)
class SegmentStarted(Event):
    """A text, picture, sound or region was begun."""

    modality: str


@dataclass(frozen=True)
class TextDelta(Event):
    """More text; whole characters only."""

    text: str


@dataclass(frozen=True)
class SegmentProgress(Event):
    """A picture or sound grows."""

    num_done: int
    num_codes: int


@dataclass(frozen=True)
class RowDone(Event):
    """A picture has one more row of codes, in all its codebooks."""

    num_done: int
    num_rows: int
    codes: Codes = field(repr=False)
    """Of the rows so far."""
    draw: Callable[[Codes], Image.Image] = field(repr=False, compare=False)

    def preview(self) -> Image.Image:
        """The picture so far, at its final size and white below; drawn when it is asked for."""
        rows, columns = self.num_done, self.codes.num_steps // self.num_done
        grid_KHW = self.codes.codes_KT.reshape(-1, rows, columns)
        below_KHW = np.repeat(grid_KHW[:, -1:], self.num_rows - rows, axis=1)  # better for the last row than nothing
        whole_KT = np.concatenate([grid_KHW, below_KHW], axis=1).reshape(len(grid_KHW), -1)
        picture = self.draw(Codes(whole_KT, "image", (self.num_rows, columns)))
        end_px = picture.height * rows // self.num_rows
        picture.paste("white", (0, end_px, picture.width, picture.height))
        return picture


@dataclass(frozen=True)
class SoundChunk(Event):
    """More of a sound, ready to be played; joined, the chunks are the whole."""

    audio: Audio
    start_s: float


@dataclass(frozen=True)
class SegmentFinished(Event):
    """A segment is whole, and decoded."""

    segment: Segment


@dataclass(frozen=True)
class Finished:
    """Everything is done."""

    output: Output
