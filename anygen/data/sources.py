"""Where records come from: the emoji world, a folder with `metadata.jsonl`, or WebDataset tars.

A source lists its items for each split and turns one item into one record; both are pure, so shards can be made in
any order, by any number of workers, and again. Splits follow from names and keys, never from chance.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import soundfile
from pydantic import Field

from anygen.config import Config
from anygen.data.emoji_names import captions
from anygen.data.emoji_pictures import Emoji, EmojiFont, on_white
from anygen.data.records import PICTURE_TYPES, SOUND_TYPES, Record, RecordStore, Utterance
from anygen.data.scenes import is_countable, make_scene
from anygen.data.speech import HELD_OUT_VOICE, check_voices, speak
from anygen.errors import ConfigError, DataError
from anygen.files import sha256_of
from tokenizers_mm.codes import fingerprint_of
from tokenizers_mm.media import Audio, load_picture, load_sound

SplitName = Literal["train", "validation", "test", "unheard"]
"""`unheard` holds every name spoken by the voices that are never in training."""
Items = dict[SplitName, list[Any]]


class SourceConfig(Config):
    """What every source's config can do."""

    def listing(self) -> str | None:
        """Fingerprint of the files the source lists; None where the config alone says what it holds."""
        return None


class Source(Protocol):
    """Lists items and turns one into a record."""

    def items(self) -> Items:
        """The items of each split, in order."""
        ...

    def record(self, item: Any) -> Record:
        """One item as a record; raises DataError or InputError where it is unusable."""
        ...


class EmojiSource(SourceConfig):
    """The emoji world: every emoji of the font drawn, captioned and spoken, and scenes of them."""

    kind: Literal["emoji"] = "emoji"
    side_px: int = Field(64, ge=8, le=1024)
    voices: tuple[str, ...] = ("awb", "kal", "kal16", "slt", "espeak:en-us", "espeak:en-gb+f3")
    """Voices in every split; flite voices or espeak:LANGUAGE+VARIANT."""
    unheard_voices: tuple[str, ...] = (HELD_OUT_VOICE,)
    """Voices of the split `unheard` only."""
    num_scenes: int = Field(0, ge=0)
    """Scenes in all; every 20th goes to validation, every 20th to test."""
    max_emoji: int | None = Field(None, ge=1)
    """Take only this many emoji, spread over the whole list; None takes all."""
    seed: int = 0

    def open(self) -> Source:
        """The source itself."""
        if shared := {HELD_OUT_VOICE, *self.unheard_voices} & set(self.voices):
            raise ConfigError(f"voice {min(shared)!r} is held out for evaluation; take it out of `voices`")
        return _EmojiWorld(self)


class FolderSource(SourceConfig):
    """A folder of pictures and sounds with a `metadata.jsonl` (`file_name`, `text`): the ImageFolder layout."""

    kind: Literal["folder"] = "folder"
    path: Path
    picture_side_px: int | None = Field(None, ge=8)
    """Shrink pictures whose longer side is above this; None keeps them."""
    held_out_field: str | None = None
    """A metadata field, such as `speaker`, whose `held_out_value` goes to the split `unheard`."""
    held_out_value: str | None = None

    def listing(self) -> str | None:
        """Hash of `metadata.jsonl`, and the sizes of the files that it names."""
        path = self.path / "metadata.jsonl"
        if not path.is_file():
            return None
        names = {row["file_name"] for row in _Folder(self).rows}
        sizes = {name: file.stat().st_size if (file := self.path / name).is_file() else None for name in names}
        return fingerprint_of({"metadata": sha256_of(path), "sizes": sizes})

    def open(self) -> Source:
        """The source itself."""
        return _Folder(self)


class WebDatasetSource(SourceConfig):
    """WebDataset tar shards: `{key}.jpg` or `{key}.wav` beside `{key}.txt`."""

    kind: Literal["webdataset"] = "webdataset"
    path: Path
    """A folder of *.tar files, or one file."""

    def listing(self) -> str | None:
        """Names and sizes of the shards."""
        return fingerprint_of({path.name: path.stat().st_size for path in self.shards()})

    def shards(self) -> list[Path]:
        """The tar files, in order."""
        return [self.path] if self.path.is_file() else sorted(self.path.glob("*.tar"))

    def open(self) -> Source:
        """The source itself."""
        return _WebDataset(self)


AnySource = Annotated[EmojiSource | FolderSource | WebDatasetSource, Field(discriminator="kind")]


def split_by_key(key: str) -> SplitName:
    """The split of a record of a user's data: 5 % validation, 5 % test, by the hash of its key.

    >>> [split_by_key(k) for k in ("a", "b", "c")]
    ['train', 'train', 'train']
    """
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20
    splits: dict[int, SplitName] = {0: "test", 1: "validation"}
    return splits.get(bucket, "train")


