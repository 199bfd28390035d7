"""Builds a gallery: one static page with its media, no server, no script.

Exhibits are generated in batches, each from its own seed; beside each stands the command that gives it again.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw

from anygen._version import __version__
from anygen.api import AnyGen
from anygen.documents import Segment
from anygen.errors import InputError
from anygen.evaluation.spectrogram import draw_spectrogram
from anygen.files import publishing
from anygen.gallery.exhibits import Exhibit
from anygen.gallery.redrawn import redrawn
from anygen.results import Sample, save_png
from anygen.sampling.choose import OPTION_NAMES
from anygen.training.metrics import Progress
from tokenizers_mm.media import Audio, Region, load_picture, load_sound

PAGE = "index.html"
_BATCH = 32
_FRAMED_PX = 192
"""Longer side of a picture with a box: twice what the page gives it."""
_OPTIONS = (
    *("task", "num_samples", "seed", "best_of", *OPTION_NAMES, "max_new_tokens", "size", "duration_s"),
    *("decoder", "num_inference_steps", "via"),
)
"""Of a request, in the command beside its answer, where they are not as usual."""


@dataclass(frozen=True)
class Shown:
    """One medium on the page."""

    modality: str
    """`text`, `image`, `audio`, `region`, or `via`: a text that was written on the way."""
    text: str = ""
    file: str = ""
    """Relative to the page."""
    spectrogram: str = ""
    label: str = ""
    """What a reader who cannot see or hear it is told."""


@dataclass(frozen=True)
class Card:
    """One exhibit on the page."""

    section: str
    inputs: tuple[Shown, ...]
    answers: tuple[tuple[Shown, ...], ...]
    """What was written on the way to each sample, then its media."""
    real: tuple[Shown, ...]
    is_held_out: bool
    command: str


def build_gallery(model: AnyGen, out: Path, exhibits: Sequence[Exhibit]) -> Path:
    """Generate every exhibit and write the page; returns its path.

    An existing gallery at `out` is replaced once the new one is whole.

    Raises:
        InputError: `out` holds something that is not a gallery.
    """
    given, out = out, out.resolve()
    if out.exists() and not (out / "gallery.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a gallery: choose a new folder")
    answers = _generate(model, exhibits)
    with publishing(out) as folder:
        (folder / "media").mkdir()
        model_option = _model_option(model.bundle.folder, out)
        cards = [
            _card(number, exhibit, samples, folder / "media", model_option)
            for number, (exhibit, samples) in enumerate(zip(exhibits, answers, strict=True))
        ]
        cards += _redrawn_cards(model, folder / "media")
        (folder / PAGE).write_text(render(cards, name=str(model.bundle.provenance.get("name", ""))), encoding="utf-8")
        (folder / "gallery.json").write_text(
            json.dumps([dataclasses.asdict(card) for card in cards], indent=1), encoding="utf-8"
        )
    return given / PAGE


def render(cards: Sequence[Card], *, name: str) -> str:
    """The page; everything that is not markup of ours is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anygen.gallery", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    sections: dict[str, list[Card]] = {}
    for card in cards:
        sections.setdefault(card.section, []).append(card)
    return environment.get_template("page.html.jinja").render(sections=sections, name=name, version=__version__)


def _generate(model: AnyGen, exhibits: Sequence[Exhibit]) -> list[tuple[Sample, ...]]:
    progress = Progress("gallery", len(exhibits))
    answers = []
    for start in range(0, len(exhibits), _BATCH):
        outputs = model.generate_batch([exhibit.request for exhibit in exhibits[start : start + _BATCH]])
        answers += [output.samples for output in outputs]
        progress.advance(count=len(outputs))
    progress.close()
    return answers


def _card(number: int, exhibit: Exhibit, samples: Sequence[Sample], media: Path, model_option: list[str]) -> Card:
    """One exhibit with its media written to `media`."""
    inputs = tuple(
        _show_input(modality, value, media, f"{number:02d}-in-{i}")
        for i, (modality, value) in enumerate(exhibit.inputs)
    )
    pictures = [value for modality, value in exhibit.inputs if modality == "image" and isinstance(value, Path)]
    answers = tuple(
        (
            *(Shown("via", text=str(segment.content)) for segment in sample.via),
            *(
                _show(
                    segment, media, f"{number:02d}-{s}-{place}", sample, f"answer {s + 1} of {len(samples)}", pictures
                )
                for place, segment in enumerate(sample.segments)
            ),
        )
        for s, sample in enumerate(samples)
    )
    command = _command(exhibit, inputs, model_option)
    return Card(exhibit.section, inputs, answers, _show_real(exhibit, media), exhibit.is_held_out, command)


