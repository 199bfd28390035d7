"""What a gallery shows: prompts of every direction, with inputs and, where there is one, the real thing beside.

The inputs (pictures drawn from Noto Color Emoji, speech by flite) lie in the package, so that a gallery needs no font
and no voices.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from anygen.config import Config, build
from anygen.errors import ConfigError
from anygen.request import INPUT_ORDER, Request

INPUTS = "metadata.jsonl"


class ExhibitConfig(Config):
    """One prompt of the gallery."""

    section: str
    """Heading; exhibits with the same one stand together."""
    emoji: str | None = None
    """Name of an embedded emoji that the inputs are taken from and the answer is compared with."""
    inputs: list[str] = []
    """In order: `text`, `image`, `audio` of the emoji, `text=some words`, or a file beside the prompts (`image=a file`,
    `audio=a file`)."""
    output: list[str]
    num_samples: int = 1
    seed: int = 0
    options: dict[str, Any] = {}
    """Sampling options, by their names in `anygen.request.Request`."""


@dataclass(frozen=True)
class EmbeddedEmoji:
    """An emoji whose picture and speech lie in the package."""

    name: str
    split: str
    text: str
    """The words that are spoken."""
    picture: Path
    speech: Path


@dataclass(frozen=True)
class Exhibit:
    """A request, and how the page introduces it."""

    section: str
    request: Request
    inputs: tuple[tuple[str, str | Path], ...]
    """(modality, text or file)."""
    real: EmbeddedEmoji | None

    @property
    def is_held_out(self) -> bool:
        """True where this combination was never in training."""
        return self.real is not None and self.real.split != "train"


def load_exhibits(path: Path | None = None) -> list[Exhibit]:
    """The exhibits of a prompts file (YAML, a list of `ExhibitConfig`); None takes the one in the package.

    Raises:
        ConfigError: unreadable, a key that does not fit, or an emoji that is not embedded.
    """
    source = path or _package_file("prompts.yaml")
    try:
        rows = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read the prompts {source}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{source} is not a list of prompts")
    return [
        _exhibit(build(ExhibitConfig, row, source=f"{source}, prompt {number}"), source.parent)
        for number, row in enumerate(rows, 1)
    ]


@lru_cache(maxsize=1)
def embedded_emoji() -> Mapping[str, EmbeddedEmoji]:
    """Every embedded emoji by name."""
    folder = _package_file("inputs")
    rows = [json.loads(line) for line in (folder / INPUTS).read_text(encoding="utf-8").splitlines()]
    return {
        row["name"]: EmbeddedEmoji(
            row["name"], row["split"], row["text"], folder / row["picture"], folder / row["speech"]
        )
        for row in rows
    }


def _exhibit(config: ExhibitConfig, folder: Path) -> Exhibit:
    real = None
    if config.emoji is not None:
        if config.emoji not in embedded_emoji():
            raise ConfigError(
                f"emoji {config.emoji!r} is not embedded; there are {', '.join(sorted(embedded_emoji()))}"
            )
        real = embedded_emoji()[config.emoji]
    inputs = tuple(_input(spec, real, folder) for spec in config.inputs)
    given = [modality for modality, _ in inputs]
    if given != [modality for modality in INPUT_ORDER if modality in given]:
        raise ConfigError(
            f"inputs {config.inputs}: a command takes each modality once, in the order {', '.join(INPUT_ORDER)}"
        )
    content = [{"type": modality, modality: value} for modality, value in inputs]
    arguments = {"content": content, "output": config.output, "num_samples": config.num_samples, "seed": config.seed}
    try:
        request = Request.of(arguments | config.options)
    except TypeError as error:
        raise ConfigError(f"options of the prompt: {error}") from error
    return Exhibit(config.section, request, inputs, real)


def _input(spec: str, real: EmbeddedEmoji | None, folder: Path) -> tuple[str, str | Path]:
    if spec.startswith("text="):
        return "text", spec.removeprefix("text=")
    modality, is_given, value = spec.partition("=")
    if is_given and modality in ("image", "audio"):
        if not (path := folder / value).is_file():
            raise ConfigError(f"input {spec!r}: there is no file {path}")
        return modality, path
    if real is None or spec not in ("text", "image", "audio"):
        raise ConfigError(
            f"input {spec!r}: write text=WORDS, image=FILE, audio=FILE or, beside an emoji, text, image or audio"
        )
    values: dict[str, str | Path] = {"text": real.text, "image": real.picture, "audio": real.speech}
    return spec, values[spec]


def _package_file(name: str) -> Path:
    return Path(str(importlib.resources.files("anygen.gallery"))) / name