def flac_of(audio: Audio) -> bytes:
    """A sound as 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio.samples_T, -1.0, 1.0), audio.rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def png_of(picture: Any) -> bytes:
    """A PIL picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class _Spoken:
    """An emoji and the voices that speak it in one split."""

    emoji: Emoji
    voices: tuple[str, ...]


class _EmojiWorld:
    def __init__(self, config: EmojiSource) -> None:
        check_voices((*config.voices, *config.unheard_voices))
        self.config = config
        self.font = EmojiFont()
        catalogue = self.font.catalogue()
        self.things = [emoji for emoji in catalogue if is_countable(emoji)]
        if config.max_emoji is not None and config.max_emoji < len(catalogue):
            chosen = np.linspace(0, len(catalogue) - 1, config.max_emoji).round().astype(int)
            catalogue = [catalogue[i] for i in chosen]
        self.catalogue = catalogue

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        for emoji in self.catalogue:
            items[emoji.split].append(_Spoken(emoji, self.config.voices))
            items["unheard"].append(_Spoken(emoji, self.config.unheard_voices))
        for index in range(self.config.num_scenes):
            split: SplitName = {0: "test", 1: "validation"}.get(index % 20, "train")  # type: ignore[assignment]
            items[split].append(index)
        return items

    def record(self, item: _Spoken | int) -> Record:
        return self._scene(item) if isinstance(item, int) else self._emoji(item)

    def _emoji(self, item: _Spoken) -> Record:
        emoji, utterances = item.emoji, []
        for voice in item.voices:
            text = emoji.words_of(voice)
            utterances.append(Utterance(text, voice, flac_of(speak(text, voice))))
        picture = png_of(on_white(self.font.draw(emoji.char, self.config.side_px)))
        return Record(emoji.key, "emoji", captions(emoji.parts), picture, tuple(utterances))

    def _scene(self, index: int) -> Record:
        generator = np.random.default_rng([self.config.seed, index])
        scene = make_scene(self.things, self.font, side_px=self.config.side_px, generator=generator)
        objects = tuple((placed.name, placed.box) for placed in scene.objects)
        return Record(
            f"scene-{index:07d}", "scene", scene.captions, png_of(scene.picture), (), objects, scene.questions
        )


class _Folder:
    def __init__(self, config: FolderSource) -> None:
        self.config = config
        path = config.path / "metadata.jsonl"
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits at U+2028
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; a data folder needs a metadata.jsonl"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error
        self.rows = [self._row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]

    @staticmethod
    def _row(path: Path, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
            text = row.get("text", row.get("caption"))
            assert isinstance(row["file_name"], str) and (text is None or isinstance(text, str))
            assert "\0" not in row["file_name"] + (text or "")
            (row["file_name"] + (text or "")).encode()  # JSON can spell half a character
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object with the texts file_name and, if there is one, text"
            ) from error
        return {**row, "text": text or "", "line": number}  # one file may stand in several lines, with a caption each

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        field, value = self.config.held_out_field, self.config.held_out_value
        for row in self.rows:
            unheard = field is not None and str(row.get(field)) == value
            items["unheard" if unheard else split_by_key(row["file_name"])].append(row)
        return items

    def record(self, item: Mapping[str, Any]) -> Record:
        root = self.config.path.resolve()
        path = (root / item["file_name"]).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"metadata.jsonl names a file outside its folder: {item['file_name']!r}")
        text = item["text"]
        key = hashlib.sha256(json.dumps([item["file_name"], item["line"]]).encode()).hexdigest()[:20]
        ending = path.suffix.lower().lstrip(".")
        if ending in SOUND_TYPES:
            voice = "".join(c for c in str(item.get("speaker", "voice")) if c.isalnum()) or "voice"
            return Record(
                key, "pair", (text,) if text else (), None, (Utterance(text, voice, flac_of(load_sound(path))),)
            )
        if ending not in (*PICTURE_TYPES, "gif", "bmp"):
            raise DataError(f"{path.name}: only pictures and {', '.join(SOUND_TYPES)} sounds are read")
        return Record(key, "pair", (text,) if text else (), _shrunk(load_picture(path), self.config.picture_side_px))


class _WebDataset:
    def __init__(self, config: WebDatasetSource) -> None:
        paths = config.shards()
        if not paths:
            raise DataError(f"{config.path} is not a .tar file and holds none")
        self._paths = paths

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(self._paths)

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        for index, key in enumerate(self.store.keys()):
            items[split_by_key(key)].append(index)
        return items

    def record(self, item: int) -> Record:
        record = self.store[item]
        if record.picture is not None:
            load_picture(record.picture)
        for utterance in record.utterances:
            load_sound(utterance.sound)
        return record


def _shrunk(picture: Any, side_px: int | None) -> bytes:
    if side_px is not None and max(picture.size) > side_px:
        picture.thumbnail((side_px, side_px))
    return png_of(picture)