def _redrawn_cards(model: AnyGen, media: Path) -> list[Card]:
    """One card a picture: given, then drawn from its codes by each decoder."""
    cards = []
    for number, (emoji, drawn) in enumerate(redrawn(model.bundle)):
        given = _show_input("image", emoji.picture, media, f"redrawn-{number:02d}-in")
        answers = []
        for place, (name, picture) in enumerate(drawn.items()):
            file = f"redrawn-{number:02d}-{place}.png"
            picture.save(media / file)
            answers.append((Shown("text", text=name), Shown("image", file=f"media/{file}", label=f"by the {name}")))
        cards.append(Card("Drawn from the codes of a real picture", (given,), tuple(answers), (), False, ""))
    return cards


def _show(segment: Segment, media: Path, stem: str, sample: Sample, label: str, pictures: Sequence[Path]) -> Shown:
    content = segment.content
    if isinstance(content, Image.Image):
        save_png(content, media / f"{stem}.png", {**sample.provenance, "seed": sample.seed})
        return Shown("image", file=f"media/{stem}.png", label=label)
    if isinstance(content, Audio):
        return _show_sound(content, media, stem, label)
    if isinstance(content, Region):
        text = ", ".join(f"{value:.2f}" for value in content.values)
        if not pictures:
            return Shown("region", text=text)
        _framed(load_picture(pictures[0]), content).save(media / f"{stem}-framed.png", optimize=True)
        return Shown("region", text=text, file=f"media/{stem}-framed.png", label=f"the picture with the box {text}")
    return Shown("text", text=str(content))


def _framed(picture: Image.Image, region: Region) -> Image.Image:
    """The picture, scaled to show as much as the page does, with the box, or a small one around the point, in red."""
    scale = _FRAMED_PX / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    shown = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    x0, y0, x1, y1 = (
        v * side for v, side in zip((*region.values, *region.values)[:4], (width, height) * 2, strict=True)
    )
    margin = 0 if len(region.values) == 4 else _FRAMED_PX / 24
    (left, right), (top, bottom) = sorted((x0, x1)), sorted((y0, y1))
    corners = (left - margin, top - margin, right + margin, bottom + margin)
    ImageDraw.Draw(shown).rectangle(corners, outline="red", width=3)
    return shown


def _show_sound(audio: Audio, media: Path, stem: str, label: str) -> Shown:
    audio.save(media / f"{stem}.flac")
    draw_spectrogram(audio).save(media / f"{stem}-spectrogram.png")
    return Shown("audio", file=f"media/{stem}.flac", spectrogram=f"media/{stem}-spectrogram.png", label=label)


def _show_input(modality: str, value: str | Path, media: Path, stem: str) -> Shown:
    if not isinstance(value, Path):
        return Shown(modality, text=value)
    name = f"{stem}{value.suffix}"
    shutil.copyfile(value, media / name)
    if modality != "audio":
        return Shown(modality, file=f"media/{name}", label="given")
    draw_spectrogram(load_sound(value)).save(media / f"{stem}-spectrogram.png")
    return Shown(modality, file=f"media/{name}", spectrogram=f"media/{stem}-spectrogram.png", label="given")


def _show_real(exhibit: Exhibit, media: Path) -> tuple[Shown, ...]:
    if exhibit.real is None:
        return ()
    shown = [Shown("text", text=exhibit.real.text)]
    if "image" in exhibit.request.outputs and not any(modality == "image" for modality, _ in exhibit.inputs):
        name = f"real-{exhibit.real.picture.name}"
        shutil.copyfile(exhibit.real.picture, media / name)
        shown.append(Shown("image", file=f"media/{name}", label=f"the real emoji, {exhibit.real.text}"))
    return tuple(shown)


def _command(exhibit: Exhibit, inputs: Sequence[Shown], model_option: list[str]) -> str:
    """The shell command that generates this again, in the folder of the page."""
    request = exhibit.request
    words = ["anygen", "generate", *model_option]
    for shown in inputs:
        words += [f"--{shown.modality}", shown.file or shown.text]
    for output in request.outputs:
        words += ["--output", output]
    for name in _OPTIONS:
        if (value := getattr(request, name)) != getattr(type(request), name):  # a field's default
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _model_option(bundle: Path, out: Path) -> list[str]:
    """How to name the model in the folder of the page; the embedded one needs no name."""
    package = Path(str(importlib.resources.files("anygen"))).resolve()
    return [] if bundle.resolve().is_relative_to(package) else ["--model", os.path.relpath(bundle.resolve(), out)]
